"""Exact Hessian–vector products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from .objective import Objective
from .objective.isolation import leaf
from .objective.tracing import once_differentiable, without_second_derivative

__all__ = ["HessianOperator"]

T = TypeVar("T")


class HessianOperator:
    """The Hessian of an objective at fixed parameters, as exact products with vectors (reverse over reverse).

    Args:
        objective: the function.
        params: where to take the Hessian, shape (P,). A copy is kept.
        retain_graph: whether to keep the gradient's graph between products; by default as the objective says.
        check: whether to look, with two products, if the Hessian is symmetric; see :meth:`asymmetry`.

    Attributes:
        value, gradient: ℓ(w) and ∇ℓ(w), shapes () and (P,): to the bit those of ``objective.value_and_gradient``.
        matvecs: products computed so far.
        shape, dtype, device: (P, P), and those of w.

    Raises:
        RuntimeError: here or in a product, naming the module that has no second derivative.
        ValueError: if the Hessian was to be checked and is not symmetric.

    Source: Pearlmutter (1994), *Fast exact multiplication by the Hessian*.
    """

    def __init__(
        self, objective: Objective, params: Tensor, *, retain_graph: bool | None = None, check: bool = False
    ) -> None:
        self.objective = objective
        self.retain_graph = objective.retain_graph if retain_graph is None else retain_graph
        self.matvecs = 0
        self.shape = (objective.size, objective.size)
        params = objective.checked(params, numbers=True)
        self.dtype, self.device = params.dtype, params.device
        self._params = leaf(params, own=True)
        layout = objective.layout
        others = {**layout.constants, **dict(objective.model.named_buffers())}
        self._fixed = {name: t.detach().clone() for name, t in others.items()}  # a training moves those, too
        self._gradients: list[Tensor] = []
        if self.retain_graph:
            self.value, self.gradient = self._within(self._keep_graphs)
        if objective.kernel or not self.retain_graph:
            self.value, self.gradient = objective.value_and_gradient(self._params)
        if check and (asymmetry := self.asymmetry()) > 1e3 * torch.finfo(self.dtype).eps:
            raise ValueError(
                f"the Hessian is not symmetric (relative asymmetry {asymmetry:.1e}): an operation of the model has a "
                "wrong second derivative, as torch.nn.utils.parametrizations.weight_norm has in PyTorch 2.13, or cuts "
                "a gradient off (detach); replace it"
            )

    @property
    def params(self) -> Tensor:
        """w, shape (P,)."""
        return self._params.detach()

    def _within(self, function: Callable[[], T]) -> T:
        """What a function returns at w, or an error that names the module without a second derivative."""
        try:
            return self.objective.within(self._params, function, self._fixed)
        except RuntimeError as error:
            said = str(error).lower()
            if not any(words in said for words in ("is not implemented", "differentiate twice", "double backward")):
                raise
            module = without_second_derivative(self.objective, self._params)
            raise RuntimeError(
                f"{module} has no second derivative in PyTorch; write it out in differentiable operations, or choose "
                f"the parameters behind it with parameters=. PyTorch says: {error}"
            ) from error

    def _keep_graphs(self) -> tuple[Tensor, Tensor]:
        value, gradient = torch.zeros((), dtype=self.dtype, device=self.device), torch.zeros_like(self._params)
        for loss in self.objective.chunk_losses():
            # Some operations have another formula, with other rounding, where their gradient is differentiated again.
            gradient += torch.autograd.grad(loss, self._params, retain_graph=True)[0]
            value += loss.detach()
            self._gradients.append(self._differentiate(loss))
        return value, gradient

    def _differentiate(self, loss: Tensor) -> Tensor:
        gradient = torch.autograd.grad(loss, self._params, create_graph=True)[0]
        if self.objective.unseen and once_differentiable([gradient]):
            raise RuntimeError("trying to differentiate twice a function that was marked with @once_differentiable")
        self.objective.unseen = False
        return gradient

    def matvec(self, vector: Tensor) -> Tensor:
        """H v for v of shape (P,)."""
        if not isinstance(vector, Tensor):
            raise TypeError(
                f"expected a vector as a tensor ({self.shape[0]},), got {type(vector).__name__}; "
                "as_linear_operator() takes arrays"
            )
        if vector.shape != self.shape[:1]:
            raise ValueError(f"expected a vector of shape ({self.shape[0]},), got {tuple(vector.shape)}")
        self.matvecs += 1
        return self._within(lambda: self._product(vector))

    def _product(self, vector: Tensor) -> Tensor:
        product = torch.zeros_like(vector)
        # What is done with is let go at once: the graph of one chunk, and few vectors, bound the memory.
        for gradient in self._gradients or map(self._differentiate, self.objective.chunk_losses()):
            # A loss that is linear in w has a gradient without a graph, and no Hessian.
            if gradient.requires_grad:
                keep = self.retain_graph
                term = torch.autograd.grad(gradient, self._params, vector, retain_graph=keep, allow_unused=True)[0]
                if term is not None:
                    product += term
                del term
            del gradient
        return product

    __matmul__ = matvec

    def asymmetry(self, generator: torch.Generator | None = None) -> float:
        """|v·(HᵀH − H²)v| / ‖H v‖² for a random v, from two products: zero but for rounding if H is symmetric.

        Args:
            generator: source of v; seeded with 0 if not given.
        """
        generator = generator or torch.Generator().manual_seed(0)
        v = torch.randn(self.shape[0], dtype=self.dtype, generator=generator).to(self.device)
        once = self @ v
        square = float(once.square().sum())
        return abs(square - float(v @ (self @ once))) / square if square else 0.0

    def as_linear_operator(self) -> Any:
        """The same as a ``scipy.sparse.linalg.LinearOperator``, for SciPy's solvers.

        Raises:
            ImportError: without SciPy.
        """
        try:
            from scipy.sparse.linalg import LinearOperator
        except ImportError as error:
            raise ImportError("as_linear_operator needs SciPy: pip install scipy") from error

        def product(vector: np.ndarray) -> np.ndarray:
            v = torch.as_tensor(np.array(vector).reshape(-1), dtype=self.dtype, device=self.device)
            return (self @ v).cpu().numpy()

        dtype = torch.empty(0, dtype=self.dtype).numpy().dtype
        return LinearOperator(self.shape, matvec=product, rmatvec=product, dtype=dtype)
