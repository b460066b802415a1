"""Verdicts on claims, from recorded runs and toy problems only."""

from .base import (
    PARTLY,
    REPRODUCED,
    Chapter,
    Claim,
    Evidence,
    Unit,
    Verdict,
    bootstrap,
    evaluate,
    last_half,
    paired,
    rows_at_an_edge,
)
from .chapters import CHAPTERS, SYSTEMS, publish_toys, published_toys
from .paper import CLAIMS, fall_at_the_edge
from .verdicts import agrees_with_record, of_chapter, of_experiment, record, recorded, table, verdicts

__all__ = [
    "CHAPTERS",
    "CLAIMS",
    "PARTLY",
    "REPRODUCED",
    "SYSTEMS",
    "Chapter",
    "Claim",
    "Evidence",
    "Unit",
    "Verdict",
    "agrees_with_record",
    "bootstrap",
    "evaluate",
    "fall_at_the_edge",
    "last_half",
    "of_chapter",
    "of_experiment",
    "paired",
    "publish_toys",
    "published_toys",
    "record",
    "recorded",
    "rows_at_an_edge",
    "table",
    "verdicts",
]
