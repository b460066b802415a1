"""What the benchmarks share: the networks, points of a trajectory at the edge, timing side by side, and the record."""

from __future__ import annotations

import functools
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from samlib import RunConfig
from samlib.experiments.task import Task
from samlib.objective import pure_loss
from samlib.optim import sam_step
from samlib.training import commit, processor

RESULTS = Path(__file__).parent / "results"

# Each network at a learning rate and rho at which it meets its edge; from which step on, and how often, it is looked
# at. The quick sizes, but for the CNN, which is the paper's, on 100 images.
NETS: dict[str, tuple[RunConfig, int, int]] = {
    name: (RunConfig(experiment=name, device="cpu", learning_rate=rate, rho=0.1, **more), first, every)
    for name, rate, more, first, every in (
        ("mnist", 0.3, {}, 200, 25),
        ("cifar10", 0.003, {"width": 16, "examples": 100}, 40, 10),
        ("shakespeare", 0.1, {}, 60, 10),
    )
}


def trajectory(name: str, count: int) -> tuple[Task, list[tuple[int, Tensor]]]:
    """The experiment, and ``count`` points (step, parameters) of its training by SAM."""
    config, first, every = NETS[name]
    experiment = Task(config)
    params, points = experiment.initial_parameters(), []
    for step in range(first + every * (count - 1) + 1):
        if step >= first and (step - first) % every == 0:
            points.append((step, params))
        params = sam_step(experiment.objective(step).gradient, params, config.learning_rate, config.rho)
    return experiment, points


def side_by_side(calls: Mapping[str, Callable[[], Any]], repeats: int = 15) -> dict[str, float]:
    """Median seconds of each call. The calls take turns, so that a slow moment meets all of them, and each is made
    twice and timed the second time, so that none pays for the memory that the one before it gave back.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            call()
            _finish()
            started = time.perf_counter()
            call()
            _finish()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _finish() -> None:
    """Wait for what a GPU still has to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def stack_speedup(experiment: Task, runs: int, repeats: int = 5) -> float:
    """Time of SAM steps of several runs, one after the other, over that of one step of all of them, by ``vmap``."""
    config, objective = experiment.config, experiment.objective(0)
    gradient = torch.func.grad(pure_loss(experiment.model, experiment.loss))
    w = experiment.initial_parameters()
    many = w + 1e-3 * torch.randn(runs, len(w), generator=torch.Generator().manual_seed(0)).to(w)

    def step(params: Tensor) -> Tensor:
        here = functools.partial(gradient, inputs=objective.inputs, targets=objective.targets)
        return sam_step(here, params, config.learning_rate, config.rho)

    together = torch.func.vmap(step)
    seconds = side_by_side(
        {
            "sequential": lambda: [sam_step(objective.gradient, p, config.learning_rate, config.rho) for p in many],
            "stacked": lambda: together(many),
        },
        repeats,
    )
    return seconds["sequential"] / seconds["stacked"]


def record(name: str, result: dict[str, Any]) -> None:
    """Write a result, with the machine it was measured on, to ``benchmarks/results/<name>.json``, and print it."""
    about = {
        "processor": processor(),
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit(),
        "load_before": LOAD,
    }
    text = json.dumps({"machine": about, **_rounded(result)}, indent=1) + "\n"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(text, encoding="utf-8")
    print(text)


LOAD = os.getloadavg()[0]


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list | tuple) else value
