"""The universal class: what is recorded for the chapter, and what is claimed."""

from __future__ import annotations

from ..config import RunConfig
from .base import Chapter

__all__ = ["CHAPTER"]


def _configs() -> list[RunConfig]:
    return []


CHAPTER = Chapter("universal_sam", "The universal class", "tahmasebi2024universal", _configs, ())
