"""The loop: train by GD or SAM, and measure sharpness against the edges on the way."""

from __future__ import annotations

import functools
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import joblib
import pandas as pd
import torch
from torch import Tensor

from . import __version__
from .datasets import DataPolicy, Dataset, data_folders, load_dataset
from .edges import gd_edge, sam_edge
from .eigen import extreme_eigenpairs
from .experiments import Experiment, RunConfig
from .files import PROJECT
from .hessian import HessianOperator
from .journal import note
from .objective import Objective
from .optim import sam_perturb, sam_step
from .runs import Outcome, Run, RunStore

__all__ = ["OutOfTime", "commit", "measure", "processor", "train", "train_grid"]

CHECKPOINT_SECONDS = float(os.environ.get("SAMLIB_CHECKPOINT_SECONDS", 5))
CHECK_EVERY = {"cpu": 1, "cuda": 50}  # steps between looks at the loss: on a GPU each waits for the device
DIVERGED = 1e3  # a loss this many times the initial one never came back in any run we saw
EVALUATE_EVERY = 4  # mini-batch runs repeat each fourth measurement on the larger evaluation batch

Progress = Callable[[RunConfig, dict[str, float]], None]


class OutOfTime(Exception):
    """The deadline passed; the run's checkpoint is in the store."""


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
        ValueError: if CUDA is asked for where there is none.
        DataError: if the data cannot be had.
        OutOfTime: if the deadline passed.
    """
    _check(config)
    dataset = _dataset(config)
    run_id = config.identity(dataset.fingerprint)
    run = store.load(run_id) if store else None
    if run is None:
        experiment = Experiment(config, dataset)
        with store.lock(run_id) if store else nullcontext():
            run = store.load(run_id) if store else None  # another process may have trained it meanwhile
            if run is None:
                run = _train(run_id, experiment, store, progress, deadline)
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
    for config in dict.fromkeys(configs):
        _check(config)
    # What is there already needs no processes.
    completed = {c: store.load(c.identity(_dataset(c).fingerprint)) for c in dict.fromkeys(configs)}
    for run in filter(None, completed.values()):
        done(run)
    missing = [config for config, run in completed.items() if run is None]
    tasks = (
        joblib.delayed(_train_or_stop)(c, store, threads, progress if jobs == 1 else None, deadline) for c in missing
    )
    for config, run in zip(missing, joblib.Parallel(jobs, return_as="generator")(tasks), strict=True):
        completed[config] = run
        if run is not None:
            done(run)
    return [run for run in completed.values() if run is not None]


def _check(config: RunConfig) -> None:
    """Raise a ValueError for what cannot be trained here."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda' was asked for, but PyTorch sees no CUDA device here; use device='cpu'")
    available = len(_dataset(config).train_inputs)
    if config.batch_size is not None and config.batch_size > available:
        raise ValueError(f"batch_size must be at most the {available} training examples, got {config.batch_size}")


def _dataset(config: RunConfig) -> Dataset:
    """The configuration's data set; the last one is kept, since the runs of a grid share it."""
    return _cached_dataset(config.experiment, config.examples, config.data, config.sequence_length, *data_folders())


@functools.lru_cache(maxsize=1)
def _cached_dataset(
    experiment: str, examples: int | None, data: DataPolicy, length: int | None, *folders: Path
) -> Dataset:
    return load_dataset(experiment, examples, data, length or 64)


def _train_or_stop(
    config: RunConfig, store: RunStore, threads: int, progress: Progress | None, deadline: float
) -> Run | None:
    torch.set_num_threads(threads)
    try:
        return None if time.time() > deadline else train(config, store, progress, deadline)
    except OutOfTime:
        return None


