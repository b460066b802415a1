"""The updates of the paper and of its kin as pure functions of a flat vector: for theory, and as oracles in tests."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .precision import norm

__all__ = [
    "ASAM_EPSILON",
    "EPSILON",
    "asam_perturb",
    "gd_step",
    "graphsam_step",
    "sam_perturb",
    "sam_step",
    "usam_step",
]

EPSILON = 1e-5  # added to ‖g‖ in SAM's normaliser, as in the reference code
ASAM_EPSILON = 0.01  # added to |w| in ASAM's scaling, as in its authors' code: weights at zero move too

Gradient = Callable[[Tensor], Tensor]


def gd_step(gradient: Gradient, params: Tensor, learning_rate: float) -> Tensor:
    """w − η ∇ℓ(w).

    Args:
        gradient: maps parameters (P,) to the gradient (P,).
        params: w, shape (P,).
        learning_rate: step size η.
    """
    return params - learning_rate * gradient(params)


def sam_step(gradient: Gradient, params: Tensor, learning_rate: float, rho: float) -> Tensor:
    """w − η ∇ℓ(w + ρ ∇ℓ(w)/‖∇ℓ(w)‖); for ρ = 0 exactly :func:`gd_step`, at the price of one gradient.

    Args:
        gradient: maps parameters (P,) to the gradient (P,).
        params: w, shape (P,).
        learning_rate: step size η.
        rho: radius ρ of the perturbation, in parameter units.

    Source: Foret et al. (2021), arXiv:2010.01412, equation 4; Long & Bartlett (2024), section 1.
    """
    if rho == 0:
        return gd_step(gradient, params, learning_rate)
    uphill = sam_perturb(params, gradient(params), rho)
    return params - learning_rate * gradient(uphill)


def sam_perturb(params: Tensor, grad: Tensor, rho: float) -> Tensor:
    """w + ρ g/(‖g‖ + 1e-5), the point at which SAM takes its gradient."""
    return params + (rho / (norm(grad) + EPSILON)).to(grad.dtype) * grad


def usam_step(gradient: Gradient, params: Tensor, learning_rate: float, rho: float) -> Tensor:
    """w − η ∇ℓ(w + ρ ∇ℓ(w)): SAM without the normaliser. Arguments as for :func:`sam_step`.

    Source: Agarwala & Dauphin (2023), arXiv:2302.08692.
    """
    return params - learning_rate * gradient(params + rho * gradient(params))


def asam_perturb(params: Tensor, grad: Tensor, rho: float) -> Tensor:
    """w + ρ T²g/(‖T g‖ + 1e-5) with T = |w| + 0.01, the point at which adaptive SAM takes its gradient.

    Source: Kwon et al. (2021), arXiv:2102.11600.
    """
    scaling = params.abs() + ASAM_EPSILON
    return params + rho * scaling * (scaling * grad) / (norm(scaling * grad) + EPSILON).to(grad.dtype)


def graphsam_step(
    gradient: Gradient, params: Tensor, learning_rate: float, rho: float, beta: float, direction: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """w − η u with u = ∇ℓ(w + ρ d/(‖d‖ + 1e-5)), and the next direction β d/‖d‖ + (1 − β) u/‖u‖.

    Args:
        gradient: maps parameters (P,) to the gradient (P,).
        params: w, shape (P,).
        learning_rate: step size η.
        rho: radius ρ of the perturbation, in parameter units.
        beta: β in [0, 1]; at 1 the direction is held as it is, as it also is where u is zero.
        direction: d of the step before; without one d = ∇ℓ(w), a second gradient.

    Returns:
        The parameters after the step, and the direction for the next one.

    Source: Wang et al. (2024), arXiv:2406.13137, after its public code.
    """
    direction = gradient(params) if direction is None else direction
    descent = gradient(sam_perturb(params, direction, rho))
    after = params - learning_rate * descent
    if beta == 1 or not descent.any():
        return after, direction
    return after, beta * _unit(direction) + (1 - beta) * _unit(descent)


def _unit(vector: Tensor) -> Tensor:
    return vector / norm(vector).to(vector.dtype) if vector.any() else vector
