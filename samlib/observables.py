"""What is measured along a run: observables, each some columns of a measurement's row, and what is read at every step.

Adding one is an entry here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .edges import gd_edge, sam_edge
from .eigen import extreme_eigenpairs
from .hessian import HessianOperator
from .laws import EdgeLaw
from .objective import Objective
from .rules import law_of, optimizer
from .settings import Settings
from .stepping import Step, descent_from

if TYPE_CHECKING:
    from .config import RunConfig
    from .experiments.task import Task

__all__ = ["OBSERVABLES", "PATHS", "Observable", "Point", "measure", "observe"]


@dataclass
class Point:
    """A point of a run's path, as observables see it.

    Attributes:
        task: of the run.
        step: number of updates so far.
        operator: the Hessian of the measured loss at w.
        descent: the gradient that the base steps with from here, shape (P,); the gradient itself for the base alone.
        law: the edge of the rule, with the optimizer's state before the step.
        learning_rate: of this step.
        memory: what an observable keeps from call to call, in the checkpoint too: numbers, tensors, tuples of them.
        observables: which to read, by default those of the configuration.
        row: the columns so far.
        principal: the principal eigenvector, shape (P,), once the first observable has found it.
    """

    task: Task
    step: int
    operator: HessianOperator
    descent: Tensor
    law: EdgeLaw
    learning_rate: float
    memory: dict[str, Any]
    observables: tuple[str, ...] = ()
    row: dict[str, float] = field(default_factory=dict)
    principal: Tensor | None = None

    @property
    def config(self) -> RunConfig:
        return self.task.config

    @property
    def objective(self) -> Objective:
        """The loss that is measured."""
        return self.operator.objective

    @property
    def params(self) -> Tensor:
        """w, shape (P,)."""
        return self.operator.params

    @property
    def gradient(self) -> Tensor:
        """∇ℓ(w), shape (P,)."""
        return self.operator.gradient

    def generator(self) -> torch.Generator:
        """Random numbers that depend on the run's seed and the step alone."""
        return torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.step)


@dataclass(frozen=True)
class Observable:
    """An entry of the registry.

    Attributes:
        name: as a run's settings call it.
        measure: the columns at a point.
        settings: its own settings.
        check: raises a ValueError, before anything is trained, if it cannot be had for a task.
    """

    name: str
    measure: Callable[[Point], Mapping[str, float]]
    settings: type[Settings] = Settings
    check: Callable[[Task], None] = lambda task: None


def edge(point: Point) -> dict[str, float]:
    """The spectrum's ends, the gradients, and the edges they set.

    Columns: ``loss``; ``grad_norm`` ‖∇ℓ(w)‖ and ``sam_grad_norm`` of the gradient that the base steps with;
    ``eigenvalue_1``…``k``; ``smallest_eigenvalue`` and its ``smallest_residual`` (loose, where it is not the operator
    norm); ``operator_norm`` max |λ| with its ``residual``, within which an eigenvalue lies, and ``matvecs`` spent;
    ``gd_edge`` 2/η, ``sam_edge`` of the rule SAM, ``edge`` of the rule in use; ``edge_ratio`` = operator_norm / edge;
    ``grad_alignment`` and ``sam_grad_alignment``, |cos| of each gradient with the principal eigenvector. Where the
    edge is one of a preconditioned Hessian, also its ``preconditioned_norm`` with ``preconditioned_residual``, which
    then is what is divided by the edge, and ``preconditioned_alignment`` in its geometry.

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
    norm, grad_norm = float(eigen.values[largest].abs()), float(grad.norm())
    if not math.isfinite(grad_norm):
        raise FloatingPointError("the gradient is not finite")
    point.principal = principal = eigen.vectors[:, largest]
    rate = point.learning_rate
    rule = sam_edge(grad_norm, rate, config.rho) if config.rule == "sam" else math.nan
    row = {
        "loss": float(operator.value),
        "grad_norm": grad_norm,
        "sam_grad_norm": float(point.descent.norm()),
        **{f"eigenvalue_{i + 1}": float(eigen.values[i]) for i in range(count)},
        "smallest_eigenvalue": float(eigen.values[-1]),
        "smallest_residual": float(eigen.residuals[-1]),
        "operator_norm": norm,
        "residual": float(eigen.residuals[largest]),
        "matvecs": eigen.matvecs,
        "gd_edge": gd_edge(rate),
        "sam_edge": rule,
        "edge": point.law(float(point.descent.norm()) if point.law.takes == "descent" else grad_norm),
        "grad_alignment": _cosine(grad, principal),
        "sam_grad_alignment": _cosine(point.descent, principal),
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
        "preconditioned_alignment": _cosine(acting.root * point.gradient, eigen.vectors[:, largest]),
        "preconditioned_matvecs": eigen.matvecs,
    }


def _cosine(vector: Tensor, unit: Tensor) -> float:
    return float((vector @ unit).abs() / vector.norm())


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


OBSERVABLES = {observable.name: observable for observable in (Observable("edge", edge),)}


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
