"""Examples in chunks: from tensors, or from the batches of a loader."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

__all__ = ["Chunk", "Chunks", "apply", "arguments", "concatenate"]


class Chunk(NamedTuple):
    """Some examples: tensors, or tuples, lists or dicts of tensors, and how many."""

    inputs: Any
    targets: Any
    size: int

    def part(self, start: int, stop: int, device: torch.device | None = None) -> Chunk:
        """Some of the examples, moved to a device; numbers and the like among the tensors are kept."""

        def cut(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            some = leaf[start:stop] if leaf.dim() and stop - start < self.size else leaf
            return some if device is None else some.to(device)

        inputs, targets = (
            cut(tree) if isinstance(tree, Tensor) else pytree.tree_map(cut, tree)
            for tree in (self.inputs, self.targets)
        )
        return Chunk(inputs, targets, stop - start)


class Chunks:
    """Examples, at most ``chunk_size`` at a time, read anew by each iteration.

    Args:
        inputs: tensors or arrays with the examples first, or tuples, lists or dicts of them; or, without targets, an
            iterable of pairs (inputs, targets).
        targets: the same.
        chunk_size: examples per chunk; by default all, or a batch.
        dtype: of the arrays' floating-point numbers.
        device: where the chunks go.

    Attributes:
        streamed: whether the examples come in batches.
        total: their number; of batches, None until it is set.

    Raises:
        TypeError: if the examples are of another kind.
        ValueError: if there are none, or not as many inputs as targets.
    """

    def __init__(
        self, inputs: Any, targets: Any, chunk_size: int | None, dtype: torch.dtype, device: torch.device
    ) -> None:
        if chunk_size is not None and not isinstance(chunk_size, int):
            raise TypeError(f"chunk_size must be a whole number, got {chunk_size!r}")
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
        self.streamed = targets is None
        self.chunk_size, self._dtype, self._device = chunk_size, dtype, device
        self.total: int | None = None
        if self.streamed:
            self.batches: Iterable[Any] = _readable(inputs)
        else:
            chunk = self._chunk((inputs, targets))
            self.batches, self.total = [chunk], chunk.size

    def __iter__(self) -> Iterator[Chunk]:
        total = 0
        for batch in self.batches:
            chunk = self._chunk(batch) if self.streamed else batch
            step = self.chunk_size or chunk.size
            total += chunk.size
            for start in range(0, chunk.size, step):
                yield chunk.part(start, min(start + step, chunk.size), self._device)
        if self.total is None and not total:
            raise ValueError("the batches hold no examples")
        if self.total is not None and total != self.total:
            raise ValueError(f"the batches held {self.total} examples at first and {total} now; {SAME_DATA}")

    def _chunk(self, batch: Any) -> Chunk:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise TypeError(f"each batch must be a pair (inputs, targets), got {_kind(batch)}")
        inputs, targets = (_tensors(tree, self._dtype) for tree in batch)
        lengths = [{len(t) for t in _examples(tree)} for tree in (inputs, targets)]
        if lengths[0] != lengths[1] or len(lengths[0]) != 1 or 0 in lengths[0]:
            shown = " and ".join(", ".join(map(str, sorted(some))) or "none" for some in lengths)
            raise ValueError(
                "inputs and targets are tensors with the examples first: need as many targets as inputs and at least "
                f"one, got {shown}; lists of numbers must be tensors or arrays, and a Dataset needs a DataLoader"
            )
        return Chunk(inputs, targets, lengths[0].pop())


SAME_DATA = "pass batches that are the same on each pass (no drop_last with shuffling, no random augmentation)"


def _readable(batches: Any) -> Iterable[Any]:
    """Batches that can be read more than once, or a TypeError."""
    if isinstance(batches, Tensor | np.ndarray | Mapping | str):
        raise TypeError(f"targets are missing: without them, batches of tensors are expected, got {_kind(batches)}")
    if isinstance(batches, tuple | list) and any(isinstance(batch, Tensor | np.ndarray) for batch in batches):
        raise TypeError("expected a list of pairs (inputs, targets), got one of tensors; pass two tensors one by one")
    if isinstance(batches, Iterator):
        raise TypeError(
            f"an iterator ({type(batches).__name__}) gives its batches only once, and each evaluation reads them; "
            "pass a DataLoader or a list of pairs of tensors (inputs, targets)"
        )
    if not isinstance(batches, Iterable) and not hasattr(batches, "__getitem__"):
        raise TypeError(f"expected an iterable of pairs of tensors (inputs, targets), got {_kind(batches)}")
    return batches


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}" + (f" of {len(value)}" if isinstance(value, tuple | list | dict) else "")


def _tensors(tree: Any, dtype: torch.dtype) -> Any:
    """The same with arrays as tensors, none of which requires a gradient."""

    def convert(leaf: Any) -> Any:
        if isinstance(leaf, np.ndarray):
            leaf = torch.as_tensor(np.require(leaf, requirements=["C", "W"]))  # a copy only where it must be
            return leaf.to(dtype) if leaf.is_floating_point() else leaf
        if isinstance(leaf, Tensor):
            leaf = leaf.detach() if leaf.requires_grad else leaf
            return leaf.clone() if leaf.is_inference() else leaf
        if leaf is None or isinstance(leaf, bool | int | float | str):
            return leaf
        raise TypeError(
            "inputs and targets must be tensors or arrays with the examples first, or tuples, lists or dicts of "
            f"tensors, got {_kind(leaf)}"
        )

    return pytree.tree_map(convert, dict(tree) if isinstance(tree, Mapping) else tree)


def _examples(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.dim()]


def concatenate(trees: list[Any], sizes: list[int]) -> Any:
    """Trees of tensors, each with its number of examples, as one.

    Raises:
        ValueError: if a tensor does not hold one row for each example, or shapes differ.
    """
    leaves, specs = zip(*(pytree.tree_flatten(tree) for tree in trees), strict=True)
    if any(spec != specs[0] for spec in specs):
        raise ValueError("structures differ")
    joined: list[Any] = []
    for column in zip(*leaves, strict=True):
        if not any(isinstance(leaf, Tensor) for leaf in column) and all(leaf == column[0] for leaf in column):
            joined.append(column[0])
            continue
        rows = [t.shape[0] if isinstance(t, Tensor) and t.dim() else -1 for t in column]
        if rows != sizes or len({t.shape[1:] for t in column}) > 1:
            raise ValueError(f"expected tensors of {sizes} rows, got {rows}")
        joined.append(torch.cat(column))
    return pytree.tree_unflatten(joined, specs[0])


def arguments(model: nn.Module, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """How a module is called: a dict as keywords, a tuple or list as positions where ``forward`` takes them so."""
    if isinstance(inputs, Tensor):
        return (inputs,), {}
    signature = inspect.signature(model.forward)
    try:
        if isinstance(inputs, dict):
            signature.bind(**inputs)
            return (), inputs
        signature.bind(*inputs)
        return tuple(inputs), {}
    except TypeError:
        return (inputs,), {}


def apply(model: nn.Module, inputs: Any) -> Any:
    """A module's outputs."""
    positions, keywords = arguments(model, inputs)
    return model(*positions, **keywords)
