"""Where the project lies, and writing files so that no reader ever sees half of one."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

__all__ = ["PROJECT", "as_path", "as_text", "atomic_write"]

_PARENT = Path(__file__).parents[1]
PROJECT = _PARENT if (_PARENT / "_toc.yml").exists() else None
"""The checkout that this package stands in, with its notebooks and published runs; None where it is installed alone."""


def atomic_write(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or the next process after a crash, sees all of it or the one before.

    Several processes may write the same file at once, also on machines that share the folder: one of them wins.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)  # a full disk is not made fuller
        raise


def as_text(path: str | os.PathLike[str]) -> str:
    """A path as it reads in UTF-8, for files and processes of another locale than this one's."""
    return os.fsencode(path).decode("utf-8", "surrogateescape")


def as_path(text: str) -> Path:
    """The path that :func:`as_text` made a text of."""
    return Path(os.fsdecode(text.encode("utf-8", "surrogateescape")))
