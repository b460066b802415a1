"""The stochastic edge: what is recorded for the chapter, and what is claimed."""

from __future__ import annotations

from ..config import RunConfig
from .base import Chapter

__all__ = ["CHAPTER"]


def _configs() -> list[RunConfig]:
    return []


CHAPTER = Chapter("stochastic_edge", "The stochastic edge", "agarwala2024high", _configs, ())
