"""Files of public data sets: where they are looked for, checked before use, and downloaded if missing."""

from __future__ import annotations

import hashlib
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..files import PROJECT

__all__ = ["DataError", "RemoteFile", "data_folders", "locate", "problem"]

DATA_FOLDER = (PROJECT or Path()) / "data"

SLOWEST = 10_000  # bytes per second below which a download is given up

CONNECT_SECONDS = 5.0  # to reach a server at all; with data="auto" the stand-in takes over after that


class DataError(Exception):
    """A data set that cannot be had: the message says which file or address, what is wrong and what to do."""


@dataclass(frozen=True)
class RemoteFile:
    """A file of a public data set: where it lies below a data folder, its checksum and its addresses."""

    path: str
    algorithm: Literal["md5", "sha256"]
    checksum: str
    urls: tuple[str, ...]


def data_folders() -> list[Path]:
    """Where data sets are looked for: ``$SAMLIB_DATA`` if set, then ``data/`` of the project (or of the working
    directory, where samlib is installed without its project)."""
    given = os.environ.get("SAMLIB_DATA")
    return ([Path(given)] if given else []) + [DATA_FOLDER]


def locate(name: str, files: Sequence[RemoteFile], archive: RemoteFile | None = None) -> list[Path]:
    """Paths of a data set's files, each with its checksum verified; downloads what is missing or damaged.

    Args:
        name: of the data set, for messages.
        files: what it consists of.
        archive: a tar file that holds them all, where they have no addresses of their own.

    Raises:
        DataError: if a file can neither be found nor downloaded; names damaged files with both checksums.
    """
    damaged: list[str] = []
    for folder in data_folders():
        paths = [folder / file.path for file in files]
        problems = [problem(path, file) for path, file in zip(paths, files, strict=True)]
        if not any(problems):
            return paths
        # A file missing from the folder that was named is worth telling; from the default folder it is the usual case.
        named = folder != DATA_FOLDER
        damaged += [p for p in problems if p and (named or not p.endswith("is missing"))]
    target, deadline = data_folders()[-1], time.monotonic() + CONNECT_SECONDS
    try:
        for file in [archive] if archive else files:
            if problem(target / file.path, file):
                _download(file, target / file.path, deadline)
                deadline = math.inf  # a server that answers is waited for
        if archive:
            _unpack(target / archive.path, target, files)
    except (OSError, DataError) as error:
        reasons = "; ".join([*damaged, str(error)])
        raise DataError(
            f"cannot load {name}: {reasons}. Set SAMLIB_DATA to a folder that holds "
            f"{', '.join(f.path for f in files)}, or use data='standin'."
        ) from None
    return [target / file.path for file in files]


def _unpack(archive: Path, folder: Path, files: Sequence[RemoteFile]) -> None:
    import tarfile

    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    for file in files:
        if wrong := problem(folder / file.path, file):
            raise DataError(wrong)


def problem(path: Path, file: RemoteFile) -> str | None:
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
