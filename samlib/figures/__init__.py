"""Pictures and tables of recorded runs, for notebooks and pages."""

from ..selection import changed, command, leading, standard, tidy, typical, with_spectrum
from .paper import (
    alignments,
    banner,
    beside,
    card,
    edge_ratios,
    eigenvalues,
    evaluation,
    final_table,
    headline,
    losses,
    norms_and_edges,
)
from .shapes import SHOWN, forest, panels
from .style import COLOURS, LABELS, Figure, drawing, render

__all__ = [
    "COLOURS",
    "LABELS",
    "SHOWN",
    "Figure",
    "alignments",
    "banner",
    "beside",
    "card",
    "changed",
    "command",
    "drawing",
    "edge_ratios",
    "eigenvalues",
    "evaluation",
    "final_table",
    "forest",
    "headline",
    "leading",
    "losses",
    "norms_and_edges",
    "panels",
    "render",
    "standard",
    "tidy",
    "typical",
    "with_spectrum",
]
