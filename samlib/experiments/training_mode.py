"""What training mode adds to a network: randomness, and buffers that move. Both are part of a run's state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..objective import Layout, Loss, flatten_parameters

__all__ = ["TrainingMode", "changes_with_mode"]


class TrainingMode:
    """A network in training mode as a function of its parameters, its buffers, and the step's randomness.

    Buffers move once per step, at the first evaluation, which is the one at w; evaluations at perturbed points see
    the buffers and the random numbers of that step, and leave both alone.

    Args:
        model: in training mode.
        loss: mean loss of outputs and targets.
        seed: of the random numbers, with the step.

    Attributes:
        buffers: the state, by name.
    """

    def __init__(self, model: nn.Module, loss: Loss, seed: int) -> None:
        self.model, self.loss, self.seed = model, loss, seed
        self.buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
        self._layout = Layout(model)

    def outputs(self, params: Tensor, inputs: Any, step: int, move_buffers: bool = False) -> Any:
        """The outputs at parameters (P,) in training mode."""
        buffers = {name: b.clone() for name, b in self.buffers.items()}
        weights = self._layout.split(params)
        with torch.random.fork_rng(devices=[params.device] if params.is_cuda else []):
            torch.manual_seed(self.seed * 1_000_003 + step)
            outputs = torch.func.functional_call(self.model, weights | buffers, (inputs,))
        if move_buffers:
            self.buffers = {name: b.detach() for name, b in buffers.items()}
        return outputs

    @torch.enable_grad()
    def value_and_gradient(
        self, params: Tensor, inputs: Any, targets: Any, step: int, move_buffers: bool
    ) -> tuple[Tensor, Tensor]:
        """ℓ(w) of a batch and its gradient, shapes () and (P,)."""
        w = params.detach().requires_grad_()
        value = self.loss(self.outputs(w, inputs, step, move_buffers), targets)
        return value.detach(), torch.autograd.grad(value, w)[0]


@torch.no_grad()
def changes_with_mode(trained: nn.Module, evaluated: nn.Module, loss: Loss, inputs: Any, targets: Any) -> bool:
    """Whether a network behaves differently in training mode, or moves its buffers there: tried, not guessed."""
    before = flatten_parameters(evaluated)
    mode = TrainingMode(trained, loss, seed=0)
    first = {name: b.clone() for name, b in mode.buffers.items()}
    values = [loss(mode.outputs(before, inputs, step, move_buffers=True), targets) for step in (0, 1)]
    moved = any(not torch.equal(first[name], b) for name, b in mode.buffers.items())
    plain = loss(evaluated(inputs), targets)
    return moved or any(not torch.equal(value, plain) for value in values)
