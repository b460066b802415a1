"""Verdicts on claims, from recorded runs only."""

from .verdicts import (
    CLAIMS,
    Claim,
    Verdict,
    agrees_with_record,
    evaluate,
    last_half,
    record,
    summary,
    table,
    verdicts,
)

__all__ = [
    "CLAIMS",
    "Claim",
    "Verdict",
    "agrees_with_record",
    "evaluate",
    "last_half",
    "record",
    "summary",
    "table",
    "verdicts",
]
