"""Executing one notebook with papermill, in a process of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .notebooks import read

__all__ = ["Execution", "Workers", "execute", "main"]

_DEAD = 3  # exit code of the process below when its kernel died


@dataclass(frozen=True)
class Execution:
    """How an execution ended.

    Attributes:
        outcome: "finished"; "failed" if a cell raised; "killed" if the kernel or its papermill process died;
            "timed out"; "stopped" on request.
        error: the end of the log unless finished: the traceback of the cell that failed.
        seconds: wall time.
    """

    outcome: Literal["finished", "failed", "killed", "timed out", "stopped"]
    error: str
    seconds: float


def execute(
    source: Path,
    target: Path,
    values: Mapping[str, Any],
    cwd: Path,
    log: Path,
    *,
    timeout: float | None = None,
    env: Mapping[str, str] | None = None,
    stop: threading.Event | None = None,
    workers: Workers | None = None,
) -> Execution:
    """Execute one notebook with papermill in a process of its own, which ends when this one does.

    Args:
        source: the notebook.
        target: the executed copy; it appears, whole, only if every cell succeeded. Otherwise what there is stands
            in ``failed.ipynb`` beside it.
        values: parameters.
        cwd: the kernel's working folder.
        log: file to append all messages to.
        timeout: seconds.
        env: additional environment variables.
        stop: set from another thread to give up.
        workers: where to take the process from; by default it is started now.
    """
    # A temporary name until it succeeds: papermill writes the output notebook even when its kernel was killed.
    part = target.with_name(f"{target.stem}.part.ipynb")
    paths = {"source": source, "part": part, "cwd": cwd, "log": log}
    request = {"values": dict(values), "env": dict(env or {}), **{k: str(p.absolute()) for k, p in paths.items()}}
    log.touch()
    before = log.stat().st_size
    started = time.monotonic()
    process = workers.take() if workers else _start()
    try:
        code = _converse(process, request, timeout, stop)
    finally:
        process.kill()
        process.wait()
    seconds = time.monotonic() - started
    if code == 0:
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(target)
        target.with_name("failed.ipynb").unlink(missing_ok=True)
        return Execution("finished", "", seconds)
    if part.exists():
        part.replace(target.with_name("failed.ipynb"))
    if isinstance(code, str):
        return Execution(code, f"{code} after {seconds:.0f} s", seconds)
    with log.open("rb") as file:
        file.seek(before)
        lines = file.read().decode(errors="replace").strip().splitlines()
    reason = [f"killed by signal {-code}"] if code < 0 else []
    outcome: Literal["killed", "failed"] = "killed" if code < 0 or code == _DEAD else "failed"
    return Execution(outcome, "\n".join(lines[-30:] + reason), seconds)


def _converse(
    process: subprocess.Popen[bytes], request: dict[str, Any], timeout: float | None, stop: threading.Event | None
) -> int | Literal["timed out", "stopped"]:
    """Hand over the request, keep the pipe open as a sign of life, and wait: the exit code, or why we gave up."""
    assert process.stdin
    deadline = None if timeout is None else time.monotonic() + timeout
    try:
        with suppress(BrokenPipeError):  # then it is dead already, and its exit code says so
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
        while True:
            try:
                return process.wait(0.2)
            except subprocess.TimeoutExpired:
                if stop and stop.is_set():
                    return "stopped"
                if deadline and time.monotonic() > deadline:
                    return "timed out"
    finally:
        with suppress(BrokenPipeError):
            process.stdin.close()


class Workers:
    """Processes that have imported papermill and wait for a notebook, so that the next one need not."""

    def __init__(self) -> None:
        self._ready: list[subprocess.Popen[bytes]] = []
        self._closed = False

    def take(self) -> subprocess.Popen[bytes]:
        """A process, and start its successor."""
        try:
            process = self._ready.pop()
        except IndexError:
            process = _start()
        if not self._closed:
            self._ready.append(_start())
        return process if process.poll() is None else _start()

    def close(self) -> None:
        """End those that still wait."""
        self._closed = True
        while self._ready:
            process = self._ready.pop()
            process.kill()
            process.communicate()


def _start() -> subprocess.Popen[bytes]:
    # In a session of its own: Ctrl-C is for this process, which then ends the other.
    command = [sys.executable, "-m", "samlib.sweeps"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


def main() -> int:
    """The other process: execute the notebook that standard input asks for."""
    import papermill
    from papermill.exceptions import PapermillExecutionError

    line = sys.stdin.buffer.readline()
    if not line:  # nothing to do, nobody there any more
        return 0
    request = json.loads(line)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with open(request["log"], "ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ.update(request["env"])
    os.chdir(request["cwd"])

    metadata = read(Path(request["source"])).metadata
    kernel = metadata.get("kernelspec", {}).get("name", "python3")
    language = None if {"kernelspec", "language_info"} & metadata.keys() else "python"
    try:
        papermill.execute_notebook(
            request["source"],
            request["part"],
            request["values"],
            kernel_name=kernel,
            language=language,
            progress_bar=False,
            cwd=request["cwd"],
            # All cells are done and all files written: nothing is gained by waiting seconds for PyTorch's teardown.
            shutdown_kernel="immediate",
        )
    except PapermillExecutionError as error:
        print(re.sub(r"\x1b\[[0-9;]*m", "", str(error)), file=sys.stderr)
        return 1
    except RuntimeError as error:  # also DeadKernelError, and a kernel that dies before it answers
        print(error, file=sys.stderr)
        return _DEAD
    return 0


def _end_with_parent() -> None:
    """The other end of standard input closes when the process that asked is gone; the kernel follows this one."""
    os.read(0, 1)
    os._exit(1)
