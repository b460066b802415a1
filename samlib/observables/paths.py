"""What is read at every step of a run and costs next to nothing: a column each."""

from __future__ import annotations

import math
from collections.abc import Callable

from ..stepping import Step

__all__ = ["PATHS"]


def _projection(step: Step) -> float:
    """(w − w₀)·v for the principal eigenvector v and the parameters w₀ of the last measurement."""
    if step.direction is None:
        return math.nan
    origin, direction = step.direction
    return float((step.before - origin) @ direction)


def _gradient_cosine(step: Step) -> float:
    """cos of the gradient at w and the one that the base stepped with."""
    first, last = step.gradients[0], step.descent
    return float(first @ last / (first.norm() * last.norm()))


# What is read at every step, of the step from w: a column each.
PATHS: dict[str, Callable[[Step], float]] = {
    "loss": lambda step: float(step.losses[0]),
    "grad_norm": lambda step: float(step.gradients[0].norm()),
    "gradient_cosine": _gradient_cosine,
    "projection": _projection,
    "cache_age": lambda step: float(step.optimizer.param_groups[0].get("age", 0)),
}
