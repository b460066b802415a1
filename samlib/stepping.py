"""One step of a run: the closure that an optimizer steps with, on the flat parameter vector."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .hessian import HessianOperator
from .objective import Objective
from .rules import PLAIN, RULES, Making

if TYPE_CHECKING:
    from .config import RunConfig
    from .experiments.training_mode import TrainingMode

__all__ = ["Closure", "Step", "base_alone", "descent_from", "take"]

OFF = ("rho", "strength")  # of a parameter group: zero means the base alone


class Closure:
    """What an optimizer steps with: called, it sets the gradient at the parameters as they are, and returns the loss.

    Rules that need more than a gradient find here the objective of the step, which knows where each parameter lies in
    the flat vector, and the network's outputs.

    Args:
        objective: the loss that the step descends, in evaluation mode.
        params: the flat vector (P,).
        known: the Hessian of this very loss at w, whose gradient need not be computed again.
        training: what training mode adds to the network.
        step: number of updates so far.
        places: whether to keep where each evaluation was.

    Attributes:
        losses, gradients: of each evaluation, in order; the first is at w.
        points: where they were, shape (P,) each; only if asked for.
    """

    def __init__(
        self,
        objective: Objective,
        params: nn.Parameter,
        known: HessianOperator | None = None,
        training: TrainingMode | None = None,
        step: int = 0,
        places: bool = False,
    ) -> None:
        self.objective, self.params, self.training, self.step = objective, params, training, step
        self._known, self._places = known, places
        self.losses: list[Tensor] = []
        self.gradients: list[Tensor] = []
        self.points: list[Tensor] = []

    def __call__(self) -> Tensor:
        first = not self.losses
        # Rules with a cached direction evaluate the loss at a perturbed point only.
        if first and self._known and torch.equal(self.params, self._known.params):
            loss, gradient = self._known.value, self._known.gradient.clone()
        else:
            loss, gradient = self.look(self.params, move_buffers=first)
        self.losses.append(loss)
        self.gradients.append(gradient)
        if self._places:
            self.points.append(self.params.detach().clone())
        self.params.grad = gradient
        return loss

    def look(self, params: Tensor, move_buffers: bool = False) -> tuple[Tensor, Tensor]:
        """The step's loss and its gradient at parameters (P,), as the step sees them, without booking it."""
        if self.training:
            batch = self.objective.inputs, self.objective.targets
            return self.training.value_and_gradient(params, *batch, self.step, move_buffers=move_buffers)
        return self.objective.value_and_gradient(params.detach())

    @property
    def slices(self) -> dict[str, slice]:
        """Where each named parameter lies in the flat vector."""
        return self.objective.slices

    def loss(self, outputs: Any) -> Tensor:
        """The mean loss of outputs for the step's batch."""
        return self.objective.loss(outputs, self.objective.targets)

    def outputs(self, params: Tensor) -> Any:
        """The network's outputs for the step's batch at parameters (P,), with a graph."""
        if self.training:
            return self.training.outputs(params, self.objective.inputs, self.step)
        return self.objective.forward(params, self.objective.inputs)


@dataclass
class Step:
    """A step that was taken, as path observables see it.

    Attributes:
        optimizer: after the step.
        before: w before it, shape (P,); only where something reads it.
        losses, gradients: of each evaluation of the closure.
        descent: the gradient that the base stepped with.
        direction: the parameters and the principal eigenvector at the last measurement.
        closure: what it was taken with.
    """

    optimizer: Optimizer
    before: Tensor
    losses: list[Tensor]
    gradients: list[Tensor]
    descent: Tensor
    direction: tuple[Tensor, Tensor] | None
    closure: Closure

    @cached_property
    def start(self) -> tuple[Tensor, Tensor]:
        """Loss and gradient at w: one more evaluation where the optimizer made none there."""
        if torch.equal(self.closure.points[0], self.before):
            return self.losses[0], self.gradients[0]
        return self.closure.look(self.before)


def take(optimizer: Optimizer, closure: Closure) -> Tensor:
    """Step, and return the gradient that the base stepped with, shape (P,)."""
    step: Callable[..., Any] = optimizer.step
    step(closure)
    descent = closure.params.grad
    assert descent is not None
    return descent


def descent_from(operator: HessianOperator, config: RunConfig) -> Tensor:
    """The gradient that the rule would step with from where a Hessian was taken, on the Hessian's own loss."""
    params = nn.Parameter(operator.params.clone())
    optimizer = RULES[config.rule].build(Making([params], config, PLAIN))
    return take(optimizer, Closure(operator.objective, params, operator))


@contextmanager
def base_alone(optimizer: Optimizer) -> Iterator[None]:
    """Let a rule be the base alone for the time being."""
    saved = [(group, name, group[name]) for group in optimizer.param_groups for name in OFF if name in group]
    for group, name, _ in saved:
        group[name] = 0.0
    try:
        yield
    finally:
        for group, name, value in saved:
            group[name] = value
