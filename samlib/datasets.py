"""MNIST, CIFAR-10 and tiny_shakespeare, checked before use; offline stand-ins that say what they are."""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

__all__ = ["DataError", "DataPolicy", "Dataset", "data_folders", "load_dataset"]

DataPolicy = Literal["auto", "real", "standin"]

_ROOT = Path(__file__).parents[1]
DATA_FOLDER = _ROOT / "data" if (_ROOT / "pyproject.toml").exists() else Path("data")  # in a checkout: the project's
SLOWEST = 10_000  # bytes per second below which a download is given up
CONNECT_SECONDS = 5.0  # to reach a server at all; with data="auto" the stand-in takes over after that


class DataError(Exception):
    """A data set that cannot be had: the message says which file or address, what is wrong and what to do."""


@dataclass(frozen=True)
class Dataset:
    """Training and test examples, ready for a model.

    Attributes:
        name: "mnist", "cifar10", "shakespeare", or what stands in for it.
        train_inputs, train_targets: float images (N, C, H, W) and one-hot targets (N, 10); or tokens (N, T) twice.
        test_inputs, test_targets: the same for the test set; image targets are labels (M,).
        standin: whether this is a stand-in, never to be counted as a result.
        fingerprint: SHA-256 over the pixels, labels or tokens before any floating-point arithmetic: the identity of
            the data in a run's id, the same on every machine.
    """

    name: str
    train_inputs: Tensor
    train_targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor
    standin: bool
    fingerprint: str


@dataclass(frozen=True)
class RemoteFile:
    """A file of a public data set: where it lies below a data folder, its checksum and its addresses."""

    path: str
    algorithm: Literal["md5", "sha256"]
    checksum: str
    urls: tuple[str, ...]


_MNIST_MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)


def _mnist(name: str, md5: str) -> RemoteFile:
    return RemoteFile(f"MNIST/raw/{name}", "md5", md5, tuple(mirror + name for mirror in _MNIST_MIRRORS))


FILES: dict[str, tuple[RemoteFile, ...]] = {
    # The MD5 sums are those of torchvision.
    "mnist": (
        _mnist("train-images-idx3-ubyte.gz", "f68b3c2dcbeaaa9fbdd348bbdeb94873"),
        _mnist("train-labels-idx1-ubyte.gz", "d53e105ee54ea40749a09fcbcd1e9432"),
        _mnist("t10k-images-idx3-ubyte.gz", "9fb629c4189551a2d022fa330f9573f3"),
        _mnist("t10k-labels-idx1-ubyte.gz", "ec29112dd5afa0611ce80d1b7f02629c"),
    ),
    # Parts of one archive; only the first batch is needed.
    "cifar10": (
        RemoteFile("cifar-10-batches-py/data_batch_1", "md5", "c99cafc152244af753f735de768cd75f", ()),
        RemoteFile("cifar-10-batches-py/test_batch", "md5", "40351d587109b95175f43aff81a1287e", ()),
        RemoteFile("cifar-10-batches-py/batches.meta", "md5", "5ff9c542aee3614f3951f8cda6e48888", ()),
    ),
    "shakespeare": (
        RemoteFile(
            "tiny_shakespeare/input.txt",
            "sha256",
            "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
            ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",),
        ),
    ),
}
CIFAR10_ARCHIVE = RemoteFile(
    "cifar-10-python.tar.gz",
    "md5",
    "c58f30108f718f92721af3b95e74349a",
    ("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",),
)