def _train(
    run_id: str, experiment: Experiment, store: RunStore | None, progress: Progress | None, deadline: float
) -> Run:
    config = experiment.config
    evaluation = experiment.evaluation_objective()
    state = store.load_checkpoint(run_id, config.device) if store else None
    params = state["params"] if state else experiment.initial_parameters()
    models: dict[str, tuple[Tensor, Tensor] | None] = (state or {}).get("models", {"": None, "eval_": None})
    rows: list[dict[str, float]] = state["rows"] if state else []
    first_step: int = state["step"] if state else 0
    started = time.monotonic() - (state["seconds"] if state else 0.0)
    saved = time.monotonic()
    losses: list[Tensor] = []  # of the last steps, not yet looked at
    outcome: Outcome = "finished"
    note("start", run=run_id, step=first_step, steps=config.steps)

    def diverged_by(step: int) -> bool:
        """Look at the losses before this step; if one was beyond recovery, the first of them is the last row."""
        bound = DIVERGED * rows[0]["loss"] if losses else math.inf
        bad = [i for i, value in enumerate(torch.stack(losses).tolist()) if not value <= bound] if losses else []
        if bad:
            first = step - len(losses) + bad[0]
            rows.append({"seconds": time.monotonic() - started, "step": first, "loss": math.inf})
        losses.clear()
        return bool(bad)

    for step in range(first_step, config.steps + 1):
        objective = experiment.objective(step)
        if step % config.measure_every == 0 or step == config.steps:
            if diverged_by(step):
                outcome = "diverged"
                break
            try:
                row, models[""] = measure(objective, params, config, step, models[""])
                if evaluation and step % (EVALUATE_EVERY * config.measure_every) == 0:
                    wider, models["eval_"] = measure(evaluation, params, config, step, models["eval_"])
                    row |= {f"eval_{name}": value for name, value in wider.items() if name != "step"}
            except FloatingPointError:
                row = {"step": step, "loss": math.inf}
            rows.append({"seconds": time.monotonic() - started, **row})
            if not row["loss"] <= DIVERGED * rows[0]["loss"]:
                outcome = "diverged"
                break
            shown = {"loss": row["loss"], "edge_ratio": row["edge_ratio"]}
            note("step", run=run_id, step=step, steps=config.steps, **shown)
            if progress:
                progress(config, rows[-1])
        if step == config.steps:
            break

        params, loss = _update(objective, params, config)
        losses.append(loss)
        late = time.time() > deadline
        due = late or time.monotonic() - saved > CHECKPOINT_SECONDS
        if (due or len(losses) >= CHECK_EVERY[config.device]) and diverged_by(step + 1):
            outcome = "diverged"
            break
        if store and due:
            plain = {name: model and tuple(model) for name, model in models.items()}
            state = {"step": step + 1, "params": params, "models": plain, "rows": rows}
            store.save_checkpoint(run_id, {**state, "seconds": time.monotonic() - started})
            note("checkpoint", run=run_id, step=step + 1)
            saved = time.monotonic()
        if late:
            raise OutOfTime(f"run {run_id} stopped after step {step + 1} of {config.steps}")

    frame = pd.DataFrame(rows)
    frame.loc[frame.index[-1], "test_metric"] = experiment.test_metric(params) if outcome == "finished" else math.nan
    provenance = _provenance(experiment) | {
        "seconds": time.monotonic() - started,
        "gradients": int(frame.step.iloc[-1]) * (2 if config.rho else 1),
        "matvecs": int(frame.matvecs.sum()),
    }
    return Run(run_id, config, frame, outcome, provenance)


def _update(objective: Objective, params: Tensor, config: RunConfig) -> tuple[Tensor, Tensor]:
    """The parameters after one step, and the loss before it, which comes free with the first gradient."""
    values: list[Tensor] = []

    def gradient(w: Tensor) -> Tensor:
        value, gradient = objective.value_and_gradient(w)
        values.append(value)
        return gradient

    return sam_step(gradient, params, config.learning_rate, config.rho), values[0]


