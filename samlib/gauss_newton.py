"""Operators of the linearised network: the Gauss–Newton matrix and the tangent kernel, as exact products."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .objective import Objective
from .tangent import require_squared_error

__all__ = ["GaussNewtonOperator", "TangentKernelOperator"]


class _Linearised:
    """Some examples' outputs f(w) near fixed parameters: f(w + v) ≈ f(w) + J v.

    J v is the derivative with respect to u of the linear map u ↦ Jᵀ u, in the direction v. So both products need
    reverse mode only, for which samlib's own layers have rules.

    Args:
        outputs: f(w), with its graph.
        params: w, shape (P,).
        slope: ∂ℓ/∂f at f(w), with its graph from ``at``; without one, ℓ is linear in f.
        at: f(w), cut off from w.
    """

    def __init__(self, outputs: Tensor, params: Tensor, slope: Tensor, at: Tensor) -> None:
        self.outputs, self._params, self._slope, self._at = outputs, params, slope, at
        self._u = torch.zeros_like(outputs, requires_grad=True)
        self._pulled = self._differentiate(outputs, params, self._u, create_graph=True)

    def push(self, vector: Tensor) -> Tensor:
        """J v, in the outputs' shape."""
        return self._differentiate(self._pulled, self._u, vector)

    def pull(self, vector: Tensor) -> Tensor:
        """Jᵀ u, shape (P,), for u in the outputs' shape."""
        return self._differentiate(self.outputs, self._params, vector)

    def curve(self, vector: Tensor) -> Tensor:
        """(∂²ℓ/∂f²) u, in the outputs' shape."""
        return self._differentiate(self._slope, self._at, vector)

    @staticmethod
    def _differentiate(of: Tensor, by: Tensor, vector: Tensor, create_graph: bool = False) -> Tensor:
        if not of.requires_grad:
            return torch.zeros_like(by)
        (found,) = torch.autograd.grad(
            of, by, vector, retain_graph=True, create_graph=create_graph, materialize_grads=True
        )
        return found


class _LinearisedOperator:
    """What both operators share: an objective, linearised chunk by chunk at fixed parameters."""

    def __init__(self, objective: Objective, params: Tensor) -> None:
        self.objective = objective
        self.matvecs = 0
        self.dtype, self.device = params.dtype, params.device
        self._params = params.detach().requires_grad_()
        self._kept = list(self._linearise()) if objective.retain_graph else []

    @torch.enable_grad()
    def _linearise(self) -> Iterator[_Linearised]:
        for chunk, share in self.objective.weighted_chunks():
            outputs = self.objective.forward(self._params, chunk.inputs)
            at = outputs.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.objective.loss(at, chunk.targets) * share, at, create_graph=True)
            yield _Linearised(outputs, self._params, slope, at)

    def _chunks(self) -> Iterator[_Linearised]:
        return iter(self._kept) if self._kept else self._linearise()


class GaussNewtonOperator(_LinearisedOperator):
    """The Gauss–Newton matrix of an objective at fixed parameters, as exact products with vectors.

        G = Jᵀ (∂²ℓ/∂f²) J,    with J = ∂f/∂w

    for any loss ℓ of the outputs f: the Hessian without the curvature of the network itself. With squared error it is
    (2/NC) Jᵀ J for N examples of C outputs, whose non-zero eigenvalues are those of the tangent kernel Θ; with
    cross-entropy it is the Fisher information.

    Args:
        objective: the function. As for :class:`HessianOperator`, the graph is kept between products unless its
            ``retain_graph`` is false.
        params: where to take the matrix, shape (P,).

    Attributes:
        shape, dtype, device: what the solvers ask of an operator.
        matvecs: products computed so far.

    Source: Schraudolph (2002), *Fast curvature matrix-vector products for second-order gradient descent*.

    >>> x, y = torch.tensor([[1.0], [2.0]]), torch.zeros(2, 1)
    >>> objective = Objective(torch.nn.Linear(1, 1, bias=False), lambda f, y: (f - y).square().mean(), x, y)
    >>> GaussNewtonOperator(objective, torch.zeros(1)) @ torch.ones(1)  # (2/2)·(1² + 2²)
    tensor([5.])
    """

    def __init__(self, objective: Objective, params: Tensor) -> None:
        super().__init__(objective, params)
        self.shape = (objective.size, objective.size)

    def matvec(self, vector: Tensor) -> Tensor:
        """G v for v of shape (P,)."""
        self.matvecs += 1
        product = torch.zeros_like(self._params, requires_grad=False)
        for chunk in self._chunks():
            product += chunk.pull(chunk.curve(chunk.push(vector)))
        return product

    __matmul__ = matvec


class TangentKernelOperator(_LinearisedOperator):
    """The tangent kernel Θ = (2/NC) J Jᵀ of squared error at fixed parameters, as exact products with vectors.

    Rows are ordered example by example. Where the outputs are fewer than the parameters, its vectors (NC,) are
    shorter than those of :class:`GaussNewtonOperator`, at the same eigenvalues and the same price.

    Args:
        objective: the function, with squared error as its loss.
        params: where to take the kernel, shape (P,).

    Attributes:
        shape, dtype, device: what the solvers ask of an operator.
        matvecs: products computed so far.

    Raises:
        ValueError: if the loss is not squared error.

    Source: Jacot, Gabriel & Hongler (2018), arXiv:1806.07572.

    >>> x, y = torch.tensor([[1.0], [2.0]]), torch.zeros(2, 1)
    >>> objective = Objective(torch.nn.Linear(1, 1, bias=False), lambda f, y: (f - y).square().mean(), x, y)
    >>> TangentKernelOperator(objective, torch.zeros(1)) @ torch.tensor([1.0, 0.0])
    tensor([1., 2.])
    """

    def __init__(self, objective: Objective, params: Tensor) -> None:
        self._outputs = require_squared_error(objective, params)
        super().__init__(objective, params)
        rows = len(objective.inputs) * self._outputs
        self.shape = (rows, rows)

    def matvec(self, vector: Tensor) -> Tensor:
        """Θ u for u of shape (NC,)."""
        self.matvecs += 1
        pulled, first = torch.zeros_like(self._params, requires_grad=False), 0
        for chunk in self._chunks():
            size = chunk.outputs.numel()
            pulled += chunk.pull(vector[first : first + size].view_as(chunk.outputs))
            first += size
        pushed = torch.cat([chunk.push(pulled).flatten() for chunk in self._chunks()])
        return pushed * (2 / self.shape[0])

    __matmul__ = matvec
