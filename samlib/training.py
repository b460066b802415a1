"""The loop: every few steps, stop and look at the spectrum; be able to go on after a kill as if nothing happened."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import joblib
import torch
from torch.utils import _pytree as pytree

from .config import RunConfig
from .datasets import Dataset, data_folders
from .experiments import find
from .experiments.task import Task
from .journal import note
from .observables import OBSERVABLES
from .provenance import commit, processor
from .rules import RULES
from .runs import Run, RunStore
from .settings import in_one_line
from .trajectory import OutOfTime, Trajectory

__all__ = ["OutOfTime", "commit", "processor", "train", "train_grid"]

_LOADED: dict[tuple[Any, ...], Dataset] = {}

Progress = Callable[[RunConfig, dict[str, float]], None]


def train(
    config: RunConfig, store: RunStore | None = None, progress: Progress | None = None, deadline: float = math.inf
) -> Run:
    """Train one run, or load it if the store has it, or continue it from its checkpoint.

    On a CPU a continued run's measurements are bit-identical to those of an undisturbed one (the seconds apart), with
    the same number of threads.

    Args:
        config: the run.
        store: where to keep it; without one nothing is kept.
        progress: called with the configuration and each new measurement.
        deadline: a ``time.time()`` at which to stop, with a checkpoint.

    Returns:
        The completed :class:`Run`. A diverged run is a result like any other.

    Raises:
        ValueError: if CUDA is asked for where there is none, or the configuration and the data do not fit together.
        DataError: if the data cannot be had.
        OutOfTime: if the deadline passed.
    """
    _check(config)
    dataset = _dataset(config)
    run_id = config.identity(dataset.fingerprint)
    run = store.load(run_id) if store else None
    if run is None:
        task = _task(config, dataset)
        task.experiment.try_out(task)
        if config.eigenvalues > (size := task.everything().size):
            raise ValueError(f"eigenvalues must be at most the {size} parameters, got {config.eigenvalues}")
        RULES[config.rule].check(task)
        for name in config.observables:
            OBSERVABLES[name].check(task)
        with store.lock(run_id) if store else nullcontext():
            run = store.load(run_id) if store else None  # another process may have trained it meanwhile
            if run is None:
                run = Trajectory(run_id, task, store).complete(progress, deadline)
                if store:
                    store.save(run)
    note("done", run=run_id, outcome=run.outcome)
    return run


def train_grid(
    configs: Sequence[RunConfig],
    store: RunStore,
    jobs: int | None = None,
    time_budget: float | None = None,
    progress: Progress | None = None,
    done: Callable[[Run], None] = lambda run: None,
) -> list[Run]:
    """Train several runs, side by side in processes if asked to; the cores are shared out between the jobs.

    Args:
        configs: the runs.
        store: where they are kept.
        jobs: number of processes; by default one per core, up to the number of runs. With one, everything happens in
            this process.
        time_budget: seconds after which unfinished runs are left at their checkpoints.
        progress: called at each measurement, with one job only.
        done: called with each run as it completes.

    Returns:
        The completed runs, in the order of ``configs``; fewer than asked for if time ran out.

    Raises:
        ValueError, DataError: as :func:`train`, before anything is trained.
    """
    deadline = math.inf if time_budget is None else time.time() + time_budget
    cores = os.cpu_count() or 1
    jobs = jobs or max(1, min(len(configs), cores))
    threads = max(1, cores // jobs) if jobs > 1 else torch.get_num_threads()
    completed: dict[RunConfig, Run | None] = dict.fromkeys(configs)
    for config in sorted(completed, key=lambda c: repr(_data(c))):  # so that each data set is loaded once
        _check(config)
        completed[config] = store.load(config.identity(_dataset(config).fingerprint))
    # What is there already needs no processes.
    for run in filter(None, completed.values()):
        done(run)
    missing = [config for config, run in completed.items() if run is None]
    parent, shown = (os.getpid(), None) if jobs > 1 else (None, progress)
    tasks = (joblib.delayed(_train_or_stop)(c, store, threads, shown, deadline, parent) for c in missing)
    for config, run in zip(missing, joblib.Parallel(jobs, return_as="generator")(tasks), strict=True):
        completed[config] = run
        if run is not None:
            done(run)
    return [run for run in completed.values() if run is not None]


def _check(config: RunConfig) -> None:
    """Raise a ValueError for what cannot be trained here."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda' was asked for, but PyTorch sees no CUDA device here; use device='cpu'")
    available = len(pytree.tree_leaves(_dataset(config).train_inputs)[0])
    if config.batch_size is not None and config.batch_size > available:
        raise ValueError(f"batch_size must be at most the {available} training examples, got {config.batch_size}")


def _task(config: RunConfig, dataset: Dataset) -> Task:
    try:
        return Task(config, dataset)
    except ValueError:
        raise
    except Exception as error:
        if not config.source:
            raise
        raise ValueError(
            f"experiment {config.experiment}: model and loss cannot be evaluated: {in_one_line(error)}"
        ) from error


def _data(config: RunConfig) -> tuple[Any, ...]:
    """What a configuration's data set hangs on."""
    experiment = find(config.experiment)
    own = tuple(getattr(config, name) for name in experiment.settings.model_fields)
    about = (experiment.source, config.examples, config.data, own)
    key: tuple[Any, ...] = (experiment.name, about, *data_folders())
    return (*key, config.seed) if experiment.seeded_data else key


def _dataset(config: RunConfig) -> Dataset:
    """The configuration's data set; the last one is kept, since the runs of a grid share it."""
    key = _data(config)
    if key not in _LOADED:
        _LOADED.clear()
        _LOADED[key] = find(config.experiment).load(config)
    return _LOADED[key]


def _train_or_stop(
    config: RunConfig,
    store: RunStore,
    threads: int,
    progress: Progress | None,
    deadline: float,
    parent: int | None = None,
) -> Run | None:
    if parent and not any(thread.name == "end with parent" for thread in threading.enumerate()):
        threading.Thread(target=_end_with, args=[parent], name="end with parent", daemon=True).start()
    torch.set_num_threads(threads)
    try:
        return None if time.time() > deadline else train(config, store, progress, deadline)
    except OutOfTime:
        return None


def _end_with(parent: int) -> None:
    """A process that trains for another ends when that one was killed, and does not go on unseen."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
