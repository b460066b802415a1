"""SAM's gradient in two parts: what comes from the examples' weights, and what from the Jacobian.

With outputs f(w), residuals r = ∂ℓ/∂f and the Jacobian J = ∂f/∂w, the gradient of a loss is Jᵀr. SAM follows it at a
perturbed point w̃, where both factors have changed:

    plain Jᵀr,  weights only Jᵀr̃,  Jacobian only J̃ᵀr,  SAM J̃ᵀr̃,

    weights + Jacobian − plain − SAM = −(J̃ − J)ᵀ(r̃ − r), of second order in ‖w̃ − w‖ on smooth networks.

Each is one vector–Jacobian product; where w̃ = w all are the plain gradient, bit for bit. A model is given as a function
(params, inputs) → outputs, see :meth:`samlib.Objective.forward`. A module whose forward pass changes its buffers should
do so in the first gradient only: see :func:`samlib.optim.frozen_batch_statistics` for what comes after.

Reference: Springer, Nagarajan & Raghunathan (2024), arXiv:2405.20439.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .optim import sam_perturb

__all__ = ["PARTS", "PartialSAM", "confined", "gradient_part", "named_slices", "pullback", "remainder", "residuals"]

Forward = Callable[[Tensor, Tensor], Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]

PARTS = {
    "plain": (False, False),
    "weights": (True, False),
    "jacobian": (False, True),
    "sam": (True, True),
}
"""For each part, whether its residuals and whether its Jacobian are those of the perturbed point."""


def residuals(forward: Forward, loss: Loss, params: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
    """r = ∂ℓ/∂f, the derivative of the mean loss with respect to the outputs, in their shape.

    For the cross-entropy of n examples it is (p − y)/n, whose entry at the label is the example's weight 1 − p over −n.
    """
    with torch.no_grad():
        outputs = forward(params, inputs)
    with torch.enable_grad():
        outputs = outputs.requires_grad_()
        return torch.autograd.grad(loss(outputs, targets), outputs)[0]


def pullback(forward: Forward, params: Tensor, inputs: Tensor, cotangent: Tensor) -> Tensor:
    """Jᵀv, shape (P,), for v in the shape of the outputs: one forward and one backward pass."""
    with torch.enable_grad():
        w = params.detach().requires_grad_()
        return torch.autograd.grad(forward(w, inputs), w, cotangent)[0]


def gradient_part(
    part: str, forward: Forward, loss: Loss, params: Tensor, inputs: Tensor, targets: Tensor, perturbed: Tensor
) -> Tensor:
    """One part of SAM's gradient.

    Args:
        part: "plain", "weights", "jacobian" or "sam".
        forward: maps parameters (P,) and inputs to outputs.
        loss: maps outputs and targets to the mean loss.
        params: w, shape (P,).
        inputs: shape (n, …).
        targets: shape (n, …).
        perturbed: w̃, shape (P,).

    Returns:
        The gradient, shape (P,).

    Raises:
        ValueError: for an unknown part.

    >>> w, x, y = torch.tensor([1.0]), torch.tensor([1.0, 2.0]), torch.zeros(2)
    >>> cube, square = lambda w, x: w**3 * x, lambda f, y: (f - y).square().mean()
    >>> [gradient_part(part, cube, square, w, x, y, 2 * w).item() for part in PARTS]
    [15.0, 120.0, 60.0, 480.0]
    """
    if part not in PARTS:
        raise ValueError(f"part must be one of {', '.join(PARTS)}, got {part!r}")
    weights_from, jacobian_from = (perturbed if moved else params for moved in PARTS[part])
    r = residuals(forward, loss, weights_from, inputs, targets)
    return pullback(forward, jacobian_from, inputs, r)


def remainder(
    forward: Forward, loss: Loss, params: Tensor, inputs: Tensor, targets: Tensor, perturbed: Tensor
) -> Tensor:
    """(J̃ − J)ᵀ(r̃ − r), by which SAM's gradient exceeds weights + Jacobian − plain. Arguments as above."""
    r, r_perturbed = (residuals(forward, loss, w, inputs, targets) for w in (params, perturbed))
    here, there = (pullback(forward, w, inputs, r_perturbed - r) for w in (params, perturbed))
    return there - here


