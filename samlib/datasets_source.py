"""Temporary: ``Source`` with the interface of samlib/datasets/base.py on main. Delete it when that is there."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import datasets
from .datasets import DataError, DataPolicy, Dataset, RemoteFile

__all__ = ["Source", "take"]

take = datasets._take


@dataclass(frozen=True)
class Source:
    name: str
    files: tuple[RemoteFile, ...]
    read: Callable[..., Any]
    standin: Callable[[], Any]
    prepare: Callable[..., Any]

    def locate(self):
        datasets.FILES[self.name] = self.files
        try:
            return datasets.locate(self.name)
        finally:
            del datasets.FILES[self.name]

    def load(self, examples: int | None = None, policy: DataPolicy = "auto", **options: Any) -> Dataset:
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
        content, (x, y, x_test, y_test) = self.prepare(raw, examples, label, **options)
        digest = hashlib.sha256()
        for array in content:
            digest.update(f"{array.shape}".encode())
            digest.update(array.astype("<i2").tobytes())
        return Dataset(label, x, y, x_test, y_test, standin, digest.hexdigest())
