"""Is a loss what an objective takes it for: a function of w that adds up over chunks? Seen by what it does."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .batches import SAME_DATA, Chunk, apply, concatenate
from .isolation import isolated
from .reductions import Reduction
from .tracing import describe, graph, random_state, who_draws

if TYPE_CHECKING:
    from .objective import Objective

__all__ = ["examine"]

Combine = Callable[[list[Tensor], list[int]], Tensor]

REENTRANT = "torch.utils.checkpoint with use_reentrant=True (pass use_reentrant=False)"
NO_FUNCTION = "so the loss is not a function of the parameters"


def examine(objective: Objective) -> list[float] | None:
    """Look once, at the module's own parameters, whether the loss is a function of them that adds up over chunks.

    Parameters that are all zero, as of a new last layer, are moved a little: they would hide what comes before them.

    It costs at most two evaluations of the loss: one of all chunks, and one more of the first chunk, in two parts
    where there are several. Module, examples and PyTorch's random state are left as they were.

    Returns:
        The share of each chunk in the loss of all examples; None where these are the shares of the examples.

    Raises:
        ValueError: saying what is wrong and what to do, if

            * the loss is not a finite scalar, or does not depend on the parameters;
            * the forward pass draws random numbers, or gives two values at the same w;
            * it moves buffers (running statistics), or writes into its inputs or parameters;
            * an embedding's gradient is sparse, or is none of the loss (``scale_grad_by_freq``);
            * autograd does not see how the loss depends on a parameter: weights held in a plain list or a closure,
              reentrant activation checkpointing, ``detach`` and ``no_grad``;
            * examples of one chunk influence each other (batch statistics), or the losses of chunks do not determine
              the loss of all examples;
            * the batches are not the same on each pass.
    """
    _refuse_gradients_of_embeddings(objective.model)
    with isolated(objective.layout.device, keep_random_state=True):
        params = _beside(objective)
        chunks = iter(objective.data)
        first = next(chunks)
        trace = _trace(objective, params, first)
        reduction = Reduction(objective.loss)
        reduction.add(trace.outputs, first.targets, first.size)
        prints, second = [_fingerprint(first, objective)], None
        for chunk in chunks:
            outputs = objective.forward(params, chunk.inputs)
            objective.within(params, lambda c=chunk, o=outputs: reduction.add(o, c.targets, c.size))  # type: ignore[misc]
            second = second or (chunk, outputs)
            prints.append(_fingerprint(chunk, objective))
        objective.data.total = sum(reduction.examples)
        ordered = not objective.data.streamed or _same_data(objective, prints)
        _look_again(objective, params, trace, first, second if reduction.joinable else None)
        shares = reduction.shares(lambda combine: _in_parts(objective, params, reduction, combine))
        if shares and not ordered:
            raise ValueError(f"the batches come in another order on each pass, but weigh differently; {SAME_DATA}")
        weights = shares or reduction.examples
        losses = [loss for loss, weight in zip(reduction.losses or [trace.loss], weights, strict=True) if weight]
        if not all(loss.isfinite() for loss in losses) or not losses:
            raise ValueError(f"the loss must be finite, but is {float(sum(losses))} at the module's own parameters")
        return shares


def _beside(objective: Objective) -> Tensor:
    """The module's own parameters (P,); those that are zero throughout, other than that."""
    params = objective.layout.join()
    for part in (params[s] for s in objective.slices.values()):
        if not part.any():
            part += 0.01 * torch.arange(1, len(part) + 1, device=part.device).cos()
    return params


def _refuse_gradients_of_embeddings(model: nn.Module) -> None:
    for module in model.modules():
        name = describe(model, module).partition(" is in ")[0]
        if getattr(module, "scale_grad_by_freq", False):
            raise ValueError(
                f"{name} has scale_grad_by_freq=True, with which autograd gives no gradient of the loss; leave it out"
            )
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
            raise ValueError(f"{name} has sparse gradients, which cannot be differentiated again; set sparse=False")


class _Trace(NamedTuple):
    outputs: Any
    loss: Tensor
    hidden: list[str]
    """Parameters on which the loss does not depend, as autograd sees it."""


