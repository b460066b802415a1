"""The recorded runs of the stochastic edge: which there are, and what is read off each of them.

Four parts, all on MNIST with one network (784-64-64-64-10, ReLU, 59,210 parameters) and squared error:

* *settling*: 100 examples, so that the tangent kernel is known in full; gradient descent with mini-batches;
* *rates*: 1,000 examples, learning rates that make the kernel's initial trace a chosen multiple of its bound;
* *sam*: as *settling*, with SAM;
* *sharpening*: 1,000 examples over all batch sizes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from ..config import RunConfig
from ..noise import noise_fraction
from ..runs import Run

__all__ = ["BEST_CONSTANT", "KERNELS", "MATCHED", "SEEDS", "TRACES", "configs", "ends", "part", "rate_at"]

SEEDS = (1001, 1002, 1003)
OUTPUTS = 10
BEST_CONSTANT = 0.09  # loss of the best predictor that ignores the image: one in ten classes
MATCHED = 0.012  # training loss at which runs are compared that learn at different speeds
KERNELS = (0.6, 0.85, 1.2, 1.7, 2.4, 3.4)  # initial K_tr of the part "rates"

# Traces of the tangent kernel at the initial weights of each seed, for 1,000 examples: learning rates follow from them.
TRACES = {1001: 40.514, 1002: 33.132, 1003: 35.963, 1004: 42.060, 1005: 33.191}


def rate_at(kernel: float, batch_size: int, seed: int, examples: int = 1000) -> float:
    """The learning rate, to four digits, at which p η trΘ/(2C) has this value at a seed's initial weights."""
    rate = kernel * 2 * OUTPUTS / (noise_fraction(examples, batch_size) * TRACES[seed])
    return float(f"{rate:.4g}")


def _run(examples: int, rate: float, batch_size: int, seed: int, rho: float = 0.0, **settings: Any) -> RunConfig:
    usual = {"profile": "reduced", "width": 64, "depth": 4, "measure_on": "all", "steps": 3000, "data": "real"}
    usual |= {"observables": ("noise_kernel",), "device": "cpu"}
    place = {"experiment": "mnist", "examples": examples, "learning_rate": rate, "rho": rho, "seed": seed}
    place["batch_size"] = None if batch_size == examples else batch_size
    return RunConfig(**{**usual, **place, **settings})


_KNOWN: Any = {"exact_noise": True, "observables": ("edge", "noise_kernel")}
_LEVELS: Any = {"measure_every": 600, "measure_at_losses": (MATCHED,)}


def _settling(rate: float, seed: int) -> list[RunConfig]:
    return [_run(100, rate, b, seed, measure_every=1500, **_KNOWN) for b in (2, 4, 8, 16, 32, 64, 100, 1)]


def _rates(seed: int) -> list[RunConfig]:
    grid = itertools.product((1, 2, 4, 8, 16), KERNELS)
    short: Any = {"steps": 1500, "measure_every": 1500, "path": ("loss",)}
    return [_run(1000, rate_at(kernel, b, seed), b, seed, **short) for b, kernel in grid]


def _sam(seed: int, *sizes: int) -> list[RunConfig]:
    grid = itertools.product(sizes, (0.1, 0.3, 0.03))
    return [_run(100, 1.0, b, seed, rho, measure_every=3000, **_KNOWN) for b, rho in grid]


def _sharpening(rate: float, seed: int) -> list[RunConfig]:
    return [_run(1000, rate, b, seed, **_LEVELS) for b in (2, 4, 8, 16, 64, 1000, 256, 1)]


def configs() -> list[RunConfig]:
    """All runs, in an order in which something of every part is there early: seed by seed, η = 1 first."""
    first = [_settling(1.0, s) + _rates(s) + _sam(s, 4) + _sharpening(1.0, s) + _sam(s, 16, 100, 2) for s in SEEDS]
    more = [_rates(s) for s in TRACES if s not in SEEDS]
    slow = [_settling(0.3, s) + _sharpening(0.3, s) for s in SEEDS]
    return list(itertools.chain(*first, *more, *slow))


def part(config: RunConfig) -> str:
    """Which part of the chapter a run belongs to."""
    if config.steps == 1500:
        return "rates"
    return "sharpening" if config.examples == 1000 else "sam" if config.rho else "settling"


