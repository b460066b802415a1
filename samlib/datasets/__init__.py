"""Data sets, checked before use; offline stand-ins that say what they are."""

from __future__ import annotations

from .base import DataPolicy, Dataset, Source
from .files import DataError, RemoteFile, data_folders
from .images import CIFAR10, MNIST
from .text import SHAKESPEARE

__all__ = ["SOURCES", "DataError", "DataPolicy", "Dataset", "RemoteFile", "Source", "data_folders", "load_dataset"]

SOURCES = {source.name: source for source in (MNIST, CIFAR10, SHAKESPEARE)}


def load_dataset(
    name: str, examples: int | None = None, policy: DataPolicy = "auto", sequence_length: int = 64
) -> Dataset:
    """Load the data of one of the paper's experiments.

    Args:
        name: "mnist", "cifar10" or "shakespeare".
        examples: number of training examples, from the first on; all by default.
        policy: "real" loads the real set from ``$SAMLIB_DATA`` or ``data/``, or downloads it there; "standin" never
            touches files or network; "auto" tries the real set and falls back to the stand-in, with a warning.
        sequence_length: tokens in each training sequence of text.

    Returns:
        A :class:`Dataset`.

    Raises:
        DataError: if ``policy="real"`` and the data cannot be had, or there are fewer examples than asked for.
        ValueError: for an unknown name or policy.
    """
    if name not in SOURCES:
        raise ValueError(f"data set must be one of {', '.join(SOURCES)}, got {name!r}")
    options = {"sequence_length": sequence_length} if name == "shakespeare" else {}
    return SOURCES[name].load(examples, policy, **options)