def _trace(objective: Objective, params: Tensor, chunk: Chunk) -> _Trace:
    """Evaluate on leaves, buffers and inputs of its own: what does the loss depend on, and what does it move?"""
    model, layout = objective.model, objective.layout
    parts = {name: p.detach() for name, p in layout.split(params).items()}
    leaves = {name: p.clone().requires_grad_() for name, p in parts.items() if name in layout.chosen}
    others = {name: p for name, p in parts.items() if name not in leaves}
    before = {name: b.clone() for name, b in model.named_buffers()}
    inputs = pytree.tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, chunk.inputs)

    def evaluate() -> tuple[Any, Any, list[str]]:
        outputs = apply(model, inputs)
        loss = objective.loss(outputs, chunk.targets)
        now = dict(model.named_buffers())
        return outputs, loss, [name for name, b in before.items() if name in now and not _equal(now[name], b)]

    state = random_state(layout.device)
    copies = {name: b.clone() for name, b in before.items()}
    outputs, loss, moved = objective.replacing({**leaves, **others, **copies}, evaluate)
    drew = random_state(layout.device) != state
    if moved:
        module = describe(model, model.get_submodule(moved[0].rpartition(".")[0]))
        raise ValueError(f"{module}, and evaluating the loss moves {_some(moved)}, {NO_FUNCTION}; {_remedy(model)}")
    if drew:
        raise ValueError(
            f"{who_draws(objective, params, chunk)} draws random numbers, {NO_FUNCTION}; {_remedy(model)}, or pass "
            "check=False if they have no effect"
        )
    if any(isinstance(t, Tensor) and t._version for t in pytree.tree_leaves(inputs)):
        raise ValueError("the forward pass writes into its inputs; let the first operation not be one in place")
    if written := [name for name, t in leaves.items() if not _equal(t.detach(), parts[name])]:
        raise ValueError(
            f"the forward pass writes into the parameters {_some(written)} (max_norm, .data?), {NO_FUNCTION}; do that "
            "after each step of the optimizer instead"
        )
    _check_scalar(loss)
    hidden = _hidden(model, outputs, loss, leaves)
    detached = pytree.tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, outputs)
    return _Trace(detached, loss.detach(), hidden)


def _check_scalar(loss: Any) -> None:
    if not isinstance(loss, Tensor):
        raise ValueError(f"the loss must be a scalar tensor, got a {type(loss).__name__}; do not call .item()")
    if loss.shape != () or not loss.is_floating_point():
        raise ValueError(
            f"the loss must be one real number, the mean over examples, got {loss.dtype} of shape {tuple(loss.shape)}"
        )


def _hidden(model: nn.Module, outputs: Any, loss: Tensor, leaves: dict[str, Tensor]) -> list[str]:
    """Names of the parameters that autograd does not see, if it sees the given leaves and nothing else of the model."""
    seen, nodes = graph([loss])
    own = {id(t) for t in leaves.values()}
    originals = {id(p): name for name, p in model.named_parameters(remove_duplicate=False)}
    if past := [name for i, name in originals.items() if i in seen]:
        raise ValueError(
            f"the loss reaches {_some(past)} past the module, by a reference that a plain list, a closure or the loss "
            "function holds, so derivatives would be wrong; use nn.ParameterList or nn.ModuleList, or look parameters "
            "up in the module when they are used"
        )
    if foreign := graph(pytree.tree_leaves(outputs))[0].keys() - own:
        raise ValueError(
            f"the outputs depend on {len(foreign)} trainable tensors that are no parameters of the model (modules in a "
            "plain list, or in a closure?); use nn.ModuleList, or freeze them with requires_grad_(False)"
        )
    if "CheckpointFunctionBackward" in nodes:
        raise ValueError(f"derivatives by given tensors cannot be had of {REENTRANT}")
    if not own & seen.keys():
        raise ValueError(
            "the loss does not depend on the parameters, as autograd sees it; look for detach(), .data, no_grad and "
            f"{REENTRANT}"
        )
    return [name for name, t in leaves.items() if id(t) not in seen]


