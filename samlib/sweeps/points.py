"""One point of a sweep: its parameters, how it ended, and executing it."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock

from ..files import as_text, atomic_write
from ..journal import PROGRESS, Journal, append
from .executing import execute
from .processes import Workers

if TYPE_CHECKING:
    from .planning import Sweep


__all__ = ["COLUMNS", "RESULTS", "Point", "Status", "execute_point", "has_result", "status_of"]

RESULTS = ("finished", "diverged")  # outcomes that are not executed again
COLUMNS = ("point", "outcome", "run_id", "seconds", "notebook")  # of the table, whatever the notebook takes and records


@dataclass(frozen=True)
class Point:
    """One execution of the notebook: its id, a hash of notebook and parameters, and the parameters."""

    id: str
    params: dict[str, Any]

    def __hash__(self) -> int:
        return hash(self.id)


@dataclass(frozen=True)
class Status:
    """How a point ended.

    Attributes:
        outcome: "finished"; "diverged" if a run in it did; "failed" if a cell raised; "killed" if its kernel died more
            often than it was retried; "timed out".
        runs: ids of the runs in it, completed or loaded, in order.
        values: what the notebook passed to :func:`samlib.journal.record`.
        seconds: wall time of the last attempt.
        attempts: number of attempts of the last command.
        error: the traceback or the end of the log.
    """

    outcome: str
    runs: list[str] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    attempts: int = 1
    error: str = ""


def status_of(folder: Path) -> Status | None:
    try:
        return Status(**json.loads((folder / "status.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def has_result(folder: Path) -> bool:
    status = status_of(folder)
    return status is not None and status.outcome in RESULTS and (folder / "executed.ipynb").exists()


def execute_point(
    sweep: Sweep,
    point: Point,
    *,
    timeout: float | None = None,
    retries: int = 2,
    env: Mapping[str, str] | None = None,
    wait: bool = False,
    stop: threading.Event | None = None,
    workers: Workers | None = None,
) -> Status | None:
    """Execute one point, unless it has a result.

    Args:
        sweep: the plan, written.
        point: one of its points.
        timeout: seconds per attempt.
        retries: further attempts after the kernel died.
        env: additional environment variables of the kernel.
        wait: wait for a point that another process is executing.
        stop: set from another thread to give up.
        workers: where to take the kernel's papermill process from.

    Returns:
        The status; None if it was stopped, or another process is executing it and ``wait`` is false.
    """
    folder = sweep.out / point.id
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / "lock")
    while True:
        try:
            lock.acquire(timeout=1 if wait else 0)
            break
        except filelock.Timeout:
            if not wait or (stop and stop.is_set()):
                return None
    try:
        if has_result(folder):
            return status_of(folder)
        status = _execute(sweep, point, folder, timeout, retries, env or {}, stop, workers)
        if status:
            atomic_write(folder / "status.json", json.dumps(asdict(status), indent=1).encode())
        return status
    finally:
        lock.release()


def _execute(
    sweep: Sweep,
    point: Point,
    folder: Path,
    timeout: float | None,
    retries: int,
    env: Mapping[str, str],
    stop: threading.Event | None,
    workers: Workers | None,
) -> Status | None:
    if not sweep.cwd.is_dir():
        return Status("failed", error=f"there is no folder {sweep.cwd} here; start the sweep in a folder all nodes see")
    atomic_write(folder / "params.json", json.dumps(point.params, indent=1).encode())
    values = {**point.params, **({"store": as_text(sweep.out / "runs")} if sweep.store else {})}
    progress = folder / "progress.jsonl"
    for attempt in itertools.count(1):
        append(progress, "attempt", number=attempt)
        journal = Journal(progress, skip=True)
        done = execute(
            sweep.out / "notebook.ipynb",
            folder / "executed.ipynb",
            values,
            sweep.cwd,
            folder / "log.txt",
            timeout=timeout,
            env={**env, PROGRESS: as_text(progress)},
            stop=stop,
            workers=workers,
            kernel=sweep.kernel,
        )
        if done.outcome == "stopped":
            return None
        if done.outcome != "killed" or attempt > retries:
            break
    events = journal.read()
    runs = {e["run"]: e["outcome"] for e in events if e["event"] == "done"}
    recorded = {name: value for e in events if e["event"] == "record" for name, value in e["values"].items()}
    diverged = done.outcome == "finished" and "diverged" in runs.values()
    outcome = "diverged" if diverged else done.outcome
    return Status(outcome, list(runs), recorded, done.seconds, attempt, done.error)
