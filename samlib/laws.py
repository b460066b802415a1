"""Temporary: replaced by the branch of the edges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .edges import gd_edge, sam_edge


@dataclass(frozen=True)
class EdgeLaw:
    name: str
    rate: float
    rho: float
    scale: Tensor | None = None
    reason: str = ""

    def __call__(self, grad_norm: float) -> float:
        return sam_edge(grad_norm, self.rate, self.rho) if self.rho else gd_edge(self.rate)


def edge_law(optimizer: Any) -> EdgeLaw:
    group = optimizer.param_groups[0]
    return EdgeLaw("SAM", float(group["lr"]), group.get("rho", 0.0))
