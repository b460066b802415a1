"""The theory: where update rules stop being stable, in closed form.

The *edge* is the curvature λ at which the effective curvature a(λ) that a rule sees along an eigendirection reaches
c/η, the most that its base stands: η a(λ) = c. :mod:`samlib.stability` explains a, c and the ways of weight decay. For
gradient descent a = λ and c = 2; for SAM a = λ (1 + ρ λ/‖g‖). Lengths are in parameter units, curvatures in loss per
parameter², so that η λ has no unit.

Every function takes floats, NumPy arrays or tensors, broadcasts them, and returns a float if all were scalars. Which
edge an optimizer has, with the settings that it holds, says :func:`samlib.laws.edge_law`.

References: Long & Bartlett (2024), *Sharpness-Aware Minimization and the Edge of Stability*, arXiv:2309.12488; Cohen et
al. (2021), arXiv:2103.00065, for momentum; Cohen et al. (2022), arXiv:2207.14484, for Adam; Agarwala & Dauphin (2023),
arXiv:2302.08692, for unnormalised SAM. Their combinations follow by inserting a; see the page of rules in the book.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .broadcast import Real, array, arrays, check, namespace, result
from .elsewhere import elsewhere
from .stability import Decay, check_decay, stability_limit

__all__ = [
    "adam_edge",
    "frobenius_noise_kernel",
    "gd_edge",
    "momentum_edge",
    "sam_edge",
    "sam_negative_range",
    "stale_edge",
    "usam_edge",
]

__getattr__ = elsewhere(__name__, dict.fromkeys(("held_edge", "previous_gradient_edge"), "edges_cached"))


def gd_edge(learning_rate: Real) -> Real:
    """Curvature 2/η above which gradient descent is unstable.

    Args:
        learning_rate: step size η > 0.

    Returns:
        2/η, in the shape of ``learning_rate``.

    Raises:
        ValueError: if a learning rate is not a positive finite number.

    Source: Cohen et al. (2021), arXiv:2103.00065, section 1.

    >>> gd_edge(0.5)
    4.0
    """
    check("learning_rate", learning_rate, positive=True)
    return result(2 / array(learning_rate))


def momentum_edge(
    learning_rate: Real,
    momentum: Real,
    *,
    dampening: Real = 0.0,
    nesterov: bool = False,
    weight_decay: Real = 0.0,
    decay: Decay = "step",
) -> Real:
    """Curvature c/η − δ, or c(1/η − δ/2) with decoupled decay, above which a base is unstable.

    Args:
        learning_rate: step size η > 0.
        momentum, dampening, nesterov: as for :func:`stability_limit`, which gives c.
        weight_decay: δ ≥ 0.
        decay: how δ enters, see :mod:`samlib.stability`.

    Returns:
        The edge, in the broadcast shape of the arguments.

    Raises:
        ValueError: if an argument is out of range, or the decay alone is unstable.

    Source: Cohen et al. (2021), arXiv:2103.00065, section 2.

    >>> momentum_edge(0.5, 0.5), momentum_edge(0.5, 0.5, nesterov=True), momentum_edge(0.5, 0.5, weight_decay=1.0)
    (6.0, 3.0, 5.0)
    """
    limit = stability_limit(momentum, dampening=dampening, nesterov=nesterov)
    return sam_edge(1.0, learning_rate, 0.0, limit=limit, weight_decay=weight_decay, decay=decay)


def adam_edge(learning_rate: Real, beta1: Real = 0.9, *, weight_decay: Real = 0.0) -> Real:
    """The largest eigenvalue of P^-½ H P^-½ at which Adam with the preconditioner P = √v̂ + ε held fixed is stable.

    (2 + 2β₁)/((1 − β₁)η), which is 38/η at β₁ = 0.9; with AdamW's decay (2 + 2β₁)(1/η − δ/2)/(1 − β₁). It holds when
    many more than 1/(1 − β₁) steps are taken; after t steps it is about 1 − β₁ᵗ of that, as Adam corrects its average.

    Args:
        learning_rate: step size η > 0.
        beta1: β₁ in [0, 1), of the average of gradients.
        weight_decay: AdamW's decoupled decay δ ≥ 0. The L2 decay of ``torch.optim.Adam`` is no shift of the edge: with
            it, the edge is that of P^-½ (H + δ) P^-½.

    Returns:
        The edge of the preconditioned Hessian, in the broadcast shape of the arguments.

    Raises:
        ValueError: if an argument is out of range, or the decay alone is unstable.

    Source: Cohen et al. (2022), arXiv:2207.14484.

    >>> adam_edge(0.5, 0.5)
    12.0
    """
    check("beta1", beta1, below=1)
    return momentum_edge(learning_rate, beta1, dampening=beta1, weight_decay=weight_decay, decay="decoupled")


def sam_edge(
    grad_norm: Real,
    learning_rate: Real,
    rho: Real,
    *,
    limit: Real = 2.0,
    weight_decay: Real = 0.0,
    decay: Decay = "step",
) -> Real:
    """Curvature above which SAM is unstable at a given gradient norm.

    The positive root λ of η λ (1 + ρ λ/‖g‖) = 2:

        sam_edge = ‖g‖/(2ρ) · (√(1 + 8ρ/(η‖g‖)) − 1)

    evaluated as (4/η) · √‖g‖ / (√‖g‖ + √(‖g‖ + 8ρ/η)), which cancels nowhere. It grows with ‖g‖ from 0 to 2/η. With
    another base or weight decay, c − ηδ takes the place of 2.

    Args:
        grad_norm: ‖g‖ ≥ 0, the norm of the gradient at the unperturbed parameters; more exactly what the code divides
            by, which is ‖g‖ + 1e-5 in :class:`samlib.SAM`. With ``decay="perturbation"`` it is ‖g + δw‖.
        learning_rate: step size η > 0.
        rho: radius ρ ≥ 0 of SAM's perturbation. Zero gives the base's own edge, here :func:`gd_edge`.
        limit: the base's c > 0, from :func:`stability_limit`.
        weight_decay: δ ≥ 0.
        decay: how δ enters, see :mod:`samlib.stability`.

    Returns:
        The edge, in the broadcast shape of the arguments. A NaN gradient norm gives NaN.

    Raises:
        ValueError: if an argument is out of range, or the decay alone is unstable.

    Source: Long & Bartlett (2024), the SAM edge of section 2.

    >>> round(sam_edge(1.0, 0.5, 0.25), 9)
    2.472135955
    >>> sam_edge(1.0, 0.5, 0.0)
    4.0
    >>> sam_edge(1.0, 0.5, 0.25, limit=3.0) > sam_edge(1.0, 0.5, 0.25)
    True
    """
    check("learning_rate", learning_rate, positive=True)
    check("rho", rho)
    check("grad_norm", grad_norm, allow_nan=True)
    check("limit", limit, positive=True)
    check("weight_decay", weight_decay)
    g, eta, radius, c, delta = arrays(grad_norm, learning_rate, rho, limit, weight_decay)
    net = _net(c, eta, delta, decay)
    xp = namespace(g)
    if decay == "perturbation":  # λ(1 + sδ + sλ) = net/η with s = ρ/‖g‖: SAM's own equation for other ‖g‖ and net
        g, before = g + radius * delta, g
        net = net * xp.where(g == 0, xp.ones_like(g), before / xp.where(g == 0, xp.ones_like(g), g))
    root = xp.sqrt(g)
    # At ‖g‖ = ρ = 0 the quotient is 0/0; the limit ρ → 0 taken first is the base's edge.
    below = xp.where(radius == 0, xp.ones_like(radius), root + xp.sqrt(g + 4 * radius * net / eta))
    return result(xp.where((radius == 0) & (g == g), net / eta, 2 * net / eta * root / below))


def usam_edge(
    learning_rate: Real, rho: Real, *, limit: Real = 2.0, weight_decay: Real = 0.0, decay: Decay = "step"
) -> Real:
    """Curvature above which unnormalised SAM, w ← w − η ∇ℓ(w + ρ ∇ℓ(w)), is unstable, whatever the gradient.

    The positive root λ of η λ (1 + ρ λ) = 2, which is :func:`sam_edge` at ‖g‖ = 1.

    Args:
        learning_rate: step size η > 0.
        rho: ρ ≥ 0, in parameters² per loss; zero gives the base's own edge.
        limit, weight_decay, decay: as for :func:`sam_edge`.

    Returns:
        The edge, in the broadcast shape of the arguments.

    Raises:
        ValueError: if an argument is out of range, or the decay alone is unstable.

    Source: Agarwala & Dauphin (2023), arXiv:2302.08692.

    >>> round(usam_edge(0.5, 0.25), 9)
    2.472135955
    """
    return sam_edge(1.0, learning_rate, rho, limit=limit, weight_decay=weight_decay, decay=decay)


def sam_negative_range(grad_norm: Real, learning_rate: Real, rho: Real, *, limit: Real = 2.0) -> tuple[Real, Real]:
    """The range of |λ| in which SAM is stable although λ < 0.

    There SAM's effective curvature −|λ|(1 − ρ|λ|/‖g‖) is positive: from ‖g‖/ρ to ‖g‖/(2ρ)·(√(1 + 4ρc/(η‖g‖)) + 1), with
    c the base's limit, 2 without momentum. Directions of smaller |λ| grow, as under gradient descent, only slower.

    Args:
        grad_norm: ‖g‖ ≥ 0; 1 for unnormalised SAM.
        learning_rate: step size η > 0.
        rho: radius ρ ≥ 0; at zero both ends are infinite, the range is empty.
        limit: the base's c > 0, from :func:`stability_limit`.

    Returns:
        The two ends, as magnitudes.

    Raises:
        ValueError: if an argument is out of range.

    Source: the quadratic of :func:`sam_edge`; see the page of rules in the book.

    >>> sam_negative_range(1.0, 0.5, 0.5)
    (2.0, 4.0)
    """
    check("learning_rate", learning_rate, positive=True)
    check("rho", rho)
    check("grad_norm", grad_norm, allow_nan=True)
    check("limit", limit, positive=True)
    g, eta, radius, c = arrays(grad_norm, learning_rate, rho, limit)
    xp = namespace(g)
    safe = xp.where(radius == 0, xp.ones_like(radius), radius)
    ends = g / safe, xp.sqrt(g) * (xp.sqrt(g) + xp.sqrt(g + 4 * radius * c / eta)) / (2 * safe)
    low, high = (result(xp.where(radius == 0, xp.full_like(end, float("inf")), end)) for end in ends)
    return low, high


def stale_edge(grad_norm: Real, learning_rate: Real, rho: Real) -> Real:
    """Curvature above which SAM is unstable when it perturbs along the gradient of the step *before*.

    The step w ← w − η ∇ℓ(w + ρ g₋/‖g₋‖), with g₋ the gradient at the last w, has the roots of
    z² − (1 − ηλ) z + ηλ·ρλ/‖g‖ = 0. They leave the unit circle turning, at λ = √(‖g‖/(ηρ)) with the period
    2π/arccos((1 − ηλ)/2), unless η‖g‖ > 9ρ: then by a flip, z = −1, at ηλ(1 − ρλ/‖g‖) = 2. Not to be taken for
    :func:`sam_edge`: it can lie close by.

    Args:
        grad_norm: ‖g‖ ≥ 0.
        learning_rate: step size η > 0.
        rho: radius ρ ≥ 0; zero gives :func:`gd_edge`.

    Returns:
        The edge, whichever comes first, in the broadcast shape of the arguments.

    Raises:
        ValueError: if an argument is out of range.

    Source: the stability of a quadratic map; see the page of rules in the book.

    >>> stale_edge(0.25, 0.5, 0.5), round(stale_edge(9.0, 0.5, 0.25), 9)
    (1.0, 4.583592135)
    """
    check("learning_rate", learning_rate, positive=True)
    check("rho", rho)
    check("grad_norm", grad_norm, allow_nan=True)
    g, eta, radius = arrays(grad_norm, learning_rate, rho)
    xp = namespace(g)
    flips = (eta * g > 9 * radius) | (radius == 0)
    turning = xp.sqrt(g / (eta * xp.where(radius == 0, xp.ones_like(radius), radius)))
    share = xp.where(flips, 8 * radius / (eta * xp.where(g == 0, xp.ones_like(g), g)), xp.zeros_like(g))
    return result(xp.where(flips, 4 / (eta * (1 + xp.sqrt(1 - share))), turning))


def frobenius_noise_kernel(eigenvalues: Real, learning_rate: float, strength: float, samples: int) -> float:
    """K of plain Frobenius-SAM with n directions on a quadratic, at small ρ: unstable in mean square unless K < 1.

    The mean squares E of the eigen-coordinates follow E_i' = a_i E_i + v_i Σ_j λ_j² E_j with

        v_i = (η s λ_i)²/(n − 1),   a_i = (1 − η λ_i (1 + s λ_i))² + v_i λ_i²,   K = Σ_i λ_i² v_i/(1 − a_i)

    for strength s. Directions with λ = 0 are left out. In the mean the rule is stable up to ``sam_edge(1, η, s)``.

    Args:
        eigenvalues: all λ that matter, any shape.
        learning_rate: step size η > 0.
        strength: s ≥ 0.
        samples: n ≥ 2.

    Returns:
        K, infinite if some a_i ≥ 1.

    Raises:
        ValueError: if an argument is out of range.

    Source: derived on the page of the universal class; checked against the simulated rule.

    >>> round(frobenius_noise_kernel([4.0, 1.0], 0.1, 0.3, 2), 3)
    0.309
    """
    check("learning_rate", learning_rate, positive=True)
    check("strength", strength)
    if not samples >= 2 or samples != int(samples):
        raise ValueError(f"samples must be a whole number, at least 2, got {samples!r}")
    lam = np.asarray(eigenvalues, dtype=np.float64).ravel()
    if not np.isfinite(lam).all():
        raise ValueError(f"eigenvalues must be finite, got {lam.tolist()}")
    size = np.abs(lam)
    lam = lam[size > len(lam) * np.finfo(np.float64).eps * size.max(initial=0.0)]  # zero but for rounding
    v = (learning_rate * strength * lam) ** 2 / (samples - 1)
    a = (1 - learning_rate * lam * (1 + strength * lam)) ** 2 + v * lam**2
    return float((lam**2 * v / (1 - a)).sum()) if bool((a < 1).all()) else float("inf")


def _net(limit: Any, eta: Any, delta: Any, decay: str) -> Any:
    """What decay leaves of the base's limit: c − ηδ, or c(1 − ηδ/2)."""
    check_decay(decay)
    net = limit * (1 - eta * delta / 2) if decay == "decoupled" else limit - eta * delta
    if not bool((net > 0).all()):
        most = "2/learning_rate" if decay == "decoupled" else "limit/learning_rate"
        raise ValueError(
            f"weight_decay must be below {most}, beyond which no curvature is stable, got {delta.tolist()}"
        )
    return net
