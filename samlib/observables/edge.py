"""The edge of stability at a point of a run."""

from __future__ import annotations

import math

from ..edge_row import EdgeRow
from .base import Observable, Point

__all__ = ["EDGE"]


def edge(point: Point) -> dict[str, float]:
    """The spectrum's ends, the gradients, and the edges they set; see :meth:`samlib.edge_row.EdgeRow.measure`.

    Raises:
        FloatingPointError: if the Hessian or the gradient is not finite.
    """
    config = point.config
    how = EdgeRow(
        point.law,
        point.learning_rate,
        config.rho if config.rule == "sam" else math.nan,
        config.eigenvalues,
        config.tolerance,
        point.generator,
        point.memory,
    )
    row = how.measure(point.operator, point.descent)
    point.principal = how.principal
    return row


EDGE = Observable("edge", edge)
