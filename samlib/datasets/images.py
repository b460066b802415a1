"""MNIST and CIFAR-10, preprocessed as in the paper's reference code."""

from __future__ import annotations

import gzip
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .base import Source, Tensors, take
from .files import RemoteFile

__all__ = ["CIFAR10", "MNIST", "from_torchvision"]

_MNIST_MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)


def _mnist(name: str, md5: str) -> RemoteFile:
    return RemoteFile(f"MNIST/raw/{name}", "md5", md5, tuple(mirror + name for mirror in _MNIST_MIRRORS))


_ARCHIVE = RemoteFile(
    "cifar-10-python.tar.gz",
    "md5",
    "c58f30108f718f92721af3b95e74349a",
    ("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",),
)


def _load_mnist(paths: list[Path]) -> tuple[np.ndarray, ...]:
    def idx(path: Path) -> np.ndarray:
        content = gzip.decompress(path.read_bytes())
        dimensions = content[3]
        shape = np.frombuffer(content, ">i4", dimensions, 4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)

    train, train_labels, test, test_labels = map(idx, paths)
    return train[:, None], train_labels, test[:, None], test_labels


def _load_cifar10(paths: list[Path]) -> tuple[np.ndarray, ...]:
    datasets = from_torchvision("datasets")
    first_batch = next(entry for entry in datasets.CIFAR10.train_list if entry[0] == paths[0].name)
    FirstBatch = type("FirstBatch", (datasets.CIFAR10,), {"train_list": [first_batch]})
    root = str(paths[0].parent.parent)
    parts = [FirstBatch(root, train=train) for train in (True, False)]
    train, test = ((part.data.transpose(0, 3, 1, 2), np.array(part.targets)) for part in parts)
    return *train, *test


_operators: Any = None  # what is declared lives as long as its library


def from_torchvision(module: str) -> Any:
    """A module of torchvision, also beside a PyTorch without torchvision's compiled operators.

    A CPU build of torch beside a CUDA build of torchvision fails on import with "operator torchvision::nms does not
    exist". Declaring the two operators that the import looks up makes data sets and classifiers usable.
    """
    try:
        return import_module(f"torchvision.{module}")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        global _operators
        _operators = torch.library.Library("torchvision", "DEF")
        _operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return import_module(f"torchvision.{module}")


def _digits() -> tuple[np.ndarray, ...]:
    """scikit-learn's 8×8 handwritten digits (1,500 to train, 297 to test)"""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = (images * 16).reshape(-1, 1, 8, 8)
    return images[:1500], labels[:1500], images[1500:], labels[1500:]


def _colour_shapes() -> tuple[np.ndarray, ...]:
    """generated 32×32 colour gratings in ten classes, with noise (1,000 to train, 500 to test)"""
    random = np.random.default_rng(0)
    labels = random.integers(0, 10, 1500)
    y, x = np.mgrid[0:32, 0:32] / 32
    angle = (labels % 5 * np.pi / 5)[:, None, None]
    frequency = np.where(labels < 5, 2, 4)[:, None, None]
    phase = random.uniform(0, 2 * np.pi, (1500, 1, 1))
    wave = np.sin(2 * np.pi * frequency * (x * np.cos(angle) + y * np.sin(angle)) + phase)
    tint = random.uniform(0.3, 1, (1500, 3, 1, 1))
    images = 128 + 60 * tint * wave[:, None] + random.normal(0, 40, (1500, 3, 32, 32))
    images = images.clip(0, 255).round()
    return images[:1000], labels[:1000], images[1000:], labels[1000:]


def _images(arrays: tuple[np.ndarray, ...], examples: int | None, label: str) -> tuple[list[np.ndarray], Tensors]:
    """The reference's preprocessing: x/256, minus the mean training image; one-hot training targets."""
    train, train_labels, test, test_labels = arrays
    count = take(len(train), examples, label)
    content = [train[:count], train_labels[:count], test, test_labels]
    x, x_test = (torch.as_tensor(np.array(a), dtype=torch.float32) / 256 for a in (content[0], test))
    y, y_test = (torch.as_tensor(np.array(a), dtype=torch.long) for a in (content[1], test_labels))
    mean = x.mean(0)
    return content, (x - mean, torch.nn.functional.one_hot(y, 10).float(), x_test - mean, y_test)


MNIST = Source(
    "mnist",
    # The MD5 sums are those of torchvision.
    (
        _mnist("train-images-idx3-ubyte.gz", "f68b3c2dcbeaaa9fbdd348bbdeb94873"),
        _mnist("train-labels-idx1-ubyte.gz", "d53e105ee54ea40749a09fcbcd1e9432"),
        _mnist("t10k-images-idx3-ubyte.gz", "9fb629c4189551a2d022fa330f9573f3"),
        _mnist("t10k-labels-idx1-ubyte.gz", "ec29112dd5afa0611ce80d1b7f02629c"),
    ),
    _load_mnist,
    _digits,
    _images,
)
CIFAR10 = Source(
    "cifar10",
    # Only the first batch is needed, but they can only be had together.
    (
        RemoteFile("cifar-10-batches-py/data_batch_1", "md5", "c99cafc152244af753f735de768cd75f", ()),
        RemoteFile("cifar-10-batches-py/test_batch", "md5", "40351d587109b95175f43aff81a1287e", ()),
        RemoteFile("cifar-10-batches-py/batches.meta", "md5", "5ff9c542aee3614f3951f8cda6e48888", ()),
    ),
    _load_cifar10,
    _colour_shapes,
    _images,
    _ARCHIVE,
)
