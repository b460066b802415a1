"""The edge of stability at a point: the spectrum's ends, the gradients, and the edges that they set."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..edges import gd_edge, sam_edge
from ..eigen import EigenResult, extreme_eigenpairs
from ..optim import EPSILON
from ..optim.precision import norm as length
from .base import Observable, Point

__all__ = ["EDGE"]


def edge(point: Point) -> dict[str, float]:
    """The spectrum's ends, the gradients, and the edges they set.

    Columns: ``loss``; ``grad_norm`` ‖∇ℓ(w)‖ and ``sam_grad_norm`` of the gradient that the base steps with;
    ``eigenvalue_1``…``k``; ``smallest_eigenvalue`` and its ``smallest_residual`` (loose, where it is not the operator
    norm); ``operator_norm`` max |λ| with its ``residual``, within which an eigenvalue lies, and ``matvecs`` spent;
    ``gd_edge`` 2/η, ``sam_edge`` of the rule SAM, ``edge`` of the rule in use; ``edge_ratio`` = operator_norm / edge;
    ``grad_alignment`` and ``sam_grad_alignment``, |cos| of each gradient with the principal eigenvector, or with the
    span of all eigenvectors, ``inseparable`` of them, whose values the tolerance cannot tell from its; ``gap``, the
    distance to the next value that was seen.

    Where the edge is one of a preconditioned Hessian, also its ``preconditioned_norm`` with
    ``preconditioned_residual``, which then is what is divided by the edge, and ``preconditioned_alignment`` in its
    geometry.

    Raises:
        FloatingPointError: if the Hessian or the gradient is not finite.
    """
    config, operator = point.config, point.operator
    grad, count = operator.gradient, config.eigenvalues
    eigen = extreme_eigenpairs(
        operator, count, 1, point.memory.get("model"), config.tolerance, generator=point.generator(), explore=0
    )
    point.memory["model"] = tuple(eigen.model)
    largest = int(eigen.values.abs().argmax())
    norm, grad_norm = float(eigen.values[largest].abs()), float(length(grad))
    if not math.isfinite(grad_norm):
        raise FloatingPointError("the gradient is not finite")
    point.principal = eigen.vectors[:, largest]
    span, gap = _inseparable(eigen, largest, config.tolerance * norm)
    rate = point.learning_rate
    divided_by = grad_norm + EPSILON  # by SAM
    rule = sam_edge(divided_by, rate, config.rho) if config.rule == "sam" else math.nan
    row = {
        "loss": float(operator.value),
        "grad_norm": grad_norm,
        "sam_grad_norm": float(length(point.descent)),
        **{f"eigenvalue_{i + 1}": float(eigen.values[i]) for i in range(count)},
        "smallest_eigenvalue": float(eigen.values[-1]),
        "smallest_residual": float(eigen.residuals[-1]),
        "operator_norm": norm,
        "residual": float(eigen.residuals[largest]),
        "matvecs": eigen.matvecs,
        "gd_edge": gd_edge(rate),
        "sam_edge": rule,
        "edge": point.law(float(length(point.descent)) if point.law.takes == "descent" else divided_by),
        "grad_alignment": _cosine(grad, span),
        "sam_grad_alignment": _cosine(point.descent, span),
        "gap": gap,
        "inseparable": span.shape[1],
    }
    acting = point.law.operator(operator)
    if acting is not operator:
        row |= _preconditioned(point, acting)
        row["matvecs"] += row.pop("preconditioned_matvecs")
    norm = row.get("preconditioned_norm", norm)
    row["edge_ratio"] = norm / row["edge"] if row["edge"] != 0 else math.inf
    return row


def _preconditioned(point: Point, acting: Any) -> dict[str, Any]:
    """The norm of D^½ H D^½, and the alignment of the gradient in the coordinates D^-½ w."""
    eigen = extreme_eigenpairs(
        acting,
        1,
        1,
        point.memory.get("preconditioned"),
        point.config.tolerance,
        generator=point.generator(),
        explore=0,
    )
    point.memory["preconditioned"] = tuple(eigen.model)
    largest = int(eigen.values.abs().argmax())
    return {
        "preconditioned_norm": float(eigen.values[largest].abs()),
        "preconditioned_residual": float(eigen.residuals[largest]),
        "preconditioned_alignment": _cosine(acting.root * point.gradient, eigen.vectors[:, largest, None]),
        "preconditioned_matvecs": eigen.matvecs,
    }


def _inseparable(eigen: EigenResult, principal: int, distance: float) -> tuple[Tensor, float]:
    """Orthonormal vectors (P, m): the principal one, and those whose values lie so near that it may be mixed with them;
    and the distance to the nearest value of all that the solver has seen."""
    value, vector = eigen.values[principal], eigen.vectors[:, principal]
    apart = (eigen.model.values - value).abs()
    itself = int(apart.argmin())
    apart[itself] = math.inf
    near = [i for i, d in enumerate(apart.tolist()) if d < distance]
    columns = torch.cat([vector[:, None], eigen.model.vectors[:, near]], 1)
    return (torch.linalg.qr(columns).Q if near else columns), float(apart.min())


def _cosine(vector: Tensor, span: Tensor) -> float:
    """The cosine of the angle between a vector and the span of orthonormal columns."""
    return float(length(span.mT @ vector) / length(vector))


EDGE = Observable("edge", edge)
