"""What a sweep shows while it runs, and how long it will take."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..journal import Journal
from .notebooks import parameters
from .planning import Sweep
from .points import Point, Status

__all__ = ["Reporter", "cores", "duration", "estimate"]

_START = 6.0  # seconds until a kernel has started and imported PyTorch, roughly


def cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Reporter:
    """What a sweep shows: a line per running point and an overall bar on a terminal, plain lines elsewhere.

    Args:
        sweep: the plan.
        every: seconds between plain lines about running points.
        show: prints a plain line.
    """

    def __init__(self, sweep: Sweep, every: float = 60.0, show: Callable[[str], None] | None = None) -> None:
        self.sweep = sweep
        self.todo = sweep.left()
        self.done = 0
        self._show = show or (lambda line: print(line, file=sys.stderr, flush=True))
        self._every, self._started, self._shown = every, time.monotonic(), time.monotonic()
        self._journals = {p: Journal(sweep.out / p.id / "progress.jsonl", skip=True) for p in self.todo}
        self._last: dict[Point, dict[str, Any]] = {}
        self._bars: Any = None
        self._lines: dict[Point, Any] = {}

    @contextmanager
    def shown(self) -> Iterator[None]:
        already = len(self.sweep.points) - len(self.todo)
        if already:
            self._show(f"{already} of {len(self.sweep.points)} points are done already")
        if not sys.stderr.isatty():
            yield
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        # A list among the parameters is no markup.
        texts = [TextColumn(f"{{task.{of}}}", markup=False) for of in ("description", "fields[at]")]
        columns = (texts[0], BarColumn(20), texts[1])
        with Progress(*columns, console=Console(stderr=True)) as self._bars:
            self._overall = self._bars.add_task("all points", total=len(self.todo), at="")
            yield

    def update(self) -> None:
        """Read what the running points say, and show it."""
        for point, journal in self._journals.items():
            for event in journal.read():
                if event["event"] in ("attempt", "start", "step"):
                    self._last[point] = event
        if self._bars:
            for point, event in self._last.items():
                if point not in self._lines:
                    self._lines[point] = self._bars.add_task(self.sweep.label(point), total=None, at="")
                at = {"completed": event["step"], "total": event["steps"]} if "steps" in event else {}
                self._bars.update(self._lines[point], at=_describe(event), **at)
            self._bars.update(self._overall, completed=self.done, at=self._time_left())
            self._bars.refresh()
        elif time.monotonic() - self._shown > self._every:
            self._shown = time.monotonic()
            for point, event in self._last.items():
                self._show(f"    {self.sweep.label(point)}: {_describe(event)}")

    def complete(self, point: Point, status: Status) -> None:
        """Show that a point ended."""
        self.done += 1
        self._journals.pop(point, None)
        self._last.pop(point, None)
        if self._bars and point in self._lines:
            self._bars.remove_task(self._lines.pop(point))
        if not self._bars or status.error:
            about = f"{self.sweep.label(point)}: {status.outcome} in {status.seconds:.1f} s"
            line = f"{point.id} {about}; {self._time_left()}"
            if self._bars:
                self._bars.console.print(line, markup=False, highlight=False)
            else:
                self._show(line)

    def _time_left(self) -> str:
        parts = sum(e["step"] / e["steps"] for e in self._last.values() if e.get("steps"))
        done = self.done + parts
        if not done or self.done == len(self.todo):
            return f"{self.done}/{len(self.todo)} in {duration(time.monotonic() - self._started)}"
        left = (time.monotonic() - self._started) * (len(self.todo) - done) / done
        return f"{self.done}/{len(self.todo)}, about {duration(left)} left"


def _describe(event: dict[str, Any]) -> str:
    if event["event"] == "step":
        return f"step {event['step']}/{event['steps']}, loss {event['loss']:.4g}, edge ratio {event['edge_ratio']:.3f}"
    return "training" if event["event"] == "start" else f"starting (attempt {event['number']})"


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    minutes, hours = round(seconds / 60), seconds / 3600
    return f"{seconds:.0f} s" if seconds < 90 else f"{minutes} min" if minutes < 90 else f"{hours:.1f} h"


def estimate(sweep: Sweep, jobs: int = 1) -> tuple[float, str] | None:
    """Seconds that the points without a result will take, and how that is known; None if it is not.

    From the points with a result, else, for a notebook that trains one run, from a few steps and measurements timed
    here.
    """
    left = sweep.left()
    statuses = [s for s in map(sweep.status, sweep.points) if s and s.outcome == "finished"]
    if statuses:
        mean = sum(s.seconds for s in statuses) / len(statuses)
        return mean * len(left) / min(jobs, max(1, len(left))), f"from {len(statuses)} executed points"
    known = parameters(sweep.notebook)
    if not left or known is None or not {"experiment", "learning_rate", "rho"} <= known.keys():
        return None
    from ..config import RunConfig, of_notebook
    from ..datasets import DataError

    defaults = {name: parameter.default for name, parameter in known.items()}
    timed: dict[str, tuple[float, float]] = {}
    total = 0.0
    for point in left:
        config = RunConfig(**of_notebook(defaults | point.params))
        # What the time of a step does not depend on, save that ρ = 0 needs one gradient instead of two.
        same = {"learning_rate": 1.0, "rho": float(config.sharpness_aware), "seed": 0, "steps": 1, "measure_every": 1}
        kind = config.model_copy(update=same).model_dump_json()
        if kind not in timed:
            try:
                timed[kind] = _time(config, max(1, cores() // jobs))
            except (DataError, ValueError):
                return None
        step, measurement = timed[kind]
        total += config.steps * step + (config.steps // config.measure_every + 1) * measurement + _START
    return total / min(jobs, len(left)), "from a few steps timed here"


def _time(config: Any, threads: int) -> tuple[float, float]:
    """Seconds of a step and of a measurement."""
    import torch

    from ..experiments.task import Task
    from ..trajectory import Trajectory

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        trajectory = Trajectory("", Task(config))
        trajectory.advance({"every": 0.0})  # the first ones also warm up
        steps = [_seconds(lambda: trajectory.advance({})) for _ in range(4)][1:]
        measured = [_seconds(lambda: trajectory.advance({"every": 0.0})) for _ in range(2)]
    finally:
        torch.set_num_threads(before)
    return min(steps), max(0.0, min(measured) - min(steps))


def _seconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
