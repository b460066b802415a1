"""What a loss hangs on, and which module of a model did something: asked where a check or a derivative failed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .batches import apply

if TYPE_CHECKING:
    from .batches import Chunk
    from .objective import Objective

__all__ = ["describe", "graph", "once_differentiable", "random_state", "who_draws", "without_second_derivative"]


def graph(results: Iterable[Any]) -> tuple[dict[int, Tensor], set[str]]:
    """The leaves that tensors depend on, by identity, and the names of the operations between."""
    leaves: dict[int, Tensor] = {}
    nodes = [t.grad_fn for t in results if isinstance(t, Tensor) and t.grad_fn is not None]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if hasattr(node, "variable"):
            leaves[id(node.variable)] = node.variable
        after = {next_node for next_node, _ in node.next_functions if next_node is not None} - seen
        seen |= after
        nodes.extend(after)
    return leaves, {node.name() for node in seen}


def once_differentiable(gradients: Iterable[Any]) -> bool:
    """Whether gradients depend on functions with @once_differentiable, whose derivatives autograd takes for zero."""
    return "torch::autograd::Error" in graph(gradients)[1]


def describe(model: nn.Module, module: nn.Module) -> str:
    """A module by name and type, and its mode."""
    name = next(n for n, m in model.named_modules() if m is module)
    subject = f"module {name!r}" if name else "the model"
    return f"{subject} ({type(module).__name__}) is in {'training' if module.training else 'evaluation'} mode"


def random_state(device: torch.device) -> tuple[Any, ...]:
    """The state of all the usual sources of random numbers, to be compared."""
    _, keys, position, *_ = np.random.get_state()  # noqa: NPY002
    state = [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])
    return *(bytes(s.numpy()) for s in state), bytes(keys), position, random.getstate()  # type: ignore[arg-type]


def who_draws(objective: Objective, params: Tensor, chunk: Chunk) -> str:
    """The innermost module whose forward pass draws random numbers."""
    device, states = objective.layout.device, {}

    def before(module: nn.Module, inputs: Any) -> None:
        states[module] = random_state(device)

    found = _first_module(objective, params, chunk, before, lambda m, outputs: random_state(device) != states[m])
    return f"{describe(objective.model, found)} and" if found else "the loss function"


def without_second_derivative(objective: Objective, params: Tensor) -> str:
    """The innermost module whose outputs cannot be differentiated twice."""

    def fails(module: nn.Module, outputs: Any) -> bool:
        tensors = [t for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor) and t.requires_grad]
        try:
            for t in tensors:
                (g,) = torch.autograd.grad(t.square().sum(), params, create_graph=True, allow_unused=True)
                if g is None or not g.requires_grad:
                    continue
                if once_differentiable([g]):
                    return True
                torch.autograd.grad(g.square().sum(), params, retain_graph=True, allow_unused=True)
        except RuntimeError:
            return True
        return False

    found = _first_module(objective, params, next(iter(objective.data)), lambda module, inputs: None, fails)
    return describe(objective.model, found).rpartition(" is in ")[0] if found else "the loss function"


def _first_module(
    objective: Objective,
    params: Tensor,
    chunk: Chunk,
    before: Callable[[nn.Module, Any], None],
    after: Callable[[nn.Module, Any], bool],
) -> nn.Module | None:
    """The first module to finish, in a forward pass, of which ``after`` is true."""
    found: list[nn.Module] = []

    def look(module: nn.Module, inputs: Any, outputs: Any) -> None:
        if not found and after(module, outputs):
            found.append(module)

    hooks = [
        h
        for m in objective.model.modules()
        for h in (m.register_forward_pre_hook(before), m.register_forward_hook(look))
    ]
    try:
        objective.within(params, lambda: apply(objective.model, chunk.inputs))
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None
