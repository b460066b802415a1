"""What is measured along a run: observables, each some columns of a measurement's row, and what is read at every step.

Adding one is an entry here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..hessian import HessianOperator
from ..objective import Objective
from ..rules import law_of, optimizer
from ..stepping import descent_from
from .base import Observable, Point
from .classifiers import EXAMPLE_WEIGHTS, PROBES
from .curvature import FINITE_DIFFERENCE_NORM, FROBENIUS_NORM, GAUSS_NEWTON_NORM, LOG_DETERMINANT, TRACE
from .edge import EDGE
from .noise import NOISE_KERNEL
from .paths import PATHS, PLACES
from .sampled import OWN_SHARPNESS, SAMPLED_TRACE

if TYPE_CHECKING:
    from ..experiments.task import Task

__all__ = ["OBSERVABLES", "PATHS", "PLACES", "Observable", "Point", "measure", "observe"]

OBSERVABLES = {
    observable.name: observable
    for observable in (
        EDGE,
        NOISE_KERNEL,
        FROBENIUS_NORM,
        TRACE,
        LOG_DETERMINANT,
        EXAMPLE_WEIGHTS,
        PROBES,
        FINITE_DIFFERENCE_NORM,
        GAUSS_NEWTON_NORM,
        OWN_SHARPNESS,
        SAMPLED_TRACE,
    )
}


def measure(
    task: Task,
    params: Tensor,
    step: int = 0,
    memory: dict[str, Any] | None = None,
    objective: Objective | None = None,
) -> dict[str, float]:
    """One measurement at parameters of one's own, outside of a run: the columns of the run's observables.

    Args:
        task: gives rule, η, ρ, observables and tolerance.
        params: w, shape (P,).
        step: seeds the solver's random directions, and chooses the mini-batch.
        memory: what the observables keep from call to call; an empty dictionary at first.
        objective: the loss to measure, by default that of the run at this step.

    Raises:
        FloatingPointError: if the Hessian or the gradient is not finite.
    """
    operator = HessianOperator(objective or task.measured(step), params)
    law = law_of(task.config, optimizer(task.config, nn.Parameter(operator.params.clone())))
    descent = descent_from(operator, task.config)
    memory = {} if memory is None else memory
    return observe(Point(task, step, operator, descent, law, task.config.learning_rate, memory))


def observe(point: Point) -> dict[str, float]:
    """All columns at a point."""
    for name in point.observables or point.config.observables:
        point.row |= OBSERVABLES[name].measure(point)
    return point.row
