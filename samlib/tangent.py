"""The tangent kernel of squared error in full: its blocks on the diagonal, one for each example, and the matrix.

With N examples of C outputs and the Jacobian J (NC, P) of all outputs, ordered example by example, squared error (the
mean over examples *and* outputs of (f − y)², without ½) moves the outputs by −η Θ (f − y) in a step of gradient
descent, to first order, with Θ = (2/NC) J Jᵀ.
"""

from __future__ import annotations

import copy
from typing import TypeAlias

import torch
from torch import Tensor, nn

from .objective import Layout, Objective

__all__ = ["MOST_BYTES", "MOST_ROWS", "ntk_blocks", "ntk_matrix", "require_squared_error"]

MOST_ROWS = 4_000  # of a tangent kernel in full: 128 MB, and eigenvalues in minutes
MOST_BYTES = 2**30  # of blocks, or of the derivatives held at a time
PROBE = 8  # examples that are enough to tell a loss, or the kind of network

# Derivatives of some examples' outputs by a part of the parameters: rows a (n, p) and Δ (n, C, q) such that
# J_ic restricted to that part is the outer product of Δ_ic and a_i. For a linear layer, a_i are its inputs.
Factor: TypeAlias = tuple[Tensor, Tensor]


def ntk_blocks(objective: Objective, params: Tensor) -> Tensor:
    """The blocks (2/C) J_i J_iᵀ of N·Θ, one for each example; the mean of their traces is the trace of Θ, exactly.

    Networks of linear layers on vectors cost C backward passes without derivatives of weights, two or three gradients
    in all. For others each example's Jacobian is computed. Derivatives have the precision of ``params``.

    Args:
        objective: the examples and the network, with squared error as its loss.
        params: w, shape (P,).

    Returns:
        Shape (N, C, C), float64.

    Raises:
        ValueError: if the loss is not squared error, or the memory needed is beyond a gigabyte.
        FloatingPointError: if the outputs are not finite.

    >>> x, y = torch.tensor([[1.0], [2.0]]), torch.zeros(2, 1)
    >>> objective = Objective(nn.Linear(1, 1, bias=False), lambda f, y: (f - y).square().mean(), x, y)
    >>> ntk_blocks(objective, torch.zeros(1)).flatten()
    tensor([2., 8.], dtype=torch.float64)
    """
    examples, outputs = len(objective.inputs), require_squared_error(objective, params)
    _bounded(f"{examples} blocks of {outputs} × {outputs} numbers", examples * outputs**2)
    jacobian = _Jacobian(objective, params.detach(), outputs)
    blocks = []
    for x in objective.inputs.split(min(jacobian.length, objective.chunk_size or examples)):
        parts = [a.square().sum(1)[:, None, None] * (delta @ delta.mT) for a, delta in jacobian(x)]
        blocks.append(torch.stack(parts).sum(0))
    return torch.cat(blocks).double() * (2 / outputs)


