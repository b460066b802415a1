"""Digits on CIFAR-10: one label, an easy feature (the digit above) and a hard one (the object below)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..features import Labelled, ProbeSets
from .base import DataPolicy, Probed, fingerprint
from .files import DataError
from .images import CIFAR10, MNIST

__all__ = ["CLASSES", "TILES", "load_dominoes"]

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
"""CIFAR-10's classes in the order of its labels."""
TILES = (4, 8, 16, 32)
"""Sides of a tile, in pixels: the pictures' 32 divided by a whole number."""

Draw: TypeAlias = Callable[[np.ndarray], np.ndarray]  # labels (N,) to that many pictures never drawn before
_Numbers = np.random.Generator


def load_dominoes(
    classes: Sequence[str] = CLASSES,
    *,
    images_per_class: int = 400,
    test_images_per_class: int = 400,
    agreement: float = 1.0,
    tile: int = 16,
    seed: int = 0,
    policy: DataPolicy = "auto",
) -> Probed:
    """Load the dominoes: an MNIST digit above a CIFAR-10 object, digit k with the k-th class.

    Pictures of 32×32 (digits with their frame) are averaged down to tiles; an image is (3, 2·tile, tile), standardised
    by each channel's mean and deviation over the training images. Each object and each digit is used once in training.
    The test set is halved: one half for the test set of the same kind as training, one for the probes.

    Args:
        classes: at least two of :data:`CLASSES`.
        images_per_class: training images, of CIFAR-10's first batch.
        test_images_per_class: images of each half of the test set.
        agreement: share of the images of training and test set whose digit is that of their class, within each class
            and up to rounding; the others show one of the other digits, all equally often.
        tile: side of a tile, one of :data:`TILES`.
        seed: of the choice of objects and digits, of their pairs and their order.
        policy: as for :func:`samlib.load_dataset`; the stand-in takes the place of both data sets together.

    Returns:
        The data set, with one-hot training targets, and probes of "object" and "digit" (the position of the class
        among those asked for): the objects of training, and objects of the test set never trained on, both under
        digits that neither training nor the other set has seen, and that say nothing about the object.

    Raises:
        DataError: if ``policy="real"`` and the data cannot be had, or there are fewer images than asked for.
        ValueError: naming the argument that is out of range.

    Source: Shah et al. (2020), arXiv:2006.07710, "dominoes" of MNIST and CIFAR-10; Springer et al. (2024),
    arXiv:2405.20439.
    """
    _check(classes, images_per_class, test_images_per_class, agreement, tile, policy)
    random = np.random.default_rng(seed)
    draws, standin = _pictures(classes, random, policy)
    objects, digits, test_objects, test_digits = draws
    count, size, test_size = len(classes), images_per_class, test_images_per_class

    def labels(per_class: int) -> np.ndarray:
        return _shuffled(np.repeat(np.arange(count), per_class), random)

    train, test, probe_test = labels(size), labels(test_size), labels(test_size)
    shown = [_digits(y, count, random, agreement) for y in (train, test)]
    independent = [_digits(y, count, random) for y in (train, probe_test)]
    pictures = objects(train)
    parts = [
        _dominoes(digits(shown[0]), pictures, tile),
        _dominoes(test_digits(shown[1]), test_objects(test), tile),
        _dominoes(digits(independent[0]), pictures, tile),
        _dominoes(test_digits(independent[1]), test_objects(probe_test), tile),
    ]
    x, x_test, x_probe, x_probe_test = _standardised(parts)
    y, y_test = torch.as_tensor(train), torch.as_tensor(test)
    probes = ProbeSets(
        Labelled(x_probe, {"object": y, "digit": torch.as_tensor(independent[0])}),
        Labelled(x_probe_test, {"object": torch.as_tensor(probe_test), "digit": torch.as_tensor(independent[1])}),
    )
    name = "digits_on_cifar" + (" stand-in: generated colour gratings under drawn digits" if standin else "")
    content = fingerprint([*parts, train, test, probe_test, *shown, *independent])
    return Probed(name, x, F.one_hot(y, count).float(), x_test, y_test, standin, content, probes)


