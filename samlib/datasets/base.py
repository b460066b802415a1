"""A data set, and how it comes about: from checked files, or as an offline stand-in that says what it is."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from torch import Tensor

from ..features import ProbeSets
from .files import DataError, RemoteFile, locate

__all__ = ["DataPolicy", "Dataset", "Probed", "Source", "fingerprint", "take"]

DataPolicy = Literal["auto", "real", "standin"]
Tensors: TypeAlias = tuple[Any, Tensor, Any, Tensor]


@dataclass(frozen=True)
class Dataset:
    """Training and test examples, ready for a model.

    Attributes:
        name: of the data set, or of what stands in for it.
        train_inputs, train_targets: float images (N, C, H, W) and one-hot targets (N, 10); or tokens (N, T) twice;
            inputs may be several tensors with the examples first, in a tuple or dictionary.
        test_inputs, test_targets: the same for the test set; image targets are labels (M,).
        standin: whether this is a stand-in, never to be counted as a result.
        fingerprint: SHA-256 over the pixels, labels or tokens before any floating-point arithmetic: the identity of
            the data in a run's id, the same on every machine.
    """

    name: str
    train_inputs: Any
    train_targets: Tensor
    test_inputs: Any
    test_targets: Tensor
    standin: bool
    fingerprint: str


@dataclass(frozen=True)
class Probed(Dataset):
    """A data set with examples by which to probe what a network's features know of several labels.

    Attributes:
        probes: the examples that probes are trained on and tested with.
    """

    probes: ProbeSets


@dataclass
class Source:
    r"""Where the data of an experiment come from.

    Attributes:
        name: of the data set.
        files: the public files it consists of.
        read: makes raw data of the files' paths.
        standin: makes raw data of the same form from nothing; its docstring says what they are.
        prepare: makes tensors of raw data: (raw, examples, label, \*\*options) to the arrays that were used, which
            identify the data, and training inputs and targets, test inputs and targets.
        archive: a tar file that holds the files, where they cannot be had one by one.
    """

    name: str
    files: tuple[RemoteFile, ...]
    read: Callable[[list[Path]], Any]
    standin: Callable[[], Any]
    prepare: Callable[..., tuple[list[np.ndarray], Tensors]]
    archive: RemoteFile | None = None

    def locate(self) -> list[Path]:
        """Paths of the files, verified; see :func:`samlib.datasets.files.locate`."""
        return locate(self.name, self.files, self.archive)

    def load(self, examples: int | None = None, policy: DataPolicy = "auto", **options: Any) -> Dataset:
        """See :func:`samlib.load_dataset`; options are for ``prepare``."""
        if policy not in ("auto", "real", "standin"):
            raise ValueError(f"data must be 'auto', 'real' or 'standin', got {policy!r}")
        standin = policy == "standin"
        if not standin:
            try:
                raw = self.read(self.locate())
            except DataError as error:
                if policy == "real":
                    raise
                message = f"{error}\nUsing a stand-in for {self.name}: its results do not count."
                warnings.warn(message, UserWarning, stacklevel=3)
                standin = True
        if standin:
            raw = self.standin()
        label = f"{self.name} stand-in: {self.standin.__doc__}" if standin else self.name
        content, tensors = self.prepare(raw, examples, label, **options)
        return Dataset(label, *tensors, standin, fingerprint(content))


def fingerprint(content: Iterable[np.ndarray]) -> str:
    """SHA-256 over arrays of small whole numbers and their shapes."""
    digest = hashlib.sha256()
    for array in content:
        digest.update(f"{array.shape}".encode())
        digest.update(array.astype("<i2").tobytes())
    return digest.hexdigest()


def take(available: int, examples: int | None, label: str) -> int:
    """How many training examples to use.

    Raises:
        DataError: if there are fewer than asked for.
    """
    if examples is not None and examples > available:
        raise DataError(f"asked for {examples} training examples, but {label} has {available}")
    return examples or available