def ntk_matrix(objective: Objective, params: Tensor) -> Tensor:
    """The tangent kernel Θ = (2/NC) J Jᵀ, rows ordered example by example.

    Its non-zero eigenvalues are those of the Gauss–Newton matrix (2/NC) Jᵀ J. All of it is computed in float64,
    whatever the network's own precision.

    Args:
        objective: the examples and the network, with squared error as its loss.
        params: w, shape (P,).

    Returns:
        Shape (NC, NC), float64.

    Raises:
        ValueError: if the loss is not squared error, or NC is above 4,000.
        FloatingPointError: if the outputs are not finite.

    >>> x, y = torch.tensor([[1.0], [2.0]]), torch.zeros(2, 1)
    >>> objective = Objective(nn.Linear(1, 1, bias=False), lambda f, y: (f - y).square().mean(), x, y)
    >>> ntk_matrix(objective, torch.zeros(1))
    tensor([[1., 2.],
            [2., 4.]], dtype=torch.float64)
    """
    examples, outputs = len(objective.inputs), require_squared_error(objective, params)
    rows = examples * outputs
    if rows > MOST_ROWS:
        raise ValueError(
            f"the tangent kernel of {examples} examples × {outputs} outputs has {rows:,} rows ({rows**2 * 8 / 1e9:.1f} "
            f"GB), and at most {MOST_ROWS:,} are allowed; take {MOST_ROWS // outputs} examples, or ntk_blocks and "
            "the leading eigenvalues of a TangentKernelOperator"
        )
    jacobian = _Jacobian(objective, params.detach().double(), outputs)
    theta = torch.empty(rows, rows, dtype=torch.float64, device=params.device)
    chunks = list(zip(theta.split(jacobian.length * outputs), objective.inputs.split(jacobian.length), strict=True))
    for i, (band, x) in enumerate(chunks):
        here = jacobian(x)
        for j, tile in enumerate(band.split(jacobian.length * outputs, dim=1)[: i + 1]):
            tile.copy_(_product(here, jacobian(chunks[j][1]) if j < i else here))
    return (theta.tril() + theta.tril(-1).mT).mul_(2 / rows)


def require_squared_error(objective: Objective, params: Tensor) -> int:
    """C, the number of outputs of an example; refuses an objective whose loss is not squared error.

    The loss of a few examples is differentiated with respect to their outputs, where these are and away from there,
    and compared with 2(f − y)/(NC).

    Raises:
        ValueError: if the derivatives differ, or targets are not shaped as outputs.
        FloatingPointError: if the outputs are not finite.
    """
    if not isinstance(objective.inputs, Tensor) or not isinstance(objective.targets, Tensor):
        raise ValueError(
            f"needs inputs and targets in one tensor each, got a {type(objective.inputs).__name__} and a "
            f"{type(objective.targets).__name__}"
        )
    x, y = objective.inputs[:PROBE], objective.targets[:PROBE]
    with torch.no_grad():
        f = objective.forward(params, x)
    if not bool(f.isfinite().all()):
        raise FloatingPointError("the outputs are not finite")
    if f.shape != y.shape:
        found = f"outputs shaped {tuple(f.shape[1:])} and targets shaped {tuple(y.shape[1:])} for each example"
    else:
        away = torch.arange(f.numel(), device=f.device).cos().view_as(f) * 10 * (1 + (f - y).abs().max())
        if all(_slope_is_that_of_squared_error(objective, at, y) for at in (f, f + away)):
            return f[0].numel()
        found = "another derivative with respect to the outputs"
    raise ValueError(
        f"needs squared error, the mean over examples and outputs of (f − y)², from which the theory is derived; "
        f"this objective's loss has {found}"
    )


@torch.enable_grad()
def _slope_is_that_of_squared_error(objective: Objective, outputs: Tensor, targets: Tensor) -> bool:
    at = outputs.detach().requires_grad_()
    loss = objective.loss(at, targets)
    slope = torch.autograd.grad(loss, at)[0] if loss.requires_grad else torch.zeros_like(at)
    expected = 2 * (outputs - targets) / at.numel()
    return bool((slope - expected).abs().max() <= 1e-4 * expected.abs().max())


