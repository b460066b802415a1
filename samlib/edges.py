"""The theory: where gradient descent and SAM stop being stable.

On a quadratic, in an eigendirection of curvature λ, one step of SAM multiplies the coordinate by
``1 − η λ (1 + ρ λ/‖g‖)``. The *edge* is the curvature at which this factor reaches −1. Lengths are in parameter
units, curvatures in loss per parameter², so that η λ has no unit.

Every function takes floats, NumPy arrays or tensors, broadcasts them, and returns a float if all were scalars.

Reference: Long & Bartlett (2024), *Sharpness-Aware Minimization and the Edge of Stability*, arXiv:2309.12488.
"""

from __future__ import annotations

import functools
import sys
from typing import Any, TypeAlias

import numpy as np

__all__ = ["frobenius_noise_kernel", "gd_edge", "growth_factor", "sam_edge", "two_cycle_radius"]

Real: TypeAlias = Any  # float, NumPy array or tensor


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
    _check("learning_rate", learning_rate, positive=True)
    return _result(2 / _array(learning_rate))


def sam_edge(grad_norm: Real, learning_rate: Real, rho: Real) -> Real:
    """Curvature above which SAM is unstable at a given gradient norm.

    The positive root λ of η λ (1 + ρ λ/‖g‖) = 2:

        sam_edge = ‖g‖/(2ρ) · (√(1 + 8ρ/(η‖g‖)) − 1)

    evaluated as (4/η) · √‖g‖ / (√‖g‖ + √(‖g‖ + 8ρ/η)), which cancels nowhere. It grows with ‖g‖ from 0 to 2/η.

    Args:
        grad_norm: ‖g‖ ≥ 0, the norm of the gradient at the unperturbed parameters.
        learning_rate: step size η > 0.
        rho: radius ρ ≥ 0 of SAM's perturbation. Zero gives :func:`gd_edge`.

    Returns:
        The edge, in the broadcast shape of the arguments. A NaN gradient norm gives NaN.

    Raises:
        ValueError: if an argument is out of range.

    Source: Long & Bartlett (2024), the SAM edge of section 2.

    >>> round(sam_edge(1.0, 0.5, 0.25), 9)
    2.472135955
    >>> sam_edge(1.0, 0.5, 0.0)
    4.0
    """
    _check("learning_rate", learning_rate, positive=True)
    _check("rho", rho)
    _check("grad_norm", grad_norm, allow_nan=True)
    g, eta, radius = _arrays(grad_norm, learning_rate, rho)
    xp = _namespace(g, eta, radius)
    root = xp.sqrt(g)
    # At ‖g‖ = ρ = 0 the quotient is 0/0; the limit ρ → 0 taken first is 2/η.
    below = xp.where(radius == 0, xp.ones_like(radius), root + xp.sqrt(g + 8 * radius / eta))
    return _result(xp.where((radius == 0) & (g == g), 2 / eta, 4 / eta * root / below))


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
    _check("learning_rate", learning_rate, positive=True)
    _check("rho", rho)
    _check("grad_norm", grad_norm, positive=True)
    lam, g, eta, radius = _arrays(curvature, grad_norm, learning_rate, rho)
    return _result(1 - eta * lam * (1 + radius * lam / g))


def two_cycle_radius(curvature: Real, learning_rate: Real, rho: Real) -> Real:
    """Distance η λ ρ/(2 − η λ) from the minimum at which SAM on a quadratic alternates between two points.

    There ‖g‖ = λ · radius, hence ``sam_edge(‖g‖, η, ρ) = λ`` exactly, although λ never moves.

    Args:
        curvature: eigenvalue 0 < λ < 2/η.
        learning_rate: step size η > 0.
        rho: radius ρ ≥ 0.

    Returns:
        The distance, in parameter units.

    Raises:
        ValueError: if λ is not within (0, 2/η): there is no cycle then.

    Source: Bartlett, Long & Bousquet (2023), arXiv:2210.01513, and the theory page of the book.

    >>> two_cycle_radius(2.0, 0.5, 0.1)
    0.1
    """
    _check("learning_rate", learning_rate, positive=True)
    _check("rho", rho)
    _check("curvature", curvature, positive=True)
    lam, eta, radius = _arrays(curvature, learning_rate, rho)
    if not bool((eta * lam < 2).all()):
        raise ValueError(f"curvature must lie below 2/learning_rate for a 2-cycle to exist, got {curvature!r}")
    return _result(eta * lam * radius / (2 - eta * lam))


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
    _check("learning_rate", learning_rate, positive=True)
    _check("strength", strength)
    if samples < 2:
        raise ValueError(f"samples must be at least 2, got {samples!r}")
    lam = np.asarray(eigenvalues, dtype=np.float64).ravel()
    lam = lam[lam != 0]
    v = (learning_rate * strength * lam) ** 2 / (samples - 1)
    a = (1 - learning_rate * lam * (1 + strength * lam)) ** 2 + v * lam**2
    return float((lam**2 * v / (1 - a)).sum()) if bool((a < 1).all()) else float("inf")


def _namespace(*values: Any) -> Any:
    """PyTorch if any argument is a tensor, else NumPy. A tensor can only exist once torch is imported."""
    torch = sys.modules.get("torch")
    return torch if torch is not None and any(isinstance(v, torch.Tensor) for v in values) else np


def _array(value: Any) -> Any:
    return value if _namespace(value) is not np else np.asarray(value, dtype=np.float64)


def _arrays(*values: Any) -> tuple[Any, ...]:
    """All arguments in one namespace, broadcast against each other."""
    torch = _namespace(*values)
    if torch is np:
        return tuple(np.broadcast_arrays(*map(_array, values)))
    tensors = [v for v in values if isinstance(v, torch.Tensor)]
    dtypes = [t.dtype for t in tensors if t.is_floating_point()] or [torch.get_default_dtype()]
    dtype, device = functools.reduce(torch.promote_types, dtypes), tensors[0].device
    return tuple(torch.broadcast_tensors(*(torch.as_tensor(v, dtype=dtype, device=device) for v in values)))


def _result(value: Any) -> Any:
    return float(value) if isinstance(value, np.ndarray | np.generic) and value.ndim == 0 else value


def _check(name: str, value: Any, *, positive: bool = False, allow_nan: bool = False) -> None:
    x = _array(value)
    good = (x > 0) if positive else (x >= 0)
    good = good & (x < float("inf"))
    if allow_nan:
        good = good | (x != x)
    if not bool(good.all()):
        allowed = "positive and finite" if positive else "non-negative and finite"
        raise ValueError(f"{name} must be {allowed}, got {value!r}")
