"""How a loss adds up over chunks: learned from what it does, for means of any kind and for sums."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .batches import concatenate

__all__ = ["Reduction"]

NOT_ADDITIVE = (
    "the losses of chunks do not determine the loss of all examples, which is no mean over examples, weighted or not, "
    "and no sum; leave chunk_size out, or pass check=False to add up the chunks' losses by their numbers of examples"
)


MOST = 1 << 24  # numbers in the outputs of all chunks that are kept, to see their loss together


class _Rows(NamedTuple):
    """A few examples with which every chunk is compared: their loss and its gradient by the outputs, (n, …)."""

    outputs: Any
    targets: Any
    size: int
    loss: Tensor
    gradient: Tensor


class _Comparison(NamedTuple):
    """Of the rows' and the chunk's loss, the parts in the loss of both together; None where that cannot be seen."""

    rows: float
    chunk: float | None
    additive: bool


class Reduction:
    """Finds the share of each chunk in the loss of all examples.

    A mean is ℓ = Σ s / Σ n with numerators s and divisors n that add up over examples: n = 1 for plain means, class
    weights, or 0 for targets that are ignored. Of two sets of examples A and B with losses L_A and L_B,

        L_AB = a L_A + b L_B,  a = n_A / (n_A + n_B) = 1 − b,  ∂L_AB/∂(outputs of A) = a ∂L_A/∂(outputs of A),

    so that gradients by the outputs, which are cheap, tell n_B / n_A = 1/a − 1. For a sum a = b = 1. Each chunk is put
    beside the same few rows A.

    Args:
        loss: maps outputs and targets to a scalar.

    Attributes:
        joinable: whether outputs hold a row for each example; otherwise only losses can be compared.
        examples, losses: of each chunk so far; losses are not computed for a single one.
    """

    def __init__(self, loss: Callable[[Any, Any], Tensor]) -> None:
        self.loss = loss
        self.joinable = True
        self.examples: list[int] = []
        self.losses: list[Tensor] = []
        self._waiting: list[tuple[Any, Any, int]] = []
        self._rows: _Rows | None = None
        self._compared: list[_Comparison] = []
        self._eps = self._tiny = 0.0  # of the outputs' numbers
        self._all: list[tuple[Any, Any]] | None = []  # outputs and targets, unless they are too many
        self._numbers = 0

    def add(self, outputs: Any, targets: Any, size: int) -> None:
        """Another chunk."""
        self.examples.append(size)
        self._waiting.append((outputs, targets, size))
        self._numbers += sum(t.numel() for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor))
        if self._all is not None:
            self._all.append((outputs, targets))
        if self._numbers > MOST:
            self._all = None
        while len(self.examples) > 1 and self._waiting:
            if not self.joinable:
                outputs, targets, _ = self._waiting.pop(0)
                with torch.no_grad():
                    self.losses.append(self.loss(outputs, targets))
                continue
            try:
                self._rows = self._rows or next(filter(None, map(self.few, self._waiting)), None)
                if self._rows is None:  # nothing can be seen at these chunks: ignored targets, or a perfect fit
                    return
                self._compare(*self._waiting[0])
                self._waiting.pop(0)
            except (ValueError, RuntimeError, IndexError):
                self.joinable = False

    def shares(self, in_parts: Callable[[Callable[[list[Tensor], list[int]], Tensor]], bool]) -> list[float] | None:
        """The shares of the chunks, or None where they are those of the examples.

        Args:
            in_parts: tells whether all chunks' losses are a given combination of the losses of their parts.
        """
        if len(self.examples) == 1:
            return None
        if self._waiting:
            raise ValueError(
                "at the module's own parameters the loss does not depend on any of its outputs (not finite, or at its "
                "minimum?), so it cannot be seen how chunks add up; leave chunk_size out, or pass check=False if the "
                "loss is a mean over examples"
            )
        if not self.joinable:
            if in_parts(_mean):
                return None
            shares: list[float] | None = [1.0] * len(self.examples) if in_parts(_sum) else None
            if shares is None:
                raise ValueError(NOT_ADDITIVE)
            return shares
        if not all(c.additive for c in self._compared):
            raise ValueError(NOT_ADDITIVE)
        if all(self._near(c.rows, 1) and (c.chunk is None or self._near(c.chunk, 1)) for c in self._compared):
            finite = [float(loss.isfinite()) for loss in self.losses]  # nothing but NaN comes of ignored targets only
            return self._together(finite, finite)
        if not all(c.chunk is None or self._near(c.rows + c.chunk, 1) for c in self._compared):
            raise ValueError(NOT_ADDITIVE)
        assert self._rows is not None
        found = [self._rows.size * (1 / c.rows - 1) for c in self._compared]
        if all(abs(n - size) <= 100 * self._eps * size for n, size in zip(found, self.examples, strict=True)):
            return self._together([n / math.fsum(self.examples) for n in self.examples], None)
        found = [0.0 if n <= 100 * self._eps * self._rows.size else n for n in found]
        shares = [n / math.fsum(found) for n in found]
        return self._together(shares, shares)

    def _together(self, shares: list[float], result: list[float] | None) -> list[float] | None:
        """The result, if the chunks' losses with these shares make the loss of all outputs at once."""
        if self._all:
            (outputs, targets), parts = zip(*self._all, strict=True), zip(shares, self.losses, strict=True)
            with torch.no_grad():
                whole = self.loss(concatenate(list(outputs), self.examples), concatenate(list(targets), self.examples))
            terms = torch.stack([share * loss for share, loss in parts if share]).double()
            if not (whole - terms.sum()).abs() <= 1000 * self._eps * terms.abs().sum():
                raise ValueError(NOT_ADDITIVE)
        return result

    def _near(self, value: float, expected: float) -> bool:
        return abs(value - expected) <= 1000 * self._eps

    def _gradient(self, outputs: Any, targets: Any, size: int) -> tuple[Tensor, Tensor]:
        """The loss, and its gradient by the outputs, (n, …)."""
        leaves, spec = pytree.tree_flatten(outputs)
        free = [i for i, t in enumerate(leaves) if isinstance(t, Tensor) and t.is_floating_point()]
        for i in free:
            leaves[i] = leaves[i].detach().requires_grad_()
        loss = self.loss(pytree.tree_unflatten(leaves, spec), targets)
        gradients = torch.autograd.grad(loss, [leaves[i] for i in free], materialize_grads=True, allow_unused=True)
        self._eps = max(torch.finfo(g.dtype).eps for g in gradients)
        self._tiny = max(torch.finfo(g.dtype).tiny for g in gradients)
        return loss.detach(), torch.cat([g.reshape(size, -1) for g in gradients], 1).double()

    def few(self, chunk: tuple[Any, Any, int]) -> _Rows | None:
        """A few examples of a chunk (outputs, targets, size) that its loss depends on, or None."""
        outputs, targets, size = chunk
        concatenate([outputs], [size])
        _, gradient = self._gradient(outputs, targets, size)
        sizes = gradient.norm(dim=1).nan_to_num(0, 0, 0)
        rows = sizes.topk(min(4, int(sizes.count_nonzero()))).indices
        if not len(rows):
            return None
        outputs, targets = (
            pytree.tree_map(lambda t: t[rows] if isinstance(t, Tensor) and t.dim() else t, tree)
            for tree in (outputs, targets)
        )
        return _Rows(outputs, targets, len(rows), *self._gradient(outputs, targets, len(rows)))

    def _compare(self, outputs: Any, targets: Any, size: int) -> None:
        rows = self._rows
        assert rows is not None
        loss, gradient = self._gradient(outputs, targets, size)
        sizes = [rows.size, size]
        beside = concatenate([rows.outputs, outputs], sizes), concatenate([rows.targets, targets], sizes)
        together, both = self._gradient(*beside, sum(sizes))
        a, additive = self._factor(both[: rows.size], rows.gradient)
        b: float | None = None
        additive &= a > 0
        if gradient.isfinite().all() and gradient.any():
            b, also = self._factor(both[rows.size :], gradient)
            parts = torch.stack([a * rows.loss, b * loss]).double()
            fits = (together - parts.sum()).abs() <= 1000 * self._eps * parts.abs().sum()
            additive &= also and b > 0 and bool(fits)
        self.losses.append(loss)
        self._compared.append(_Comparison(a, b, additive))

    def _factor(self, gradient: Tensor, alone: Tensor) -> tuple[float, bool]:
        """The factor from one gradient to another, and whether there is one."""
        factor = float((gradient * alone).sum() / alone.square().sum())
        rounding = 1000 * self._eps * float(gradient.norm()) + self._tiny * gradient.numel() ** 0.5
        return factor, float((gradient - factor * alone).norm()) <= rounding


def _mean(losses: list[Tensor], sizes: list[int]) -> Tensor:
    return torch.stack([loss * (n / sum(sizes)) for loss, n in zip(losses, sizes, strict=True)]).sum()


def _sum(losses: list[Tensor], sizes: list[int]) -> Tensor:
    return torch.stack(losses).sum()
