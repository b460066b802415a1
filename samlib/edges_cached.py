"""Where SAM with a remembered perturbation stops being stable.

SAM moves uphill along a direction d before it takes its gradient u. Instead of computing d anew in every step, one may
take a true gradient every k steps only and, in between, hold it (β = 1) or use the previous step's u (β = 0). Along an
eigendirection of curvature λ, with m = 1 − ηλ and norms that stay constant:

* **Held.** Between two true gradients g, w + ρg/‖g‖ follows gradient descent. So k steps multiply the coordinate by
  1 − (1 − mᵏ)(1 + ρλ/‖g‖), which for k = 1 is :func:`samlib.growth_factor`.
* **Previous.** The coordinates of u obey u″ = (1 − ηλ + q) u′ − q u with q = ρλ/‖u‖.

These are laws of plain steps; for what lies between them none is known, see :func:`why_no_edge`. Every function takes
floats, NumPy arrays or tensors, as those of :mod:`samlib.edges` do; ``every`` is one number.

Source: derived here and checked on quadratics. The method is that of Wang et al. (2024), *GraphSAM*, arXiv:2406.13137.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from .broadcast import Real, arrays, check, namespace, result
from .edges import sam_edge

__all__ = ["held_cycle_radius", "held_edge", "previous_gradient_edge", "rotation_period", "why_no_edge"]

SELDOM = 50  # steps between true gradients from which on the law of β = 0 is within a tenth


def held_edge(grad_norm: Real, learning_rate: Real, rho: Real, every: float) -> Real:
    """Curvature above which SAM is unstable if it holds its direction for k steps.

    The smallest root λ of (1 − mᵏ)(1 + ρλ/‖g‖) = 2, with m = 1 − ηλ:

    * k = 1 is :func:`samlib.sam_edge`; other odd k have one root, below 2/η.
    * Even k have no root where ρ/(η‖g‖) is small (below 0.903, 0.749, 0.621, 0.532 for k = 2, 4, 10, 50). The edge is
      then 2/η, where mᵏ exceeds 1. Above a smallest root there is a second one, with stability from there to 2/η.
    * k → ∞ gives ‖g‖/ρ where that is below 2/η.
    * For k > 1, ηλ ≤ 1 exactly if ρ ≥ η‖g‖.

    Args:
        grad_norm: ‖g‖ ≥ 0, the norm of the last *true* gradient, at the unperturbed parameters.
        learning_rate: step size η > 0.
        rho: radius ρ ≥ 0 of the perturbation, in parameter units. Zero gives 2/η.
        every: number k ≥ 1 of steps from one true gradient to the next; infinity for a direction never renewed.

    Returns:
        The edge, in the broadcast shape of the arguments. A NaN gradient norm gives NaN.

    Raises:
        ValueError: if an argument is out of range.

    Source: see the module's description.

    >>> [round(held_edge(1.0, 0.5, 1.0, k), 4) for k in (1, 2, 10)]
    [1.5616, 1.2892, 1.0019]
    >>> held_edge(1.0, 0.5, 0.1, 10)  # there is no root: gradient descent's edge
    4.0
    """
    sam = sam_edge(grad_norm, learning_rate, rho)
    if (k := _whole(every)) == 1:
        return sam
    g, eta, radius, sam = arrays(grad_norm, learning_rate, rho, sam)
    xp = namespace(sam)
    # In x = ηλ: (1 − mᵏ)(a + ρx) = 2a with a = η‖g‖.
    a, one = eta * g, xp.ones_like(sam)
    short = (radius < a) | (radius == 0)

    def below(x: Any) -> Any:
        return _approach(x, k, xp) * (a + radius * x) < 2 * a

    def rising(x: Any) -> Any:
        y = x - 1
        return radius * (1 - y**k) > k * y ** (k - 1) * (a + radius + radius * y)

    if k == math.inf:
        x = a / xp.where(radius == 0, one, radius)
        x = xp.where(x < 2, x, 2 * one)
    else:
        # For ρ ≥ a the root lies between that of kx(a + ρx) = 2a and SAM's, as m ≥ mᵏ ≥ 1 − kx for x ≤ 1.
        root = xp.sqrt(a)
        least = 4 * root / xp.where(short, one, k * root + xp.sqrt(k * (k * a + 8 * radius)))
        most = 2 * one if k % 2 else _bisect(rising, one, 2 * one, xp)
        low, high = xp.where(short, one, least), xp.where(short, most, eta * sam)
        x = xp.where(short & below(high), 2 * one, _bisect(below, low, high, xp))
    x = xp.where(radius == 0, 2 * one, x)
    return result(xp.where(g == g, x, g) / eta)


def held_cycle_radius(curvature: Real, learning_rate: Real, rho: Real, every: float) -> Real:
    """Distance ρ(1 − mᵏ)/(1 + mᵏ) from a quadratic's minimum at which SAM with a held direction cycles.

    It is the distance at the true gradients; the cycle has period 2k. There ‖g‖ = λ · radius, which puts λ on a root
    of :func:`held_edge`'s equation although λ never moves. For ηλ > 1 the distance is larger in between. For k = 1 it
    is :func:`samlib.two_cycle_radius`.

    Args:
        curvature: eigenvalue 0 < λ < 2/η.
        learning_rate: step size η > 0.
        rho: radius ρ ≥ 0.
        every: number k ≥ 1 of steps from one true gradient to the next; infinity for a direction never renewed.

    Returns:
        The distance, in parameter units.

    Raises:
        ValueError: if λ is not within (0, 2/η), where there is no cycle, or another argument is out of range.

    Source: see the module's description.

    >>> round(held_cycle_radius(2.0, 0.25, 0.1, 2), 6)
    0.06
    """
    check("learning_rate", learning_rate, positive=True)
    check("rho", rho)
    check("curvature", curvature, positive=True)
    k = _whole(every)
    lam, eta, radius = arrays(curvature, learning_rate, rho)
    if not bool((eta * lam < 2).all()):
        raise ValueError(f"curvature must lie below 2/learning_rate for a cycle to exist, got {curvature!r}")
    xp = namespace(lam)
    approach = xp.ones_like(lam) if k == math.inf else _approach(eta * lam, k, xp)
    return result(radius * approach / (2 - approach))


def previous_gradient_edge(update_norm: Real, learning_rate: Real, rho: Real) -> Real:
    """Curvature above which SAM is unstable if it moves along the gradient that the step before descended on.

    ‖u‖/ρ, whatever the step size, where η‖u‖ ≤ 4ρ: the iterate begins to rotate, with :func:`rotation_period`. Else
    2‖u‖/(η‖u‖ − 2ρ), where it flips in every step. A true gradient every k steps moves the edge by less than a tenth
    from k = 50 on.

    Args:
        update_norm: ‖u‖ ≥ 0, the norm of the gradient that the steps descend on. It must stay about constant; on a
            bare quadratic of few dimensions it oscillates itself, and the law does not hold.
        learning_rate: step size η > 0.
        rho: radius ρ ≥ 0 of the perturbation, in parameter units. Zero gives 2/η.

    Returns:
        The edge, in the broadcast shape of the arguments. A NaN norm gives NaN.

    Raises:
        ValueError: if an argument is out of range.

    Source: see the module's description.

    >>> previous_gradient_edge(1.0, 0.5, 0.25)  # rotates
    4.0
    >>> previous_gradient_edge(1.0, 0.5, 0.1)  # flips
    6.666666666666667
    """
    check("learning_rate", learning_rate, positive=True)
    check("rho", rho)
    check("update_norm", update_norm, allow_nan=True)
    u, eta, radius = arrays(update_norm, learning_rate, rho)
    xp = namespace(u)
    a, one = eta * u, xp.ones_like(u)
    flips = (a > 4 * radius) | (radius == 0)
    turn = a / xp.where(flips, one, radius)
    flip = 2 / (1 - 2 * xp.where(flips, radius, one * 0) / xp.where(a > 0, a, one))
    return result(xp.where(u == u, xp.where(flips, flip, turn), u) / eta)


def rotation_period(curvature: Real, learning_rate: Real) -> Real:
    """Steps 2π/arccos(1 − ηλ/2) that one turn takes at the edge ‖u‖/ρ of :func:`previous_gradient_edge`.

    Args:
        curvature: 0 < λ ≤ 4/η.
        learning_rate: step size η > 0.

    Returns:
        The period, at least 2.

    Raises:
        ValueError: if an argument is out of range.

    Source: see the module's description.

    >>> round(rotation_period(2.0, 0.5), 12)
    6.0
    """
    check("learning_rate", learning_rate, positive=True)
    check("curvature", curvature, positive=True)
    lam, eta = arrays(curvature, learning_rate)
    if not bool((eta * lam <= 4).all()):
        raise ValueError(f"curvature must be at most 4/learning_rate, beyond which steps flip, got {curvature!r}")
    xp = namespace(lam)
    x = eta * lam
    return result(math.pi / xp.arctan2(xp.sqrt(x), xp.sqrt(4 - x)))  # arccos(1 − x/2)/2, without cancellation


def why_no_edge(every: float, beta: float) -> str | None:
    """Why no edge is known for a direction renewed every k steps and averaged with β, or None where one is.

    Known are: k = 1, where β has no effect (:func:`samlib.sam_edge`); β = 1 (:func:`held_edge`); β = 0 with k ≥ 50
    (:func:`previous_gradient_edge`). All are for plain steps: momentum, Adam and weight decay have none.

    Args:
        every: number k ≥ 1 of steps from one true gradient to the next; infinity for "never again".
        beta: weight 0 ≤ β ≤ 1 of the stored direction in the average.

    Raises:
        ValueError: if an argument is out of range.

    >>> why_no_edge(10, 1.0) is None
    True
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must lie within [0, 1], got {beta!r}")
    if (k := _whole(every)) == 1 or beta == 1 or (beta == 0 and k >= SELDOM):
        return None
    if beta == 0:
        return f"with a true gradient more often than every {SELDOM} steps, the edge depends on when the cycle ends"
    return "for 0 < beta < 1 the edge depends on the norm of the stored average, which follows no law of its own"


def _whole(every: float) -> float:
    """k as an integer, or infinity."""
    if every != math.inf and not (every >= 1 and every == int(every)):
        raise ValueError(f"every must be a whole number of at least 1, or infinity, got {every!r}")
    return every if every == math.inf else int(every)


def _approach(x: Any, k: float, xp: Any) -> Any:
    """1 − (1 − x)ᵏ, without cancellation for small x."""
    return xp.where(x < 0.5, -xp.expm1(k * xp.log1p(-xp.clip(x, None, 0.5))), 1 - (1 - x) ** k)


def _bisect(is_left: Callable[[Any], Any], low: Any, high: Any, xp: Any) -> Any:
    """Where a condition that holds on the left ceases to hold."""
    for _ in range(100):  # the bracket's ends differ by a factor of at most k
        middle = (low + high) / 2
        left = is_left(middle)
        low, high = xp.where(left, middle, low), xp.where(left, high, middle)
    return (low + high) / 2