class _Jacobian:
    """The factors of J for any inputs, as precise as w; those of ``length`` examples fit into memory at a time."""

    def __init__(self, objective: Objective, params: Tensor, outputs: int) -> None:
        self._model, self._w = copy.deepcopy(objective.model).double(), params.double()
        self._layout = Layout(self._model, objective.slices)
        self._layers = [m for m in self._model.modules() if isinstance(m, nn.Linear)]
        probe = self._precise(objective.inputs[:PROBE])
        factors = self._by_layers(probe)
        self._factors, numbers = self._by_layers, sum(a.shape[1] + delta[0].numel() for a, delta in factors)
        if not self._explained(factors, probe):
            self._factors, numbers = self._by_outputs, outputs * objective.size
        _bounded(f"derivatives of {outputs} outputs by {objective.size} parameters", numbers)
        self.length = max(1, MOST_BYTES // (8 * numbers))
        self._model, self._w = self._model.to(params.dtype), params

    def __call__(self, inputs: Tensor) -> list[Factor]:
        return self._factors(self._precise(inputs))

    def _outputs(self, params: Tensor, inputs: Tensor) -> Tensor:
        return torch.func.functional_call(self._model, self._layout.split(params), (inputs,))

    def _precise(self, inputs: Tensor) -> Tensor:
        return inputs.to(self._w.dtype) if inputs.is_floating_point() else inputs

    @torch.enable_grad()
    def _by_layers(self, inputs: Tensor) -> list[Factor]:
        """One factor for each call of a linear layer on vectors: its inputs, and the derivatives by its outputs.

        The derivative by its weights and bias is Δ_icᵀ (a_i, 1).
        """
        called: list[tuple[Tensor, Tensor]] = []

        def record(layer: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not arguments or arguments[0].dim() != 2:
                return None
            a = arguments[0].detach()
            one = torch.ones_like(a[:, :1]) if layer.bias is not None else a[:, :0]
            called.append((torch.cat([a, one], 1), output.requires_grad_()))
            return output.clone()  # so that what is differentiated by is not changed in place

        handles = [layer.register_forward_hook(record) for layer in self._layers]
        try:
            f = self._outputs(self._w, inputs).reshape(len(inputs), -1).sum(0)
        finally:
            for handle in handles:
                handle.remove()
        if not f.requires_grad:
            return []
        by = [output for _, output in called]
        deltas = [torch.autograd.grad(f_c, by, retain_graph=True, materialize_grads=True) for f_c in f]
        return [(a, torch.stack(delta, 1)) for (a, _), delta in zip(called, zip(*deltas, strict=True), strict=True)]

    def _explained(self, factors: list[Factor], inputs: Tensor) -> bool:
        """Whether linear layers hold all parameters and account for the whole derivative: |Jᵀu|² is autograd's."""
        held = {p for layer in self._layers for p in layer.parameters()}
        if held != set(self._model.parameters()):
            return False
        w = self._w.clone().requires_grad_()
        with torch.enable_grad():
            f = self._outputs(w, inputs).reshape(len(inputs), -1)
        u = torch.arange(f.numel(), dtype=f.dtype, device=f.device).cos().view_as(f)
        expected = torch.autograd.grad(f, w, u)[0].square().sum()
        found = sum(float(torch.einsum("nc,ncq,np->qp", u, delta, a).square().sum()) for a, delta in factors)
        return found > 0 and abs(found - float(expected)) <= 1e-9 * found

    @torch.enable_grad()
    def _by_outputs(self, inputs: Tensor) -> list[Factor]:
        """J itself, (n, C, P), beside ones."""
        w, rows = self._w.clone().requires_grad_(), []
        for x in inputs.split(1):
            f = self._outputs(w, x).flatten()
            rows.append(torch.stack([torch.autograd.grad(f_c, w, retain_graph=True)[0] for f_c in f]))
        return [(torch.ones(len(rows), 1).to(self._w), torch.stack(rows))]


def _product(here: list[Factor], there: list[Factor]) -> Tensor:
    """J_i J_jᵀ for all examples of both, shape (nC, mC)."""
    total = None
    for (a, delta), (b, epsilon) in zip(here, there, strict=True):
        part = delta.flatten(0, 1) @ epsilon.flatten(0, 1).mT
        part.view(*delta.shape[:2], *epsilon.shape[:2]).mul_((a @ b.mT)[:, None, :, None])
        total = part if total is None else total.add_(part)
    assert total is not None
    return total


def _bounded(what: str, numbers: int) -> None:
    if 8 * numbers > MOST_BYTES:
        raise ValueError(f"{what} need {8 * numbers / 1e9:.1f} GB, more than the {MOST_BYTES / 1e9:.1f} GB allowed")
