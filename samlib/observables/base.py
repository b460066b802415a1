"""A point of a run's path, and what an observable of it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..hessian import HessianOperator
from ..laws import EdgeLaw
from ..objective import Objective
from ..settings import Settings

if TYPE_CHECKING:
    from ..config import RunConfig
    from ..experiments.task import Task

__all__ = ["Observable", "Point"]


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
        shared: what several observables of this point need, computed by the first.
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
    shared: dict[str, Any] = field(default_factory=dict)
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
