"""One measurement by several processes, each with its share of the examples: the existing solvers on shared products.

The first process solves. The others take part in its products, so that rounding, which may differ from machine to
machine, cannot lead two processes different ways, and all get the same numbers to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed
from torch.utils import _pytree as pytree

from .hessian import HessianOperator
from .objective import Objective
from .objective.reductions import Reduction

__all__ = ["Processes", "SharedHessian"]

T = TypeVar("T")


class Processes:
    """A group of processes that hold the same weights, and each its own share of the examples.

    Every method is called by all of them, in the same order. An error in one is an error in all. Where one dies, the
    next message to it fails, so that the others end with an error, at the latest after the group's time-out.

    Args:
        group: of ``torch.distributed``; ``torch.distributed.group.WORLD`` for all processes.

    Attributes:
        rank, count: of this process in the group, and how many there are.
    """

    def __init__(self, group: Any) -> None:
        self.rank, self.count = distributed.get_rank(group), distributed.get_world_size(group)
        if self.rank < 0:
            raise ValueError("this process does not belong to the group; only its members can measure")
        self._group = group
        self._first = distributed.get_process_group_ranks(group)[0]

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over the processes."""
        total = tensor.detach().clone()
        distributed.all_reduce(total, group=self._group)
        return total

    def same(self, tensor: Tensor) -> Tensor:
        """The first process's tensor, in all."""
        theirs = tensor.detach().clone()
        distributed.broadcast(theirs, self._first, group=self._group)
        return theirs

    def tell(self, found: T) -> T:
        """What the first process has found, whatever it is, in all."""
        message = [found if self.rank == 0 else None]
        distributed.broadcast_object_list(message, self._first, group=self._group)
        return message[0]  # type: ignore[return-value]

    def together(self, function: Callable[[], T]) -> T:
        """What a function that sends no messages returns in this process, once it has returned in all.

        Raises:
            RuntimeError: if it fails in another process, with the reason.
        """
        found, mine = None, None
        try:
            found = function()
        except Exception as error:
            mine = error
        self.agree(mine)
        return found  # type: ignore[return-value]

    def agree(self, mine: Exception | None) -> None:
        """Raise this process's error, or one that tells of another's; nothing if there is none in any."""
        reasons: list[Any] = [None] * self.count
        distributed.all_gather_object(reasons, _said(mine), group=self._group)
        if mine:
            raise mine
        for rank, reason in enumerate(reasons):
            if reason:
                raise RuntimeError(f"process {rank} failed: {reason}")

    def weights(self, params: Tensor) -> Tensor:
        """The weights (P,) of the first process, in all.

        Raises:
            ValueError: if this process holds others, by more than rounding.
        """
        theirs = self.same(params)

        def compare() -> Tensor:
            apart = float((theirs - params).norm())
            if apart > 1e-4 * float(theirs.norm()):
                raise ValueError(f"process {self.rank} holds other weights than the first, apart by {apart:.1e}")
            return theirs

        return self.together(compare)

    def share(self, objective: Objective) -> float:
        """The share of this process's loss in that of all examples together: for a plain mean, that of its examples.

        Means of other kinds and sums are recognised as for chunks (:class:`samlib.objective.reductions.Reduction`):
        each process puts some of its examples beside the same few of the first one's.
        """
        w = objective.layout.join()

        def prepare() -> tuple[Any, float, Any]:
            chunk, share = next(objective.weighted_chunks())
            shown = _map(Tensor.detach, objective.forward(w, chunk.inputs)), chunk.targets, chunk.size
            return shown, share, _few(objective, shown) if self.rank == 0 else None

        shown, share, few = self.together(prepare)
        few = self.tell(few)
        weight = self.together(lambda: _weight(objective, few, shown))
        if weight is None:
            return 1.0  # the loss is a sum
        weight /= share
        return weight / float(self.sum(torch.tensor(weight, dtype=torch.float64)))

    def lead(self, hessian: SharedHessian, solve: Callable[[SharedHessian], T]) -> T:
        """What a function of the Hessian returns in the first process, in all; the others help with its products."""
        if self.rank:
            return self._follow(hessian)
        try:
            found = solve(hessian)
        except BaseException as error:
            with suppress(Exception):  # whoever is still there
                hessian.announce(None)
                self.tell((None, _said(error)))
            raise
        hessian.announce(None)
        return self.tell((found, None))[0]

    def _follow(self, hessian: SharedHessian) -> Any:
        mine = None
        while (vector := hessian.announce(None)) is not None:
            try:
                hessian.product(vector)
            except Exception as error:  # the first process knows of it, and will say so
                mine = error
        found, reason = self.tell((None, None))
        if reason:
            raise mine or RuntimeError(f"process 0 failed: {reason}")
        return found