def measure(
    objective: Objective, params: Tensor, config: RunConfig, step: int, model: tuple[Tensor, Tensor] | None = None
) -> tuple[dict[str, float], tuple[Tensor, Tensor]]:
    """One measurement: the spectrum's ends, the gradients, and the edges they set.

    Args:
        objective: the loss whose Hessian is measured.
        params: w, shape (P,).
        config: gives η, ρ, the number of eigenvalues and the tolerance.
        step: the current step; seeds the solver's random directions.
        model: low-rank model of the Hessian from the measurement before.

    Returns:
        A row, and the model for the next measurement. Columns: ``step``, ``loss``; ``grad_norm`` ‖∇ℓ(w)‖ and
        ``sam_grad_norm`` at the perturbed point; ``eigenvalue_1``…``k``; ``smallest_eigenvalue``
        and its ``smallest_residual`` (loose, where it is not the operator norm); ``operator_norm`` max |λ| with its
        ``residual``, within which an eigenvalue lies, and ``matvecs`` spent; ``gd_edge``,
        ``sam_edge`` and ``edge_ratio`` = operator_norm / sam_edge; ``grad_alignment`` and ``sam_grad_alignment``,
        |cos| of each gradient with the principal eigenvector.

    Raises:
        FloatingPointError: if the Hessian is not finite.
    """
    operator = HessianOperator(objective, params)
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    count = config.eigenvalues
    eigen = extreme_eigenpairs(operator, count, 1, model, config.tolerance, generator=generator, explore=0)
    grad = operator.gradient
    sam_grad = objective.gradient(sam_perturb(params, grad, config.rho)) if config.rho else grad
    principal = int(eigen.values.abs().argmax())
    norm, grad_norm = float(eigen.values[principal].abs()), float(grad.norm())
    if not math.isfinite(grad_norm):
        raise FloatingPointError("the gradient is not finite")
    edge = sam_edge(grad_norm, config.learning_rate, config.rho)

    def alignment(vector: Tensor) -> float:
        return float((vector @ eigen.vectors[:, principal]).abs() / vector.norm())

    row = {
        "step": step,
        "loss": float(operator.value),
        "grad_norm": grad_norm,
        "sam_grad_norm": float(sam_grad.norm()),
        **{f"eigenvalue_{i + 1}": float(eigen.values[i]) for i in range(count)},
        "smallest_eigenvalue": float(eigen.values[-1]),
        "smallest_residual": float(eigen.residuals[-1]),
        "operator_norm": norm,
        "residual": float(eigen.residuals[principal]),
        "matvecs": eigen.matvecs,
        "gd_edge": gd_edge(config.learning_rate),
        "sam_edge": edge,
        "edge_ratio": norm / edge if edge > 0 else math.inf,
        "grad_alignment": alignment(grad),
        "sam_grad_alignment": alignment(sam_grad),
    }
    return row, eigen.model


def _provenance(experiment: Experiment) -> dict[str, Any]:
    config, dataset = experiment.config, experiment.dataset
    cuda = config.device == "cuda"
    return {
        "samlib": __version__,
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if cuda else processor(),
        "threads": torch.get_num_threads(),
        "dataset": dataset.name,
        "fingerprint": dataset.fingerprint,
        "standin": dataset.standin,
        "parameters": experiment.initial_parameters().numel(),
    }


def processor() -> str:
    """The name of this machine's processor."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str | None:
    """The project's git commit, with "+" for uncommitted changes to the package; None outside a checkout.

    ``SAMLIB_COMMIT`` names it where the checkout has no history, in a container say.
    """
    if named := os.environ.get("SAMLIB_COMMIT"):
        return named
    if not PROJECT or not (PROJECT / ".git").exists():
        return None
    commands = (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "samlib"])
    try:
        head, changes = (
            subprocess.run(["git", "-C", str(PROJECT), *c], capture_output=True, text=True, check=True).stdout.strip()
            for c in commands
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changes else "")
