"""The edge of SAM with a cached direction, read from the optimizer and what it holds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch.optim import SGD

from .edges_cached import held_edge, previous_gradient_edge, why_no_edge
from .laws import EdgeLaw, edge_law
from .optim import DIRECTION, EPSILON
from .optim.precision import total_norm

__all__ = ["CachedLaw", "cached_law"]


@dataclass(frozen=True, eq=False)
class CachedLaw(EdgeLaw):
    """The edge of a direction that is held for ``every`` steps, or of the previous descent gradient (β = 0).

    Attributes:
        every: period k of true gradients.
        held: ‖g‖ at the last true gradient; NaN where the coming step takes one, whose norm then counts.
    """

    every: int = 1
    held: float = math.nan

    def __call__(self, grad_norm: float = math.nan) -> float:
        if self.reason:
            return math.nan
        if self.takes == "descent":
            return previous_gradient_edge(grad_norm, self.learning_rate, self.rho)
        norm = grad_norm if math.isnan(self.held) else self.held
        return held_edge(norm, self.learning_rate, self.rho, self.every)


def cached_law(optimizer: Any) -> EdgeLaw:
    """The law of :class:`samlib.SAM` with ``every`` > 1 around plain gradient descent, or none and why."""
    [group] = optimizer.param_groups
    if group["every"] == 1 or not group["rho"]:
        return edge_law(optimizer)
    base = edge_law(optimizer.base_optimizer)
    reason = base.reason or why_no_edge(group["every"], group["beta"])
    if type(optimizer.base_optimizer) is not SGD or base.limit != 2 or base.weight_decay:
        reason = "the edges of cached directions are for plain gradient descent, without momentum or decay"
    held = [state[DIRECTION] for state in optimizer.state.values() if DIRECTION in state]
    return CachedLaw(
        f"SAM with a direction cached for {group['every']} steps",
        reason=reason or "",
        learning_rate=base.learning_rate,
        rho=group["rho"],
        every=group["every"],
        held=float(total_norm(held)) + EPSILON if held and group["age"] else math.nan,
        takes="gradient" if group["beta"] == 1 else "descent",
    )