def load_dataset(
    name: str, examples: int | None = None, policy: DataPolicy = "auto", sequence_length: int = 64
) -> Dataset:
    """Load the data of an experiment.

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
    if name not in FILES:
        raise ValueError(f"data set must be one of {', '.join(FILES)}, got {name!r}")
    if policy not in ("auto", "real", "standin"):
        raise ValueError(f"data must be 'auto', 'real' or 'standin', got {policy!r}")
    standin = policy == "standin"
    if not standin:
        try:
            raw: Any = _REAL[name](locate(name))
        except DataError as error:
            if policy == "real":
                raise
            warnings.warn(f"{error}\nUsing a stand-in for {name}: its results do not count.", UserWarning, stacklevel=2)
            standin = True
    if standin:
        raw = _STANDINS[name]()
    label = f"{name} stand-in: {_STANDINS[name].__doc__}" if standin else name
    if name == "shakespeare":
        content, tensors = _sequences(raw, sequence_length, examples, label)
    else:
        content, tensors = _images(raw, examples, label)
    digest = hashlib.sha256()
    for array in content:
        digest.update(f"{array.shape}".encode())
        digest.update(array.astype("<i2").tobytes())
    return Dataset(label, *tensors, standin, digest.hexdigest())


def data_folders() -> list[Path]:
    """Where data sets are looked for: ``$SAMLIB_DATA`` if set, then ``data/`` of the project (or of the working
    directory, where samlib is installed without its project)."""
    given = os.environ.get("SAMLIB_DATA")
    return ([Path(given)] if given else []) + [DATA_FOLDER]


def locate(name: str) -> list[Path]:
    """Paths of a data set's files, each with its checksum verified; downloads what is missing or damaged.

    Raises:
        DataError: if a file can neither be found nor downloaded; names damaged files with both checksums.
    """
    damaged: list[str] = []
    for folder in data_folders():
        paths = [folder / file.path for file in FILES[name]]
        problems = [_problem(path, file) for path, file in zip(paths, FILES[name], strict=True)]
        if not any(problems):
            return paths
        # A file missing from the folder that was named is worth telling; from the default folder it is the usual case.
        named = folder != DATA_FOLDER
        damaged += [p for p in problems if p and (named or not p.endswith("is missing"))]
    target, deadline = data_folders()[-1], time.monotonic() + CONNECT_SECONDS
    try:
        if name == "cifar10":
            _download_cifar10(target, deadline)
        else:
            for file in FILES[name]:
                if _problem(target / file.path, file):
                    _download(file, target / file.path, deadline)
                    deadline = math.inf  # a server that answers is waited for
    except (OSError, DataError) as error:
        reasons = "; ".join([*damaged, str(error)])
        raise DataError(
            f"cannot load {name}: {reasons}. Set SAMLIB_DATA to a folder that holds "
            f"{', '.join(f.path for f in FILES[name])}, or use data='standin'."
        ) from None
    return [target / file.path for file in FILES[name]]


def _problem(path: Path, file: RemoteFile) -> str | None:
    """What is wrong with a local file, or None."""
    try:
        found = hashlib.new(file.algorithm, path.read_bytes()).hexdigest()
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as error:
        return f"{path} is not readable ({error.strerror})"
    if found != file.checksum:
        return f"{path} is damaged ({file.algorithm} {found}, expected {file.checksum})"
    return None


def _download(file: RemoteFile, path: Path, deadline: float) -> None:
    """Fetch a file to ``path``, atomically, only if its checksum matches.

    A server must answer within 5 seconds; no further address is tried after the deadline.
    """
    import requests

    errors = []
    for url in file.urls:
        if time.monotonic() > deadline:
            break
        try:
            response = _within(CONNECT_SECONDS, lambda url=url: requests.get(url, stream=True, timeout=CONNECT_SECONDS))
            response.raise_for_status()
            content = _receive(response)
        except (requests.RequestException, TimeoutError) as error:
            errors.append(f"{url} did not answer ({type(error).__name__})")
            continue
        found = hashlib.new(file.algorithm, content).hexdigest()
        if found == file.checksum:
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f"{path.name}.{os.getpid()}.part")
            part.write_bytes(content)
            os.replace(part, path)
            return
        errors.append(f"{url} sent a file with {file.algorithm} {found}, expected {file.checksum}")
    raise DataError("; ".join(errors))


def _receive(response: Any) -> bytes:
    """A response's content, unless it trickles: a stand-in now is better than the data in an hour."""
    started, parts, size = time.monotonic(), [], 0
    for part in response.iter_content(1 << 14):
        parts.append(part)
        size += len(part)
        seconds = time.monotonic() - started
        if seconds > CONNECT_SECONDS and size < SLOWEST * seconds:
            raise TimeoutError(f"only {size} bytes in {seconds:.0f} s")
    return b"".join(parts)


