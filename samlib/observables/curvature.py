"""Curvature beyond the largest eigenvalue: sums over the spectrum, Gauss–Newton, and what finite differences see."""

from __future__ import annotations

import math

import torch

from ..eigen import power_iteration, top_eigenpairs
from ..experiments.task import Task
from ..gauss_newton import GaussNewtonOperator
from ..settings import Count, Positive, Settings
from ..spectrum import SpectralSums, curvature_measures
from .base import Observable, Point

__all__ = ["FINITE_DIFFERENCE_NORM", "FROBENIUS_NORM", "GAUSS_NEWTON_NORM", "LOG_DETERMINANT", "TRACE"]


class SumSettings(Settings):
    """Random probes, the leading pairs that are taken exactly, and β of log det(I + βH)."""

    probes: Count = 3
    exact_pairs: Count = 12
    log_determinant_beta: Positive = 1.0


def _sums(point: Point) -> SpectralSums:
    if "sums" not in point.shared:
        config = point.config
        found = curvature_measures(
            point.operator,
            config.log_determinant_beta,
            k=config.exact_pairs,
            probes=config.probes,
            generator=torch.Generator().manual_seed(7),  # the same probes for all runs, which are compared
            v0=point.memory.get("sums"),
        )
        point.memory["sums"] = tuple(found.model)
        point.shared["sums"] = found
    return point.shared["sums"]


def _sum(name: str) -> Observable:
    def measure(point: Point) -> dict[str, float]:
        sums = _sums(point)
        return {name: sums.values[name], f"{name}_error": sums.errors[name]}

    return Observable(name, measure, SumSettings)


FROBENIUS_NORM, TRACE, LOG_DETERMINANT = map(_sum, ("frobenius_norm", "trace", "log_determinant"))


def _gauss_newton(point: Point) -> dict[str, float]:
    """``gauss_newton_norm``: λ_max of Jᵀ(∂²ℓ/∂f²)J, the Hessian without the curvature of the network itself."""
    found = top_eigenpairs(
        GaussNewtonOperator(point.objective, point.params),
        v0=point.memory.get("gauss_newton"),
        tol=point.config.tolerance,
        generator=point.generator(),
        explore=0,
    )
    point.memory["gauss_newton"] = tuple(found.model)
    return {"gauss_newton_norm": float(found.values[0]), "gauss_newton_residual": float(found.residuals[0])}


GAUSS_NEWTON_NORM = Observable("gauss_newton_norm", _gauss_newton)

STEPS = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)  # lengths of finite differences along the principal eigenvector


def _finite_differences(point: Point) -> dict[str, float]:
    """What the paper's reference code reads of the Hessian, and how it hangs on the length of its differences.

    Columns: ``reference_norm``, by the reference's rule, and ``reference_matvecs``, the differences that it took;
    ``converged_norm`` and ``converged_matvecs``, where the same iteration ends if it begins at the principal
    eigenvector v and goes on until the norm changes by less than 1e-5, or NaN if it does not; ``difference_1e-05`` …
    ``difference_0.01``: ‖∇ℓ(w + s·v) − ∇ℓ(w − s·v)‖/(2s) along v for steps s. On a smooth loss all are ‖Hv‖, the first
    two but for the reference's divisor; on a ReLU network long steps cross kinks, which the Hessian does not see.
    """
    assert point.principal is not None
    w, v, gradient = point.params, point.principal, point.objective.gradient
    # As there: 100 iterations at most, started at random, until the value changes by less than a thousandth.
    found = power_iteration(gradient, w)
    settled = power_iteration(gradient, w, tol=1e-5, v0=v)
    norms = {f"difference_{s:g}": float((gradient(w + s * v) - gradient(w - s * v)).norm() / (2 * s)) for s in STEPS}
    return {
        "reference_norm": float(found.values[0]),
        "reference_matvecs": float(found.matvecs),
        "converged_norm": float(settled.values[0]) if settled.converged else math.nan,
        "converged_matvecs": float(settled.matvecs),
        **norms,
    }


def _needs_edge(task: Task) -> None:
    if "edge" not in task.config.observables:
        raise ValueError("finite_difference_norm needs the principal eigenvector: let observables have edge, too")


FINITE_DIFFERENCE_NORM = Observable("finite_difference_norm", _finite_differences, check=_needs_edge)
