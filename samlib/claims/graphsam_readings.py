"""What the chapter on GraphSAM reads off its runs: their methods, how old the cache is, test errors, periods."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from ..edges_cached import rotation_period
from ..rules import RULES
from ..runs import Run

__all__ = [
    "METHODS",
    "ages",
    "differences",
    "final_error",
    "in_order",
    "method",
    "of_cycles",
    "of_edges",
    "of_quality",
    "period",
    "refresh",
]

# By the words of the page: rule, period and averaging.
METHODS: dict[str, dict[str, Any]] = {
    "base": {"rho": 0.0},
    "SAM": {},
    **{f"k = {k}": {"rule": "graphsam", "every": k, "cache_beta": 1.0} for k in (2, 5, 10, 20)},
    "β = 0": {"rule": "graphsam", "every": 200, "cache_beta": 0.0},
    "epoch, β = 0.99": {"rule": "graphsam", "every": "epoch", "cache_beta": 0.99},
    "epoch, β = 0": {"rule": "graphsam", "every": "epoch", "cache_beta": 0.0},
}


def method(run: Run) -> str:
    """What the page calls the rule of a run."""
    config = run.config
    for name, settings in METHODS.items():
        known = {"rho": config.rho, "rule": config.rule} if config.rho == 0 else {"rule": config.rule}
        wanted = {"rule": "sam", **settings}
        if config.rule == "graphsam":
            known |= {"every": config.every, "cache_beta": config.cache_beta}
        if known == wanted:
            return name
    return f"k = {config.every}, β = {config.cache_beta:g}" if config.rule == "graphsam" else RULES[config.rule].title


def in_order(runs: Iterable[Run]) -> list[Run]:
    """By method as :data:`METHODS` has them, then by seed."""
    names = list(METHODS)

    def place(run: Run) -> tuple[int, int]:
        name = method(run)
        return (names.index(name) if name in names else len(names)), run.config.seed

    return sorted(runs, key=place)


def of_edges(runs: Iterable[Run], experiment: str = "mnist") -> list[Run]:
    """The full-batch runs whose edge was measured along the way."""
    return [
        r for r in in_order(runs) if r.config.experiment == experiment and _whole(r) and r.config.measure_every < 100
    ]


def of_cycles(runs: Iterable[Run]) -> list[Run]:
    """The runs that recorded their projection on the principal eigenvector."""
    return [r for r in in_order(runs) if "projection" in r.config.path]


def of_quality(runs: Iterable[Run]) -> list[Run]:
    """The mini-batch runs on molecules."""
    return [r for r in in_order(runs) if r.config.experiment == "molecules" and not _whole(r)]


def _whole(run: Run) -> bool:
    return run.config.batch_size is None or run.config.measure_on == "all"


def refresh(run: Run) -> int:
    """Steps from one true gradient to the next; of "epoch", as recorded."""
    assert run.path is not None or run.config.every != "epoch"
    return int(run.path.cache_age.max()) + 1 if run.config.every == "epoch" else run.config.every  # type: ignore[union-attr]


def ages(run: Run) -> pd.DataFrame:
    """The path after the first epoch, with ``age``, the number of steps since the last true gradient."""
    assert run.path is not None
    rows = run.path.assign(age=run.path.cache_age.shift(1, fill_value=0.0))
    return rows[rows.step >= refresh(run)]


def final_error(run: Run) -> float:
    """The test error after an epoch, the mean over the last five."""
    assert run.path is not None
    along = run.path.test_metric.dropna().iloc[-4:]
    return float(np.mean([*along, run.last.test_metric]))


def differences(runs: Iterable[Run]) -> pd.DataFrame:
    """Test errors minus the base's, a row per set, method and split."""
    chosen = [r for r in of_quality(runs) if r.outcome == "finished"]
    rows = pd.DataFrame(
        [(r.config.molecules, method(r), r.config.split, final_error(r), r.id) for r in chosen],
        columns=["set", "method", "split", "error", "run_id"],
    )
    base = rows[rows.method == "base"].set_index(["set", "split"]).error.rename("base")
    rows = rows[rows.method != "base"].join(base, on=["set", "split"], how="inner")
    return rows.assign(difference=rows.error - rows.base).reset_index(drop=True)


def period(run: Run) -> tuple[float, float]:
    """The period of the projection on the principal eigenvector over the last half, and the predicted one, in steps.

    The highest peak of the periodogram: a cubic drift removed, Hann window, zeros to 32 times the length, two turns at
    least.
    """
    assert run.path is not None
    half = run.measurements[run.measurements.step >= run.measurements.step.max() / 2]
    along = run.path[run.path.step >= half.step.min()].projection.to_numpy(float)
    time = np.linspace(-1, 1, len(along))
    along = (along - np.polyval(np.polyfit(time, along, 3), time)) * np.hanning(len(along))
    power = np.abs(np.fft.rfft(along, 32 * len(along))) ** 2
    found = 32 * len(along) / (64 + power[64:].argmax())
    if run.config.rule == "graphsam" and run.config.cache_beta == 0:
        wanted = float(rotation_period(half.operator_norm.median(), run.config.learning_rate))
    else:
        wanted = 2.0 * (refresh(run) if run.config.rule == "graphsam" else 1)
    return float(found), wanted
