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

from ..files import as_text
from .notebooks import NotebookError, kernel_of, language_of, read
from .processes import MARK, Workers, end_marked, start

__all__ = ["Execution", "execute", "main"]

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
    kernel: str | None = None,
) -> Execution:
    """Execute one notebook with papermill in a process of its own, which ends when this one does.

    Unless it finishes, all that its kernel has started ends with it.

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
        kernel: the Jupyter kernel; by default the one that the notebook names.
    """
    # A temporary name until it succeeds: papermill writes the output notebook even when its kernel was killed.
    part = target.with_name(f"{target.stem}.part.ipynb")
    paths = {"source": source, "part": part, "cwd": cwd, "log": log}
    mark = os.path.realpath(target)
    request = {"values": dict(values), "env": {**(env or {}), MARK: as_text(mark)}, "kernel": kernel}
    request |= {name: as_text(path.absolute()) for name, path in paths.items()}
    log.touch()
    before = log.stat().st_size
    started = time.monotonic()
    end_marked(mark)  # what an attempt left that was killed with everything that watched over it
    process = workers.take() if workers else start()
    code: int | Literal["timed out", "stopped"] | None = None
    try:
        code = _converse(process, request, timeout, stop)
    finally:
        process.kill()
        process.wait()
        if code != 0:
            end_marked(mark)
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


def main() -> int:
    """The other process: execute the notebook that standard input asks for."""
    import papermill
    from papermill.exceptions import PapermillExecutionError

    line = sys.stdin.buffer.readline()
    if not line:  # nothing to do, nobody there any more
        return 0
    request = json.loads(line)
    threading.Thread(target=_end_with_parent, args=[request["env"][MARK]], daemon=True).start()
    with open(request["log"], "ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    sys.stderr.reconfigure(encoding="utf-8")  # type: ignore[union-attr]  # as the log is read, whatever the locale
    os.environ.update(request["env"])
    os.chdir(request["cwd"])

    source = Path(request["source"])
    try:
        kernel, spoken = kernel_of(source, request["kernel"])
        papermill.execute_notebook(
            request["source"],
            request["part"],
            request["values"],
            kernel_name=kernel,
            language=None if language_of(read(source)) else spoken,
            progress_bar=False,
            cwd=request["cwd"],
            # All cells are done and all files written: nothing is gained by waiting seconds for PyTorch's teardown.
            shutdown_kernel="immediate",
        )
    except PapermillExecutionError as error:
        print(re.sub(r"\x1b\[[0-9;]*m", "", str(error)), file=sys.stderr)
        return 1
    except NotebookError as error:
        print(error, file=sys.stderr)
        return 1
    except RuntimeError as error:  # also DeadKernelError, and a kernel that dies before it answers
        print(error, file=sys.stderr)
        return _DEAD
    return 0


def _end_with_parent(mark: str) -> None:
    """The other end of standard input closes when the process that asked is gone; all of the notebook's follow."""
    os.read(0, 1)
    end_marked(mark)
    os._exit(1)
