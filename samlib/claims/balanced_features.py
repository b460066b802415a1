"""Balanced features: what is recorded for the chapter, and what is claimed."""

from __future__ import annotations

from ..config import RunConfig
from .base import Chapter

__all__ = ["CHAPTER"]


def _configs() -> list[RunConfig]:
    return []


CHAPTER = Chapter("balanced_features", "Balanced features", "springer2024sharpness", _configs, ())
