"""The universal class: which runs are recorded, and where each stands in the tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from ..config import RunConfig
from ..runs import Run

__all__ = ["LEVELS", "SEEDS", "STUDIES", "configs", "measure_at_level", "study"]

SEEDS = (11, 12, 13)  # none of those of the trials that the thresholds were chosen after
LEVELS = {"table": 0.002, "published": 0.06}  # the training loss at which runs are compared

_CUBE = 0.01


def _universal(rule: str, **settings: Any) -> dict[str, Any]:
    return {"rule": rule, "rho": 0.01, "strength": 1.0, "samples": 2, **settings}


_NOISE = _universal("trace_sam", samples=1, paired=False)

# How the runs of a study step, by the name that its pages use; those that bear on most come first.
_TABLE = {
    "GD": {"rho": 0.0},
    "SAM": {"rho": 0.1},
    "Frobenius, paired": _universal("frobenius_sam", strength=5.0),
    "trace, plain": _NOISE,
    "determinant, paired": _universal("determinant_sam", determinant_beta=0.3),
    "Frobenius, published": _universal("frobenius_sam", strength=0.005, paired=False),
    "determinant, published": {"rule": "published_determinant_sam", "rho": 1.0, "strength": 1.0, "cube": _CUBE},
    "trace at h/√3": {**_NOISE, "rho": _CUBE / math.sqrt(3)},
    "Frobenius, plain": _universal("frobenius_sam", strength=0.3, paired=False),
}
_EDGES = {
    "GD": {"rho": 0.0},
    "trace, plain, n = 1": _NOISE,
    "trace, paired": _universal("trace_sam"),
    "unnormalised SAM": {"rule": "usam", "rho": 0.1},
    "determinant, paired": _universal("determinant_sam", determinant_beta=0.3),
    "Frobenius, paired": _universal("frobenius_sam", strength=2.0, samples=4),
    "SAM": {"rho": 0.1},
    "Frobenius, plain": _universal("frobenius_sam", strength=0.1, rho=1e-3, paired=False),
    "trace, plain, n = 8": {**_NOISE, "samples": 8},
}
_PUBLISHED = {
    "SGD": {"rho": 0.0},
    "Frobenius, published": _universal("frobenius_sam", strength=0.005, paired=False),
    "its Frobenius term": _universal("frobenius_sam", strength=0.005),
    "its gradient penalty": {"rule": "usam", "rho": 0.005},
    "weight noise": _NOISE,
    "SAM": {"rho": 0.05},
}
_KINKS = {name: {"rho": 0.0, "activation": name.lower()} for name in ("ReLU", "GELU")}

STUDIES: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "table": _TABLE,
    "edges": _EDGES,
    "published": _PUBLISHED,
    "kinks": _KINKS,
}

_SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "table": {
        **{"examples": 1000, "learning_rate": 1.0, "stop_at_loss": LEVELS["table"], "steps": 4000},
        **{"measure_every": 4000, "observables": "edge,frobenius_norm,trace,log_determinant", "widths": "128,128"},
    },
    "edges": {
        **{"examples": 500, "learning_rate": 1.5, "activation": "tanh", "steps": 600, "warmup_steps": 50},
        **{"measure_every": 150, "observables": "edge,own_sharpness", "widths": "128,128"},
    },
    "published": {
        **{"examples": 5000, "batch_size": 128, "learning_rate": 0.01, "momentum": 0.9, "loss": "cross_entropy"},
        **{"measure_on": "all", "steps": 3000, "measure_every": 3000, "initial_weights": "pytorch"},
        **{"loss_every": 5, "stop_at_loss": LEVELS["published"], "widths": "128,128,128,128,128,128"},
        **{"observables": "frobenius_norm", "exact_pairs": 8, "probes": 1},
    },
    "kinks": {
        **{"examples": 1000, "learning_rate": 1.0, "steps": 400, "measure_every": 200, "widths": "128,128"},
        **{"observables": "trace,sampled_trace", "trace_samples": 32},
    },
}

# In which order they are recorded, each part at all seeds: what the claims hang on comes first.
_CLAIMED = (("kinks", 0, 2), ("table", 0, 5), ("edges", 0, 6), ("table", 5, 8), ("published", 0, 3))
_BESIDE = (("published", 3, 4), ("edges", 6, 7), ("table", 8, 9), ("edges", 7, 9), ("published", 4, 6))


@cache
def _config(kind: str, name: str, seed: int) -> RunConfig:
    given = {"experiment": "mnist", "profile": "reduced", "data": "real", "device": "cpu", "seed": seed}
    return RunConfig(**{**given, **_SETTINGS[kind], **STUDIES[kind][name]})


def configs() -> list[RunConfig]:
    """All runs of the chapter, in the order in which they are recorded."""
    return [
        _config(kind, name, seed)
        for part in (_CLAIMED, _BESIDE)
        for seed in SEEDS
        for kind, first, last in part
        for name in list(STUDIES[kind])[first:last]
    ]


def study(runs: Sequence[Run], kind: str) -> dict[tuple[str, int], Run]:
    """The recorded runs of one study, by name and seed, in the order of the tables."""
    recorded = {run.config.model_copy(update={"data": "real"}): run for run in runs}
    wanted = {(name, seed): _config(kind, name, seed) for name in STUDIES[kind] for seed in SEEDS}
    return {place: recorded[config] for place, config in wanted.items() if config in recorded}


def measure_at_level(run: Run, level: float, column: str) -> float:
    """A measured column where a run stopped at a level of the training loss, or within the few steps between two
    looks at it; NaN of a run that does not reach it."""
    reached = run.outcome == "finished" and run.last.loss <= 1.001 * level
    return float(run.last[column]) if reached else math.nan