def _check(classes: Sequence[str], size: int, test_size: int, agreement: float, tile: int, policy: str) -> None:
    unknown = [name for name in classes if name not in CLASSES]
    if isinstance(classes, str) or unknown or len(classes) < 2 or len(set(classes)) < len(classes):
        raise ValueError(f"classes must be at least two different ones of {', '.join(CLASSES)}, got {classes!r}")
    for name, value in (("images_per_class", size), ("test_images_per_class", test_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value!r}")
    if not 0 <= agreement <= 1:
        raise ValueError(f"agreement must be a share between 0 and 1, got {agreement!r}")
    if tile not in TILES:
        raise ValueError(f"tile must be one of {', '.join(map(str, TILES))}, got {tile!r}")
    if policy not in ("auto", "real", "standin"):
        raise ValueError(f"data must be 'auto', 'real' or 'standin', got {policy!r}")


def _shuffled(values: np.ndarray, random: _Numbers) -> np.ndarray:
    """In random order, by raw bits: NumPy promises to keep these, but not what ``permutation`` makes of them."""
    return values[np.argsort(random.bit_generator.random_raw(len(values)), kind="stable")]


def _digits(objects: np.ndarray, count: int, random: _Numbers, agreement: float | None = None) -> np.ndarray:
    """A digit for each object: right for a share of each class, else another; by default independent of the object.

    What is left to chance is spread evenly within each class of objects, so that it says nothing about the class.
    """
    digits = objects.copy()
    for label in range(count):
        where = _shuffled(np.flatnonzero(objects == label), random)
        options = np.arange(count)
        if agreement is not None:
            where, options = where[round(agreement * len(where)) :], np.delete(options, label)
        digits[where] = _shuffled(options, random)[np.arange(len(where)) % len(options)]
    return digits


def _dominoes(digits: np.ndarray, objects: np.ndarray, tile: int) -> np.ndarray:
    """Digits (N, 1, 28, 28) above objects (N, 3, 32, 32), as sums over the pixels that a tile's pixel covers."""
    framed = np.pad(digits, ((0, 0), (0, 0), (2, 2), (2, 2))).repeat(3, axis=1)
    factor = 32 // tile
    both = np.concatenate([framed, objects], axis=2).reshape(len(digits), 3, 2 * tile, factor, tile, factor)
    return both.sum((3, 5), dtype=np.int16)


def _standardised(parts: list[np.ndarray]) -> list[Tensor]:
    """Zero mean and unit variance of each channel over the first part; whole numbers before, so rounded only once."""
    mean = parts[0].mean((0, 2, 3), keepdims=True, dtype=np.float64)
    deviation = parts[0].std((0, 2, 3), keepdims=True, dtype=np.float64)
    return [torch.as_tensor(((part - mean) / deviation).astype(np.float32)) for part in parts]


def _pictures(classes: Sequence[str], random: _Numbers, policy: DataPolicy) -> tuple[tuple[Draw, ...], bool]:
    """Where objects and digits come from, in training and test, and whether they are stand-ins."""
    if policy != "standin":
        try:
            cifar, mnist = (source.read(source.locate()) for source in (CIFAR10, MNIST))
        except DataError as error:
            if policy == "real":
                raise
            message = f"{error}\nUsing a stand-in for digits_on_cifar: its results do not count."
            warnings.warn(message, UserWarning, stacklevel=3)
        else:
            kinds = [CLASSES.index(name) for name in classes], list(range(len(classes)))
            what = [list(classes), [f"digit {k}" for k in kinds[1]]]
            return tuple(
                _Pool(data[part], data[part + 1], kind, names, random)
                for part in (0, 2)
                for data, kind, names in zip((cifar, mnist), kinds, what, strict=True)
            ), False
    standins = partial(_gratings, random=random), partial(_drawn_digits, random=random)
    return (*standins, *standins), True


class _Pool:
    """Pictures of some classes in random order, each of which is given out once."""

    def __init__(
        self, pictures: np.ndarray, labels: np.ndarray, kinds: list[int], names: list[str], random: _Numbers
    ) -> None:
        self.pictures, self.names = pictures, names
        self.left = [_shuffled(np.flatnonzero(labels == kind), random) for kind in kinds]
        self.held = [len(left) for left in self.left]

    def __call__(self, labels: np.ndarray) -> np.ndarray:
        chosen = np.empty(len(labels), dtype=np.int64)
        for label, left in enumerate(self.left):
            where = np.flatnonzero(labels == label)
            if len(where) > len(left):
                raise DataError(
                    f"asked for {self.held[label] - len(left) + len(where)} pictures of {self.names[label]}, but there "
                    f"are {self.held[label]}; ask for fewer images per class"
                )
            chosen[where], self.left[label] = left[: len(where)], left[len(where) :]
        return self.pictures[chosen]


def _gratings(labels: np.ndarray, random: _Numbers) -> np.ndarray:
    """Colour gratings (N, 3, 32, 32) whose angle and frequency tell ten classes apart, with much noise."""
    y, x = np.mgrid[0:32, 0:32].astype(np.float32) / 32
    angle = (labels % 5 * np.pi / 5).astype(np.float32)[:, None, None]
    frequency = np.where(labels < 5, 2, 4).astype(np.float32)[:, None, None]
    phase, *tint = random.random((4, len(labels), 1, 1), dtype=np.float32)
    wave = np.sin(2 * np.pi * (frequency * (x * np.cos(angle) + y * np.sin(angle)) + phase))
    noise = random.standard_normal((len(labels), 3, 32, 32), dtype=np.float32)
    images = 128 + 60 * (0.3 + 0.7 * np.stack(tint, axis=1)) * wave[:, None] + 40 * noise
    return images.clip(0, 255).astype(np.uint8)


# Five rows of three bits for each digit.
_GLYPHS = ("75557", "26227", "71747", "71717", "55711", "74717", "74757", "71111", "75757", "75717")


def _drawn_digits(labels: np.ndarray, random: _Numbers) -> np.ndarray:
    """Block digits (N, 1, 28, 28) of random place and ink, with some noise."""
    bits = np.array([[[int(row) >> (2 - c) & 1 for c in range(3)] for row in glyph] for glyph in _GLYPHS])
    shapes = bits.repeat(4, 1).repeat(4, 2)
    images = np.zeros((len(labels), 28, 28))
    places = random.integers(0, (9, 17), (len(labels), 2))
    ink = random.uniform(150, 235, len(labels))
    for image, label, (top, left), strength in zip(images, labels, places, ink, strict=True):
        image[top : top + 20, left : left + 12] = strength * shapes[label]
    return (images + random.uniform(0, 20, images.shape)).astype(np.uint8)[:, None]
