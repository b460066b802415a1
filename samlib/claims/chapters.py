"""The chapters: related systems with runs, toy problems and claims of their own. Adding one is an entry here."""

from __future__ import annotations

import io
from pathlib import Path

import pandas as pd

from ..files import atomic_write
from ..provenance import commit
from ..runs import published_path
from . import balanced_features, graphsam, kinks, stochastic_edge, universal_sam, which_edge

__all__ = ["CHAPTERS", "SYSTEMS", "publish_toys", "published_toys"]

_RELATED = (stochastic_edge.CHAPTER, universal_sam.CHAPTER, graphsam.CHAPTER, balanced_features.CHAPTER)
SYSTEMS = tuple(chapter.name for chapter in _RELATED)  # the related systems; the other chapters are the book's own
_ALL = (kinks.CHAPTER, *_RELATED, which_edge.CHAPTER)
CHAPTERS = {chapter.name: chapter for chapter in _ALL}


def publish_toys(name: str, folder: Path | None = None) -> None:
    """Solve a chapter's toy problems and write their tables down, one file each, with the commit."""
    for toy, solve in CHAPTERS[name].toys.items():
        buffer = io.BytesIO()
        frame = solve()
        frame.attrs = {"commit": commit()}
        frame.to_parquet(buffer, index=False)
        atomic_write(_toy_path(name, toy, folder), buffer.getvalue())


def published_toys(name: str, folder: Path | None = None) -> dict[str, pd.DataFrame]:
    """The results of a chapter's toy problems that are published, by name."""
    paths = {toy: _toy_path(name, toy, folder) for toy in CHAPTERS[name].toys}
    return {toy: pd.read_parquet(path) for toy, path in paths.items() if path.exists()}


def _toy_path(name: str, toy: str, folder: Path | None) -> Path:
    return published_path(name, folder).with_suffix(f".{toy}.parquet")
