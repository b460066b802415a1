"""The runs of the chapter on GraphSAM, in the order of their weight, and what a step of its rules costs.

Prototypes used seeds and splits 0 to 2; those of the record start at 3.
"""

from __future__ import annotations

import time
from typing import Any

import pandas as pd
from torch import nn

from ..config import RunConfig
from ..experiments.task import Task
from ..rules import optimizer
from ..stepping import Closure, take
from .graphsam_readings import METHODS

__all__ = ["configs", "cost", "costs"]

_MNIST = {"experiment": "mnist", "profile": "reduced", "learning_rate": 0.3, "rho": 0.1, "steps": 400, "data": "real"}
_EDGES = {**_MNIST, "measure_every": 20}
_CYCLES = {**_MNIST, "measure_every": 200, "path": ["projection"]}
_MOLECULES = {"experiment": "molecules", "profile": "reduced", "data": "real"}
# Ten epochs each.
_SETS: dict[str, dict[str, Any]] = {
    "esol": {"learning_rate": 2e-3, "rho": 0.003, "steps": 280, "test_every": 28},
    "bbbp": {"learning_rate": 1e-3, "rho": 0.02, "steps": 500, "test_every": 50},
}
_FULL_BATCH = {
    **{"molecules": "esol", "split": 3, "examples": 200, "batch_size": 200, "measure_on": "all", "width": 32},
    **{"layers": 2, "base": "sgd", "schedule": "constant", "learning_rate": 0.003, "rho": 0.02},
    **{"steps": 300, "measure_every": 20},
}


def _run(name: str, seed: int, *settings: dict[str, Any]) -> RunConfig:
    given: dict[str, Any] = {}
    for part in (*settings, METHODS[name]):
        given |= part
    return RunConfig(**given, seed=seed, device="cpu")


def _quality(data: str, split: int, name: str) -> RunConfig:
    # The spectrum is not what these are about: at both ends, the cheapest look at it.
    look = {"measure_every": _SETS[data]["steps"], "observables": ["gauss_newton_norm"], "tolerance": 0.3}
    own = {**_SETS[data], "molecules": data, "split": split, **look}
    looked_at = name.startswith("epoch") and split < 6  # it costs a gradient a step
    path = ["cache_age", "uphill", "uphill_cosine"] if looked_at else ["cache_age"]
    return _run(name, split, _MOLECULES, own, {"path": path})


def configs() -> list[RunConfig]:
    """In the order of their weight for the chapter: what time leaves out stands last."""
    edges = ["base", "SAM", "k = 2", "k = 5", "k = 10", "k = 20", "β = 0"]
    cycles = ["SAM", "k = 5", "k = 10", "β = 0"]

    def mnist(seed: int) -> list[RunConfig]:
        return [_run(n, seed, _EDGES) for n in edges] + [_run(n, seed, _CYCLES) for n in cycles]

    def molecules(seed: int) -> list[RunConfig]:
        return [_run(name, seed, _MOLECULES, _FULL_BATCH) for name in ("k = 10", "SAM", "base")]

    compared = ("base", "epoch, β = 0.99", "epoch, β = 0")
    esol = [_quality("esol", split, name) for split in range(3, 8) for name in compared]
    sam = [_quality("esol", split, "SAM") for split in range(3, 8)]
    bbbp = [_quality("bbbp", split, name) for split in range(3, 8) for name in (*compared[1:], "base", "SAM")]
    first, *others = molecules(3)
    start = [*mnist(3), *esol, *sam, first, *mnist(4), *others]
    return [*start, *bbbp[:2], *mnist(5), *molecules(4), *bbbp[2:]]


def cost() -> pd.DataFrame:
    base = _quality("esol", 3, "base")
    rules = {name: _quality("esol", 3, name) for name in ("SAM", "epoch, β = 0.99")}
    own = {**_MOLECULES, **_SETS["esol"], "split": 3, "rule": "graphsam", "every": 5, "cache_beta": 0.99}
    return costs(base, {**rules, "k = 5": RunConfig(**own, seed=3, device="cpu")}, steps=28, repeats=5)


def costs(config: RunConfig, rules: dict[str, RunConfig], steps: int, repeats: int) -> pd.DataFrame:
    """Processor time of a step of several rules, which take turns step by step, so that a busy machine is fair.

    Args:
        config: the base alone, which the others are compared with.
        rules: by name.
        steps: of each, per repeat.
        repeats: each from the start, with mini-batches of its own.

    Returns:
        For each repeat and rule: ``gradients`` and ``milliseconds`` per step, and ``cpu_ratio`` to the base.
    """
    everyone, rows = {"base": config, **rules}, []
    for repeat in range(repeats):
        task = Task(config.model_copy(update={"seed": repeat}))
        vectors = {name: nn.Parameter(task.initial_parameters()) for name in everyone}
        steppers = {name: optimizer(c, vectors[name], task.epoch) for name, c in everyone.items()}
        seconds, evaluations = dict.fromkeys(everyone, 0.0), dict.fromkeys(everyone, 0)
        for step in range(steps):
            objective = task.objective(step)
            for name in everyone:
                closure = Closure(objective, vectors[name], step=step)
                began = time.process_time()
                take(steppers[name], closure)
                seconds[name] += time.process_time() - began
                evaluations[name] += len(closure.losses)
        for name in everyone:
            ratio = seconds[name] / seconds["base"]
            rows.append((name, repeat, evaluations[name] / steps, 1e3 * seconds[name] / steps, ratio))
    return pd.DataFrame(rows, columns=["rule", "repeat", "gradients", "milliseconds", "cpu_ratio"])