def _look_again(
    objective: Objective, params: Tensor, trace: _Trace, first: Chunk, second: tuple[Chunk, Any] | None
) -> None:
    """Evaluate the first chunk once more, in another partition if there are others, and with other values of the
    parameters on which the loss does not depend."""
    moved = params.clone()
    for name in trace.hidden:
        moved[objective.slices[name]] *= 1.1
        moved[objective.slices[name]] += 0.1

    def same(w: Tensor, parts: list[Chunk], targets: Any, outputs: Any, expected: Tensor) -> bool:
        again = [objective.forward(w, p.inputs) for p in parts]
        together = concatenate(again, [p.size for p in parts]) if len(parts) > 1 else again[0]
        loss = objective.within(w, lambda: objective.loss(together, targets)).detach()
        return _close(loss, expected) and (
            bool(trace.hidden) or _close(together, outputs)
        )  # others may depend on those

    known = first.targets, trace.outputs, trace.loss
    parts = [first]
    other = _other_partition(objective, params, trace, first, second) if second else (parts, *known)
    if same(moved, *other):
        return
    if not same(params, parts, *known):
        raise ValueError(
            f"the loss has two values at the same w: something is random or keeps a state, {NO_FUNCTION}; "
            f"{_remedy(objective.model)}"
        )
    if same(params, *other):
        raise ValueError(
            f"the loss depends on {_some(trace.hidden)}, but autograd does not see how; look for detach(), .data, "
            f"no_grad and {REENTRANT}; freeze what is meant to be constant with requires_grad_(False)"
        )
    norms = [m for m in objective.model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    using = [describe(objective.model, m) for m in norms if m.training or not m.track_running_stats]
    raise ValueError(
        f"outputs depend on which other examples are in the chunk (batch statistics? {'; '.join(using)}), so the loss "
        "does not add up; call model.eval(), or leave chunk_size out"
    )


def _other_partition(
    objective: Objective, params: Tensor, trace: _Trace, first: Chunk, second: tuple[Chunk, Any]
) -> tuple[list[Chunk], Any, Any, Tensor]:
    """Examples in another partition than before; their targets, and what outputs and loss are to be expected."""
    if first.size > 1:
        return _halves(first), first.targets, trace.outputs, trace.loss
    chunk, more = second
    sizes = [1, chunk.size]
    pairs = [first.inputs, chunk.inputs], [first.targets, chunk.targets], [trace.outputs, more]
    try:
        inputs, targets, outputs = (concatenate(pair, sizes) for pair in pairs)
    except ValueError:  # of different shapes: they never meet
        return [first], first.targets, trace.outputs, trace.loss
    loss = objective.within(params, lambda: objective.loss(outputs, targets))
    return [Chunk(inputs, targets, sum(sizes))], targets, outputs, loss


def _halves(chunk: Chunk) -> list[Chunk]:
    middle = chunk.size // 2
    return [chunk.part(0, middle), chunk.part(middle, chunk.size)]


def _in_parts(objective: Objective, params: Tensor, reduction: Reduction, combine: Combine) -> bool:
    """Whether the chunks' losses combine to what those of other chunks do, across their borders where inputs can be
    joined, else of halves: the second look where outputs cannot be joined."""
    if max(chunk.size for chunk in objective.data) == 1:
        raise ValueError(
            "outputs that do not hold a row for each example need larger chunks (chunk_size) to be checked"
        )
    losses, sizes = [], []

    def look(part: Chunk) -> None:
        losses.append(objective.chunk_loss(params, part).detach())
        sizes.append(part.size)

    rest: Chunk | None = None
    for chunk in objective.data:
        *heads, tail = _halves(chunk) if chunk.size > 1 else [chunk]
        for head in heads:
            for part in _joined(rest, head) if rest else [head]:
                look(part)
            rest = None
        if rest:
            look(rest)
        rest = tail
    assert rest is not None
    look(rest)
    return _close(combine(losses, sizes), combine(reduction.losses, reduction.examples))


def _joined(*chunks: Chunk) -> list[Chunk]:
    """Chunks in one, or as they are where shapes differ."""
    sizes = [chunk.size for chunk in chunks]
    try:
        inputs, targets = (concatenate([chunk[i] for chunk in chunks], sizes) for i in (0, 1))
    except ValueError:
        return list(chunks)
    return [Chunk(inputs, targets, sum(sizes))]


def _same_data(objective: Objective, prints: list[list[float]]) -> bool:
    """Whether batches come in the same order on a second pass; an error if they are others."""
    before, now = np.array(prints), np.array([_fingerprint(chunk, objective) for chunk in objective.data])
    if len(before) != len(now) or not np.allclose(before.sum(0), now.sum(0), rtol=1e-9, atol=0, equal_nan=True):
        raise ValueError(f"the batches hold other examples on each pass; {SAME_DATA}")
    return np.array_equal(before, now, equal_nan=True)


def _fingerprint(chunk: Chunk, objective: Objective) -> list[float]:
    """Numbers that tell examples apart, where they are read anew."""
    if not objective.data.streamed:
        return []
    tensors = [t for t in pytree.tree_leaves(chunk[:2]) if isinstance(t, Tensor)]
    return [float(chunk.size), *(float(t.double().pow(power).sum()) for power in (1, 2) for t in tensors)]


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())  # NaN equals NaN


def _close(a: Any, b: Any) -> bool:
    """Whether two results are the same up to rounding."""
    for x, y in zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True):
        if isinstance(x, Tensor) and x.is_floating_point() and x.numel():
            size = float(x.abs().nan_to_num(0, 0, 0).max())
            if not torch.allclose(x, y, rtol=0, atol=torch.finfo(x.dtype).eps ** 0.5 * size, equal_nan=True):
                return False
    return True


def _remedy(model: nn.Module) -> str:
    return "call model.eval() first" if any(m.training for m in model.modules()) else "replace it"


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
