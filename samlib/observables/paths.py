"""What is read at every step of a run: a column each. All cost next to nothing, but where said."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from ..stepping import Step

__all__ = ["PATHS", "PLACES"]


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


def _uphill(step: Step) -> float:
    """Loss at the perturbed point minus loss at w, both of the step's batch; NaN without a perturbation.

    With a cached direction the optimizer takes no gradient at w: this takes one, which is not counted as the run's.
    """
    moved = not torch.equal(step.closure.points[-1], step.before)
    return float(step.losses[-1] - step.start[0]) if moved else math.nan


def _uphill_cosine(step: Step) -> float:
    """cos of the perturbation and the gradient at w, of the step's batch; NaN without a perturbation."""
    way, gradient = step.closure.points[-1] - step.before, step.start[1]
    return float(way @ gradient / (way.norm() * gradient.norm()))


# What is read at every step, of the step from w: a column each.
PATHS: dict[str, Callable[[Step], float]] = {
    "loss": lambda step: float(step.losses[0]),
    "grad_norm": lambda step: float(step.gradients[0].norm()),
    "gradient_cosine": _gradient_cosine,
    "projection": _projection,
    "cache_age": lambda step: float(step.optimizer.param_groups[0].get("age", 0)),
    "uphill": _uphill,
    "uphill_cosine": _uphill_cosine,
}
PLACES = {"projection", "uphill", "uphill_cosine"}
"""What of it looks at where the step was."""
