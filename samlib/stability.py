"""One step on a quadratic, along an eigendirection: by what it multiplies the coordinate, and until when it is stable.

In an eigendirection of curvature λ a rule sees the gradient a x of the coordinate x, with the *effective curvature* a:
λ for gradient descent, λ (1 + ρ λ/‖g‖) for SAM, λ (1 + ρ λ) for unnormalised SAM. The base that steps with it is stable
while 0 < η a < c, where c is its :func:`stability_limit`: 2 without momentum. The curvature at which η a = c is the
edge, see :mod:`samlib.edges`. Weight decay δ enters in one of three ways (:data:`Decay`):

* ``"step"``: L2 as in ``torch.optim.SGD``. The gradient that steps has a + δ; SAM's perturbation knows nothing of it.
* ``"perturbation"``: it turns the perturbation too, a = λ (1 + ρ (λ + δ)/‖g + δw‖) + δ. Without SAM as ``"step"``.
* ``"decoupled"``: as in AdamW, the weights shrink by 1 − ηδ beside the step, which leaves c (1 − ηδ/2) of c.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, get_args

from .broadcast import Real, arrays, check, namespace, result

__all__ = [
    "Decay",
    "check_decay",
    "effective_curvature",
    "growth_factor",
    "spectral_radius",
    "stability_limit",
    "two_cycle_radius",
]

Decay: TypeAlias = Literal["step", "perturbation", "decoupled"]


def effective_curvature(curvature: Real, grad_norm: Real, rho: Real) -> Real:
    """λ(1 + ρλ/‖g‖), the curvature that a base sees through SAM in an eigendirection.

    Args:
        curvature: eigenvalue λ of the Hessian.
        grad_norm: ‖g‖ > 0; 1 gives unnormalised SAM.
        rho: radius ρ ≥ 0; zero gives λ.

    Returns:
        The effective curvature a, in the broadcast shape of the arguments.

    Raises:
        ValueError: if an argument is out of range.

    Source: Long & Bartlett (2024), section 2.

    >>> effective_curvature(4.0, 1.0, 0.5)
    12.0
    """
    check("rho", rho)
    check("grad_norm", grad_norm, positive=True)
    lam, g, radius = arrays(curvature, grad_norm, rho)
    return result(lam * (1 + radius * lam / g))


def growth_factor(curvature: Real, grad_norm: Real, learning_rate: Real, rho: Real) -> Real:
    """The factor 1 − η λ (1 + ρ λ/‖g‖) by which a SAM step multiplies an eigen-coordinate of a quadratic.

    Args:
        curvature: eigenvalue λ of the Hessian.
        grad_norm: ‖g‖ > 0.
        learning_rate: step size η > 0.
        rho: radius ρ ≥ 0; zero gives gradient descent's 1 − η λ.

    Returns:
        The factor; the step is stable while it lies within (−1, 1).

    Raises:
        ValueError: if an argument is out of range.

    Source: Long & Bartlett (2024), section 2.

    >>> growth_factor(4.0, 1.0, 0.5, 0.0)
    -1.0
    """
    check("learning_rate", learning_rate, positive=True)
    check("rho", rho)
    check("grad_norm", grad_norm, positive=True)
    lam, g, eta, radius = arrays(curvature, grad_norm, learning_rate, rho)
    return result(1 - eta * lam * (1 + radius * lam / g))


def stability_limit(momentum: Real = 0.0, *, dampening: Real = 0.0, nesterov: bool = False) -> Real:
    """The c of a base: a direction of effective curvature a is stable while 0 < η a < c.

    2 without momentum, (2 + 2β)/(1 − dampening) for the heavy ball, (2 + 2β)/(1 + 2β) for Nesterov's momentum, both in
    the form of ``torch.optim.SGD``. Adam with a frozen preconditioner is a heavy ball with dampening β₁.

    Args:
        momentum: β in [0, 1).
        dampening: in [0, 1). Ignored where β = 0, as PyTorch does.
        nesterov: Nesterov's momentum, which takes no dampening.

    Returns:
        c, without unit.

    Raises:
        ValueError: if an argument is out of range, or Nesterov's momentum is dampened.

    Source: Cohen et al. (2021), arXiv:2103.00065, section 2.

    >>> stability_limit(0.5), stability_limit(0.5, nesterov=True)
    (3.0, 1.5)
    """
    beta, damp = _base(momentum, dampening, nesterov)
    return result((2 + 2 * beta) / (1 + 2 * beta if nesterov else 1 - damp))


def spectral_radius(
    effective_curvature: Real,
    learning_rate: Real,
    momentum: Real = 0.0,
    *,
    dampening: Real = 0.0,
    nesterov: bool = False,
    weight_decay: Real = 0.0,
    decay: Decay = "step",
) -> Real:
    """The factor by which a base's step multiplies an eigen-coordinate of a quadratic in the long run.

    The largest modulus of the roots of z² − t z + d, with the trace t and determinant d of the step's map of coordinate
    and momentum: κ + β − η(1 − dampening)a and βκ for the heavy ball, κ + β − η(1 + β)a and β(κ − ηa) for Nesterov's
    momentum; κ is 1, or 1 − ηδ with decoupled decay, and a includes δ otherwise. Stable is what stays below 1.

    Args:
        effective_curvature: a, without decay: λ, or :func:`effective_curvature` for SAM.
        learning_rate: step size η > 0.
        momentum, dampening, nesterov: as for :func:`stability_limit`.
        weight_decay: δ ≥ 0.
        decay: how δ enters the step, see the top of this module.

    Returns:
        The spectral radius, in the broadcast shape of the arguments.

    Raises:
        ValueError: if an argument is out of range.

    Source: Cohen et al. (2021), arXiv:2103.00065, section 2.

    >>> spectral_radius(5.0, 0.5), spectral_radius(6.0, 0.5, 0.5), spectral_radius(4.0, 0.5, 0.25)
    (1.5, 1.0, 0.5)
    """
    check("learning_rate", learning_rate, positive=True)
    check("weight_decay", weight_decay)
    check_decay(decay)
    beta, damp = _base(momentum, dampening, nesterov)
    a, eta, delta, beta, damp = arrays(effective_curvature, learning_rate, weight_decay, beta, damp)
    xp = namespace(a)
    kept, stepped = (1 - eta * delta, eta * a) if decay == "decoupled" else (xp.ones_like(a), eta * (a + delta))
    trace = kept + beta - stepped * (1 + beta if nesterov else 1 - damp)
    determinant = beta * (kept - stepped if nesterov else kept)
    square = trace * trace / 4 - determinant
    real = xp.abs(trace) / 2 + xp.sqrt(xp.where(square > 0, square, xp.zeros_like(square)))
    turning = xp.sqrt(xp.where(square < 0, determinant, xp.zeros_like(square)))
    return result(xp.where(square < 0, turning, real))


def two_cycle_radius(curvature: Real, learning_rate: Real, rho: Real, *, limit: Real = 2.0) -> Real:
    """Distance η λ ρ/(2 − η λ) from the minimum at which SAM on a quadratic alternates between two points.

    There ‖g‖ = λ · radius, hence ``sam_edge(‖g‖, η, ρ) = λ`` exactly, although λ never moves. With momentum the base's
    c takes the place of 2, and cycles of other periods exist beside this one.

    Args:
        curvature: eigenvalue 0 < λ < c/η.
        learning_rate: step size η > 0.
        rho: radius ρ ≥ 0.
        limit: the base's c > 0, from :func:`stability_limit`.

    Returns:
        The distance, in parameter units.

    Raises:
        ValueError: if λ is not within (0, c/η): there is no cycle then.

    Source: Bartlett, Long & Bousquet (2023), arXiv:2210.01513, and the pages of theory and rules in the book.

    >>> two_cycle_radius(2.0, 0.5, 0.1)
    0.1
    """
    check("learning_rate", learning_rate, positive=True)
    check("rho", rho)
    check("curvature", curvature, positive=True)
    check("limit", limit, positive=True)
    lam, eta, radius, c = arrays(curvature, learning_rate, rho, limit)
    if not bool((eta * lam < c).all()):
        raise ValueError(f"curvature must lie below limit/learning_rate for a 2-cycle to exist, got {curvature!r}")
    return result(eta * lam * radius / (c - eta * lam))


def check_decay(decay: str) -> None:
    """Refuse what is not a :data:`Decay`."""
    if decay not in get_args(Decay):
        raise ValueError(f"decay must be one of {', '.join(map(repr, get_args(Decay)))}, got {decay!r}")


def _base(momentum: Any, dampening: Any, nesterov: bool) -> tuple[Any, Any]:
    """β and the dampening that takes effect, checked as PyTorch's SGD does."""
    check("momentum", momentum, below=1)
    check("dampening", dampening, below=1)
    beta, damp = arrays(momentum, dampening)
    damp = damp * (beta != 0)
    if nesterov and bool((damp != 0).any()):
        raise ValueError(f"dampening must be 0 with nesterov=True, as in PyTorch's SGD, got {dampening!r}")
    return beta, damp
