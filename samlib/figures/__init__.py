"""Pictures and tables of recorded runs, for notebooks and pages."""

from ..selection import changed, command, leading, standard, tidy, typical, with_spectrum
from .doors import doors
from .paper import (
    alignments,
    banner,
    beside,
    edge_ratios,
    eigenvalues,
    evaluation,
    final_table,
    losses,
    norms_and_edges,
)
from .shapes import SHOWN, forest, panels
from .story import card, headline, seen, standalone
from .style import COLOURS, LABELS, Figure, drawing, render, wide
from .verdicts import chapter, claims, fold, judge, outcome, said
from .words import alignments_in_words, losses_in_words, mean_in_words, norms_in_words, ratios_in_words

__all__ = [
    "COLOURS",
    "LABELS",
    "SHOWN",
    "Figure",
    "alignments",
    "alignments_in_words",
    "banner",
    "beside",
    "card",
    "changed",
    "chapter",
    "claims",
    "command",
    "doors",
    "drawing",
    "edge_ratios",
    "eigenvalues",
    "evaluation",
    "final_table",
    "fold",
    "forest",
    "headline",
    "judge",
    "leading",
    "losses",
    "losses_in_words",
    "mean_in_words",
    "norms_and_edges",
    "norms_in_words",
    "outcome",
    "panels",
    "ratios_in_words",
    "render",
    "said",
    "seen",
    "standalone",
    "standard",
    "tidy",
    "typical",
    "wide",
    "with_spectrum",
]