def confined(gradient: Tensor, slices: Sequence[slice]) -> Tensor:
    """A gradient (P,) with zeros outside some slices of the parameters, for a perturbation of these layers only.

    ``sam_perturb(params, confined(gradient, slices), rho)`` moves them by ρ, normalised by their own gradient.

    Raises:
        ValueError: without any slice.

    >>> confined(torch.arange(1.0, 5.0), [slice(0, 1), slice(3, 4)])
    tensor([1., 0., 0., 4.])
    """
    if not slices:
        raise ValueError("slices must name at least one part of the parameters, got none")
    kept = torch.zeros_like(gradient)
    for part in slices:
        kept[part] = gradient[part]
    return kept


class PartialSAM(torch.optim.Optimizer):
    """A base optimizer that steps with a part of SAM's gradient, or with SAM's from a perturbation of some layers.

    For one flat vector of parameters, and a closure that also knows the network: ``closure()`` sets the gradient and
    returns the loss; ``closure.outputs(params)`` are the network's outputs for the step's examples, with a graph;
    ``closure.loss(outputs)`` is their mean loss; ``closure.slices`` says where each named parameter lies. The
    laboratory's closures are of this kind.

    Args:
        params: the flat vector (P,), alone in a list.
        base_optimizer: an optimizer class; it receives ``kwargs``.
        part: of :data:`PARTS`.
        rho: radius of the perturbation.
        layers: beginnings of the names of the parameters that are perturbed; all by default.

    Raises:
        ValueError: for an unknown part, or layers that no parameter belongs to (at the first step).
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        base_optimizer: type[torch.optim.Optimizer] = torch.optim.SGD,
        part: str = "sam",
        rho: float = 0.05,
        layers: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        if part not in PARTS:
            raise ValueError(f"part must be one of {', '.join(PARTS)}, got {part!r}")
        super().__init__(params, {"rho": rho})
        self.part, self.layers = part, tuple(layers)
        self.base_optimizer = base_optimizer(self.param_groups, **kwargs)
        self.param_groups, self.state = self.base_optimizer.param_groups, self.base_optimizer.state

    def step(self, closure: Any = None) -> Any:
        """One step; see the class for what the closure must know."""
        if closure is None:
            raise TypeError("PartialSAM.step needs a closure that knows the network's outputs; see the class")
        loss = closure()
        [group] = self.param_groups
        [w] = group["params"]
        if group["rho"]:
            slices = named_slices(closure.slices, self.layers)
            gradient = confined(w.grad, slices) if slices else w.grad
            with torch.no_grad():
                perturbed = sam_perturb(w.detach(), gradient, group["rho"])
            if self.part == "sam":
                self._evaluate_at(perturbed, w, closure)
            else:
                about = (closure.outputs, closure.loss)
                w.grad = _part(self.part, *about, w.detach(), perturbed)
        self.base_optimizer.step()
        return loss

    @torch.no_grad()
    def _evaluate_at(self, perturbed: Tensor, w: Tensor, closure: Any) -> None:
        original = w.clone()
        try:
            w.copy_(perturbed)
            closure()
        finally:
            w.copy_(original)


def _part(part: str, outputs: Any, loss: Any, params: Tensor, perturbed: Tensor) -> Tensor:
    return gradient_part(
        part, lambda w, _: outputs(w), lambda f, _: loss(f), params, torch.empty(0), torch.empty(0), perturbed
    )


def named_slices(slices: Mapping[str, slice], layers: Sequence[str]) -> list[slice]:
    """Where the parameters lie whose names begin with one of these; an empty list for no names.

    Raises:
        ValueError: if no parameter's name begins so.

    >>> named_slices({"body.0.weight": slice(0, 6), "last.bias": slice(6, 7)}, ["last"])
    [slice(6, 7, None)]
    """
    chosen = []
    for layer in layers:
        found = [part for name, part in slices.items() if name == layer or name.startswith(f"{layer}.")]
        if not found:
            raise ValueError(f"layers must name parts of the network ({', '.join(slices)}), got {layer!r}")
        chosen += found
    return chosen