def ends(runs: Sequence[Run]) -> pd.DataFrame:
    """One row per run: where it belongs, whether it learnt, and the curvature at its start and at its end.

    Columns: ``run_id``, ``part``, ``examples``, ``learning_rate``, ``rho``, ``batch_size``, ``seed``, ``outcome``,
    ``trained``; ``loss``; ``sharpness``, the largest eigenvalue λ of the tangent kernel, ``edge_ratio`` ηλ/2, and
    ``trace``; ``kernel``, K, exact where it was measured and else its upper bound, with its median ``settled_kernel``
    from step 600 on; ``exact_kernel`` K*; ``sgd_sharpness`` λ_gen, ``sgd_edge_ratio`` ηλ_gen/2, and SAM's ``factor`` φ;
    those with the beginning ``first_`` at the initial weights, those with ``matched_`` where the loss first was 0.012;
    ``trace_kernel`` K_tr of the initial weights; ``hessian_norm`` where it was measured. NaN of runs that diverged.
    """
    rows = [_ends(run) for run in runs]
    table = pd.DataFrame(rows) if rows else pd.DataFrame(columns=_COLUMNS)
    return table.astype({"trained": bool})


def _ends(run: Run) -> dict[str, Any]:
    config, rows = run.config, run.measurements
    first, last = rows.iloc[0], rows.iloc[-1]
    place = {"run_id": run.id, "part": part(config), "examples": config.examples}
    place |= {name: getattr(config, name) for name in ("learning_rate", "rho", "seed")}
    place |= {"batch_size": config.batch_size or config.examples, "outcome": run.outcome, "trained": _trained(run)}
    level = rows[rows.loss_level == MATCHED] if "loss_level" in rows else rows[:0]
    matched = level.iloc[0] if len(level) else pd.Series(dtype=float)
    kernels = rows[rows.step >= 600].get(_kernel_column(rows), pd.Series(dtype=float))
    values = _curvature(last, config.learning_rate, _kernel_column(rows))
    values |= {f"first_{n}": v for n, v in _curvature(first, config.learning_rate, _kernel_column(rows)).items()}
    values |= {f"matched_{n}": matched.get(c, math.nan) for n, c in _SIZES.items()}
    return {
        **place,
        **values,
        "settled_kernel": kernels.median() if run.outcome == "finished" else math.nan,
        "trace_kernel": first.noise_kernel_trace,
        "hessian_norm": last.get("eigenvalue_1", math.nan),
    }


_SIZES = {"sharpness": "ntk_eigenvalue_1", "trace": "ntk_trace"}
_NAMES = {
    "loss": "full_loss",
    **_SIZES,
    "exact_kernel": "noise_kernel_exact",
    "sgd_sharpness": "sgd_sharpness",
    "sgd_edge_ratio": "sgd_edge_ratio",
    "factor": "sam_factor",
}


_COLUMNS = [
    *("run_id", "part", "examples", "learning_rate", "rho", "seed", "batch_size", "outcome", "trained"),
    *(f"{start}{name}" for start in ("", "first_") for name in (*_NAMES, "edge_ratio", "kernel")),
    *(f"matched_{name}" for name in _SIZES),
    *("settled_kernel", "trace_kernel", "hessian_norm"),
]


def _kernel_column(rows: pd.DataFrame) -> str:
    return "noise_kernel" if "noise_kernel" in rows else "noise_kernel_high"


def _curvature(row: pd.Series, rate: float, kernel: str) -> dict[str, float]:
    values = {name: row.get(column, math.nan) for name, column in _NAMES.items()}
    return values | {"edge_ratio": rate * values["sharpness"] / 2, "kernel": row.get(kernel, math.nan)}


def _trained(run: Run) -> bool:
    """Whether a run learnt: its loss is below half of the best constant predictor's.

    Where the loss of every step was kept it is the median of the last third of these, each of one mini-batch.
    """
    if run.outcome == "diverged":
        return False
    loss = run.last.full_loss
    if run.path is not None and "loss" in run.path:
        loss = run.path.loss[run.path.step >= run.config.steps * 2 / 3].median()
    return bool(loss < BEST_CONSTANT / 2)
