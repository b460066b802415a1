"""Carrying out a sweep: its points on local processes or a Ray cluster, and what is shown meanwhile."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from .journal import Journal
from .notebooks import Workers, parameters
from .sweep import Point, Status, Sweep, SweepError, execute_point

__all__ = ["Limits", "Local", "Ray", "Reporter", "cores", "duration", "estimate", "gpus", "run"]

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")

_START = 6.0  # seconds until a kernel has started and imported PyTorch, roughly

Done = tuple[Point, Status | None]


@dataclass(frozen=True)
class Limits:
    """What one point may take: seconds per attempt, and further attempts after its kernel died."""

    timeout: float | None = None
    retries: int = 2


class Engine(Protocol):
    """Where points are executed. Resuming is not its business: that lies in each point's folder."""

    def submit(self, sweep: Sweep, point: Point, limits: Limits, wait: bool) -> None: ...

    def completed(self, seconds: float) -> Iterable[Done]:
        """What completed since the last call, after waiting at most this long."""

    def close(self) -> None:
        """Stop whatever still runs."""


class Local:
    """One process per notebook on this machine; cores and GPUs are shared out between the jobs.

    Args:
        jobs: notebooks side by side; by default one per GPU, or one.
    """

    def __init__(self, jobs: int | None = None) -> None:
        devices = gpus()
        self.jobs = jobs or len(devices) or 1
        # Whoever sets OMP_NUM_THREADS means all of them: MKL would go by its own variable first.
        threads = os.environ.get("OMP_NUM_THREADS", str(max(1, cores() // self.jobs)))
        shared = {name: os.environ.get(name, threads) for name in _THREADS}
        self._slots = [
            shared | ({"CUDA_VISIBLE_DEVICES": devices[slot % len(devices)]} if devices else {})
            for slot in range(self.jobs)
        ]
        self._stop, self._workers = threading.Event(), Workers()
        self._pool = ThreadPoolExecutor(self.jobs)
        self._running: dict[Future[Status | None], Point] = {}

    def submit(self, sweep: Sweep, point: Point, limits: Limits, wait: bool) -> None:
        self._running[self._pool.submit(self._execute, sweep, point, limits, wait)] = point

    def _execute(self, sweep: Sweep, point: Point, limits: Limits, wait: bool) -> Status | None:
        env = self._slots.pop()
        try:
            return execute_point(
                sweep,
                point,
                timeout=limits.timeout,
                retries=limits.retries,
                env=env,
                wait=wait,
                stop=self._stop,
                workers=self._workers,
            )
        finally:
            self._slots.append(env)

    def completed(self, seconds: float) -> Iterator[Done]:
        for future in wait(self._running, seconds, FIRST_COMPLETED).done:
            yield self._running.pop(future), future.result()

    def close(self) -> None:
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)
        self._workers.close()


class Ray:
    """A Ray cluster whose nodes see the sweep's folder under the same path and have samlib installed.

    Args:
        address: "auto" for the cluster of this machine, HOST:PORT or ray://HOST:PORT.
        cpus: cores per point.
        gpus: GPUs per point; fractions share one.

    Raises:
        SweepError: if Ray is not installed or there is no cluster.
    """

    def __init__(self, address: str = "auto", cpus: float = 1, gpus: float = 0) -> None:
        try:
            import ray
        except ImportError:
            raise SweepError('--ray needs Ray; install it with pip install "samlib[ray]"') from None
        _reachable(address)
        try:
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise SweepError(f"--ray {address}: no Ray cluster there ({reason}); start one: ray start --head") from None
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if not any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in nodes):
            warnings.warn(
                f"no node of the cluster has {cpus:g} cores and {gpus:g} GPUs now; points wait until one has",
                stacklevel=2,
            )
        self._ray, self._cpus, self._gpus = ray, cpus, gpus
        self._points: dict[Any, Point] = {}
        self._sweep: Any = None

    def submit(self, sweep: Sweep, point: Point, limits: Limits, wait: bool) -> None:
        self._sweep = self._sweep or self._ray.put(sweep)
        # Ray repeats a task whose worker or node died; execute_point repeats one whose kernel died.
        options = {"num_cpus": self._cpus, "num_gpus": self._gpus, "max_retries": limits.retries}
        env = dict.fromkeys(_THREADS, str(max(1, int(self._cpus))))
        task = self._ray.remote(execute_point).options(**options, name=f"samlib sweep {point.id}")
        arguments = {"timeout": limits.timeout, "retries": limits.retries, "env": env, "wait": wait}
        self._points[task.remote(self._sweep, point, **arguments)] = point

    def completed(self, seconds: float) -> Iterator[Done]:
        done, _ = self._ray.wait(list(self._points), timeout=seconds)
        for reference in done:
            point = self._points.pop(reference)
            try:
                yield point, self._ray.get(reference)
            except self._ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except self._ray.exceptions.RayError as error:
                yield point, Status("killed", error=str(error))

    def close(self) -> None:
        self._ray.shutdown()


def _reachable(address: str) -> None:
    """Ray tries an address without an answer for a minute and then aborts the process: ask first."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon:
        if address not in ("auto", "local"):
            raise SweepError(f"--ray takes auto, HOST:PORT or ray://HOST:PORT, got {address!r}")
        return
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, ValueError, OverflowError) as error:
        raise SweepError(
            f"--ray {address}: nothing answers there ({error}); start a cluster with ray start --head, "
            "and give the address it prints"
        ) from None


def cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpus() -> list[str]:
    """The GPUs this process may use, as values of ``CUDA_VISIBLE_DEVICES``; found without importing PyTorch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [d.strip() for d in visible.split(",") if d.strip() not in ("", "-1")]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    found = [line for line in listed.stdout.splitlines() if line.startswith("GPU ")]
    return [str(i) for i in range(len(found))] if listed.returncode == 0 else []


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

        columns = (TextColumn("{task.description}"), BarColumn(20), TextColumn("{task.fields[at]}"))
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
            (self._bars.console.print if self._bars else self._show)(line)

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


def run(sweep: Sweep, engine: Engine, limits: Limits | None = None, reporter: Reporter | None = None) -> None:
    """Execute all points without a result; what one of them does, does not touch the others.

    Args:
        sweep: the plan; written to its folder if it is not there yet.
        engine: where to execute.
        limits: of each point.
        reporter: what to show.

    Raises:
        SweepError: if the folder holds another sweep.
        OSError: if results cannot be written. Those written before stay.
        KeyboardInterrupt: at Ctrl-C or SIGTERM; the same sweep then continues.
    """
    limits, reporter = limits or Limits(), reporter or Reporter(sweep)
    try:
        with _terminable(), reporter.shown():
            sweep.write()
            left = {point.id for point in reporter.todo}
            for point in reporter.todo:
                engine.submit(sweep, point, limits, wait=False)
            while left:
                for point, status in engine.completed(0.5):
                    if status is None:  # another process has it: first do the rest, then wait for that one
                        engine.submit(sweep, point, limits, wait=True)
                    else:
                        left.discard(point.id)
                        reporter.complete(point, status)
                reporter.update()
    finally:
        engine.close()


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM, what batch systems send before they kill, ends a sweep as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


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
    from .datasets import DataError
    from .experiments import RunConfig

    defaults = {name: parameter.default for name, parameter in known.items()}
    timed: dict[str, tuple[float, float]] = {}
    total = 0.0
    for point in left:
        settings = {k: v for k, v in (defaults | point.params).items() if k in RunConfig.model_fields}
        config = RunConfig(**settings)
        # What the time of a step does not depend on, save that ρ = 0 needs one gradient instead of two.
        same = {"learning_rate": 1.0, "rho": float(config.rho > 0), "seed": 0, "steps": 1, "measure_every": 1}
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

    from .experiments import Experiment
    from .training import _update, measure

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        experiment = Experiment(config, config.load_dataset())
        objective, params = experiment.objective(0), experiment.initial_parameters()
        _, model = measure(objective, params, config, 0)  # the first ones also warm up
        steps = [_seconds(lambda: _update(objective, params, config)) for _ in range(4)][1:]
        measurements = [_seconds(lambda: measure(objective, params, config, 1, model)) for _ in range(2)]
    finally:
        torch.set_num_threads(before)
    return min(steps), min(measurements)


def _seconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