def _within(seconds: float, call: Callable):
    """Run a call in a thread and give up waiting after some seconds: name resolution knows no time-out."""
    outcome: list = []

    def work() -> None:
        try:
            outcome.append((call(), None))
        except Exception as error:
            outcome.append((None, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError(f"no answer within {seconds:g} s")
    value, error = outcome[0]
    if error:
        raise error
    return value


def _download_cifar10(folder: Path, deadline: float) -> None:
    import tarfile

    archive = folder / CIFAR10_ARCHIVE.path
    if _problem(archive, CIFAR10_ARCHIVE):
        _download(CIFAR10_ARCHIVE, archive, deadline)
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    for file in FILES["cifar10"]:
        if problem := _problem(folder / file.path, file):
            raise DataError(problem)


def _load_mnist(paths: list[Path]) -> tuple[np.ndarray, ...]:
    def idx(path: Path) -> np.ndarray:
        content = gzip.decompress(path.read_bytes())
        dimensions = content[3]
        shape = np.frombuffer(content, ">i4", dimensions, 4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)

    train, train_labels, test, test_labels = map(idx, paths)
    return train[:, None], train_labels, test[:, None], test_labels


def _load_cifar10(paths: list[Path]) -> tuple[np.ndarray, ...]:
    datasets = _torchvision_datasets()
    first_batch = next(entry for entry in datasets.CIFAR10.train_list if entry[0] == paths[0].name)
    FirstBatch = type("FirstBatch", (datasets.CIFAR10,), {"train_list": [first_batch]})
    root = str(paths[0].parent.parent)
    parts = [FirstBatch(root, train=train) for train in (True, False)]
    train, test = ((part.data.transpose(0, 3, 1, 2), np.array(part.targets)) for part in parts)
    return *train, *test


def _load_shakespeare(paths: list[Path]) -> str:
    return paths[0].read_text("ascii")


def _torchvision_datasets():
    """``torchvision.datasets``, also beside a PyTorch without torchvision's compiled operators.

    A CPU build of torch beside a CUDA build of torchvision fails on import with "operator torchvision::nms does not
    exist". Declaring the two operators that the import looks up makes the data sets usable.
    """
    try:
        import torchvision.datasets as datasets
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        import sys

        for module in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
            del sys.modules[module]
        global _operators
        _operators = torch.library.Library("torchvision", "DEF")
        _operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision.datasets as datasets
    return datasets


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


def _python_topics() -> str:
    """the topic texts of Python's own help system"""
    from pydoc_data import topics

    text = "\n".join(topics.topics[key] for key in sorted(topics.topics))
    return text.encode("ascii", "ignore").decode()


_REAL: dict[str, Callable] = {"mnist": _load_mnist, "cifar10": _load_cifar10, "shakespeare": _load_shakespeare}
_STANDINS: dict[str, Callable] = {"mnist": _digits, "cifar10": _colour_shapes, "shakespeare": _python_topics}


def _take(available: int, examples: int | None, label: str) -> int:
    if examples is not None and examples > available:
        raise DataError(f"asked for {examples} training examples, but {label} has {available}")
    return examples or available


_Tensors: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]


def _images(arrays: tuple[np.ndarray, ...], examples: int | None, label: str) -> tuple[list[np.ndarray], _Tensors]:
    """The reference's preprocessing: x/256, minus the mean training image; one-hot training targets."""
    train, train_labels, test, test_labels = arrays
    count = _take(len(train), examples, label)
    content = [train[:count], train_labels[:count], test, test_labels]
    x, x_test = (torch.as_tensor(np.array(a), dtype=torch.float32) / 256 for a in (content[0], test))
    y, y_test = (torch.as_tensor(np.array(a), dtype=torch.long) for a in (content[1], test_labels))
    mean = x.mean(0)
    return content, (x - mean, torch.nn.functional.one_hot(y, 10).float(), x_test - mean, y_test)


def _sequences(text: str, length: int, examples: int | None, label: str) -> tuple[list[np.ndarray], _Tensors]:
    """Consecutive, disjoint sequences of ASCII codes and their successors; the last 10,000 lines are the test set.

    A text of under 20,000 lines gives a quarter of them to the test set instead.
    """
    lines = text.splitlines(keepends=True)
    held_out = 10_000 if len(lines) >= 20_000 else len(lines) // 4

    def tokens(part: list[str]) -> tuple[Tensor, Tensor]:
        codes = torch.frombuffer(bytearray("".join(part).encode("ascii")), dtype=torch.uint8).long()
        count = (len(codes) - 1) // length
        return codes[: count * length].view(count, length), codes[1 : count * length + 1].view(count, length)

    inputs, targets = tokens(lines[:-held_out])
    count = _take(len(inputs), examples, label)
    tensors = (inputs[:count], targets[:count], *tokens(lines[-held_out:]))
    return [t.numpy() for t in tensors], tensors
