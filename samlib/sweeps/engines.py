"""Carrying out a sweep: its points on local processes or a Ray cluster."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import threading
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from .planning import Sweep, SweepError
from .points import Point, Status, execute_point
from .processes import Workers
from .progress import Reporter, cores

__all__ = ["Done", "Engine", "Limits", "Local", "Ray", "gpus", "run"]

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")

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


def gpus() -> list[str]:
    """The GPUs this process may use, as values of ``CUDA_VISIBLE_DEVICES``; found without importing PyTorch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [d.strip() for d in visible.split(",") if d.strip() not in ("", "-1")]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, encoding="utf-8", timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    found = [line for line in listed.stdout.splitlines() if line.startswith("GPU ")]
    return [str(i) for i in range(len(found))] if listed.returncode == 0 else []


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
