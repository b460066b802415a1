"""What a SAM step checks: its settings, its base optimizer, the closure's gradients, and whether the weights moved."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .precision import total_norm, wide

__all__ = ["OWN", "Accumulation", "check_base", "check_group", "rounded_away", "share_groups", "without_own"]

OWN = ("rho", "normalize", "adaptive", "every", "beta", "age")  # SAM's names in the parameter groups


def check_group(group: dict[str, Any], others: Sequence[dict[str, Any]]) -> None:
    """Raise a ValueError if a parameter group's settings are out of range, or its period is not that of the others."""
    rho, every, beta = group["rho"], group["every"], group["beta"]
    if not _between(rho, 0, math.inf) or rho == math.inf:
        raise ValueError(f"rho must be a non-negative finite number, got {rho!r}")
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"every must be a whole number of steps, at least 1, got {every!r}")
    if not _between(beta, 0, 1):
        raise ValueError(f"beta must be a number from 0 to 1, got {beta!r}")
    for name in ("normalize", "adaptive"):
        if not isinstance(group[name], bool):
            raise ValueError(f"{name} must be True or False, got {group[name]!r}")
    if others and every != others[0]["every"]:
        raise ValueError(
            f"every must be the same in all parameter groups, got {every} and {others[0]['every']}: the closure gives "
            "all gradients at once. Set it once, as an argument of SAM."
        )


def _between(value: Any, low: float, high: float) -> bool:
    try:
        return bool(low <= value <= high)
    except TypeError:  # no number
        return False


def check_base(base: torch.optim.Optimizer) -> None:
    """Raise a ValueError for a base optimizer that evaluates the closure itself."""
    closure = inspect.signature(base.step).parameters.get("closure")
    if closure and closure.default is closure.empty:
        raise ValueError(
            f"{type(base).__name__} evaluates a closure itself, at points of its own choice, so it cannot be handed "
            "one gradient. Choose another base optimizer, SGD or Adam say."
        )


def without_own(group: dict[str, Any]) -> dict[str, Any]:
    """A parameter group as the base optimizer should get it, which may have settings of the same names."""
    return {name: value for name, value in group.items() if name not in OWN}


def share_groups(base: torch.optim.Optimizer, defaults: dict[str, Any]) -> list[dict[str, Any]]:
    """Let SAM and its base optimizer share parameter groups, and give them to SAM.

    They are the same dictionaries, and in the same list. Only where a setting of the base has a name of SAM's, as
    Adadelta's decay ``rho`` has, the base sees its own value there (and SAM finds it in ``group["base"]``).

    Args:
        base: the base optimizer, its groups new, loaded or shared already.
        defaults: SAM's values for groups that know nothing of SAM.
    """
    clash = set(OWN) & set(base.defaults)
    groups = [g.shared if isinstance(g, KeptApart) else g for g in base.param_groups]
    for group in groups:
        if clash and "base" not in group:  # of the base itself, or of a SAM around another one
            sams = group.keys() >= set(OWN)
            group["base"] = {name: base.defaults[name] if sams else group.pop(name) for name in clash}
        for name in OWN:
            group.setdefault(name, defaults[name])
    base.param_groups = [KeptApart(g) for g in groups] if clash else groups  # type: ignore[misc]
    return groups


class KeptApart(MutableMapping[str, Any]):
    """A parameter group in which ``group["base"]`` comes first, also for writing."""

    def __init__(self, shared: dict[str, Any]) -> None:
        self.shared = shared

    def _home(self, name: str) -> dict[str, Any]:
        return self.shared["base"] if name in self.shared["base"] else self.shared

    def __getitem__(self, name: str) -> Any:
        return self._home(name)[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self._home(name)[name] = value

    def __delitem__(self, name: str) -> None:
        del self._home(name)[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.shared)

    def __len__(self) -> int:
        return len(self.shared)


def rounded_away(moves: Iterable[tuple[Tensor, Tensor, Tensor]]) -> str | None:
    """What to say if parameters of a type moved by less than half of what they should have; else None.

    Args:
        moves: a parameter, its values before, and the norm of the wanted change.
    """
    moves = list(moves)
    for dtype in {p.dtype for p, _, _ in moves}:
        here = [(p, before, wanted) for p, before, wanted in moves if p.dtype == dtype]
        moved = float(total_norm(wide(p) - wide(before) for p, before, _ in here))
        wanted = float(total_norm(wanted for _, _, wanted in here))
        if moved < wanted / 2:
            name = str(dtype).removeprefix("torch.")
            return (
                f"SAM's perturbation is lost to rounding: the {name} parameters moved by {moved:.2g} instead of "
                f"{wanted:.2g}, so that the step is nearly the base optimizer's at twice the price. Keep parameters "
                "in a wider type (torch.autocast computes in bfloat16 or float16 all the same), or raise rho."
            )
    return None


class Accumulation:
    """Notices a backward pass that adds to gradients from before.

    Args:
        params: the parameters to look at; those without a gradient now cannot be added to.

    Raises:
        RuntimeError: at :meth:`close`, if it happened.
    """

    def __init__(self, params: Iterable[Tensor]) -> None:
        self._there: list[Tensor] = []  # whether a gradient was there, kept on its device: looking waits for it
        watched = [p for p in params if p.grad is not None and p.requires_grad]
        self._new = set(watched)
        self._handles = [p.register_hook(partial(self._look, p)) for p in watched]

    def _look(self, p: Tensor, _: Tensor) -> None:
        """Called with a parameter's new gradient before it is added; later ones add to it by intention."""
        if p in self._new:
            self._new.remove(p)
            if p.grad is not None:
                self._there.append(wide(p.grad).any())

    def stop(self) -> None:
        """Stop looking."""
        for handle in self._handles:
            handle.remove()

    def close(self) -> None:
        """Stop looking, and tell."""
        self.stop()
        if any(map(bool, self._there)):
            raise RuntimeError(
                "the backward pass added to gradients from before. Zero them first (optimizer.zero_grad() at the start "
                "of the closure), and accumulate micro-batches inside the closure: it is evaluated at several points."
            )