class SharedHessian:
    """The Hessian of the loss of all processes' examples, at the same weights in all.

    Args:
        local: of this process's examples.
        share: of this process's loss in that of all.
        processes: the group. All its members take part in every product, with the first one's vector.

    Attributes:
        value, gradient: the loss () and its gradient (P,).
        shape, dtype, device, params: as of a :class:`samlib.HessianOperator`.
    """

    def __init__(self, local: HessianOperator, share: float, processes: Processes) -> None:
        self._local, self._share, self._processes = local, share, processes
        self.shape, self.dtype, self.device, self.params = local.shape, local.dtype, local.device, local.params
        self.value, self.gradient = processes.sum(share * local.value), processes.sum(share * local.gradient)

    def matvec(self, vector: Tensor) -> Tensor:
        """H v for v of shape (P,)."""
        return self.product(self.announce(vector))

    __matmul__ = matvec

    def announce(self, vector: Tensor | None) -> Tensor | None:
        """The first process's vector, in all; None where it gives none."""
        message = self.gradient.new_zeros(self.shape[0] + 1)
        if vector is not None:
            message[:-1], message[-1] = vector, 1.0
        message = self._processes.same(message)
        return message[:-1] if message[-1] else None

    def product(self, vector: Tensor | None) -> Tensor:
        """H v for a vector that all have."""
        assert vector is not None
        terms, mine = self.gradient.new_zeros(self.shape[0] + 1), None
        try:
            terms[:-1] = self._share * (self._local @ vector)
        except Exception as error:
            mine, terms[-1] = error, 1.0
        total = self._processes.sum(terms)
        if total[-1]:
            self._processes.agree(mine)
        return total[:-1]


def _said(error: BaseException | None) -> str | None:
    return f"{type(error).__name__}: {error}" if error else None


def _map(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    return pytree.tree_map(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, tree)


def _few(objective: Objective, shown: tuple[Any, Any, int]) -> tuple[Any, Any, int]:
    """Some examples that the loss depends on: outputs, targets, and how many."""
    rows = objective.within(objective.layout.join(), lambda: Reduction(objective.loss).few(shown))
    if rows is None:
        raise ValueError("at the present weights the loss does not depend on the outputs of the first process")
    return _map(Tensor.cpu, rows.outputs), _map(Tensor.cpu, rows.targets), rows.size


def _weight(objective: Objective, few: tuple[Any, Any, int], shown: tuple[Any, Any, int]) -> float | None:
    """What the examples shown weigh in a mean where each of the few weighs 1 on average; None if it is a sum."""

    def compare() -> list[float] | None:
        reduction = Reduction(objective.loss)
        outputs, targets = (_map(lambda t: t.to(objective.layout.device), tree) for tree in few[:2])
        reduction.add(outputs, targets, few[2])
        reduction.add(*shown)
        return reduction.shares(_not_joinable)

    shares = objective.within(objective.layout.join(), compare)
    if shares is None:
        return float(shown[2])
    return None if sum(shares) > 1.5 else few[2] * shares[1] / shares[0]


def _not_joinable(_: Any) -> bool:
    raise ValueError("several processes need a loss of outputs and targets that hold a row for each example")
