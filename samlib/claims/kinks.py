"""Kinks: what finite differences, the paper's way of measuring, read on networks that have no second derivative."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ..config import RunConfig
from ..runs import Run
from .base import Chapter, Claim, Evidence, Unit, last_half
from .paper import NEAR_THE_EDGE

__all__ = ["CHAPTER", "KINKED", "REFERENCE_STEP", "SMOOTH", "configs"]

KINKED = ("mnist", "cifar10")  # with ReLU; the third experiment's network is smooth
REFERENCE_STEP, SHORT_STEP = "difference_0.001", "difference_1e-05"
SMOOTH = 0.02  # relative difference that counts as none
MORE = 1.2  # what a short difference reads over the Hessian, to count as more

_RUNS: dict[str, dict[str, Any]] = {
    "mnist": {"learning_rate": 0.3, "rho": 0.1, "steps": 1000, "measure_every": 100},
    "cifar10": {"learning_rate": 0.003, "rho": 0.1, "steps": 160, "measure_every": 20},
    "shakespeare": {"learning_rate": 0.1, "rho": 0.1, "steps": 200, "measure_every": 40},
}


def configs() -> list[RunConfig]:
    """A run of SAM for each experiment, in float64, so that rounding has no part in it."""
    usual: dict[str, Any] = {"profile": "reduced", "data": "real", "device": "cpu", "seed": 1, "dtype": "float64"}
    usual["observables"] = ("edge", "finite_difference_norm", "gauss_newton_norm")
    return [RunConfig(experiment=name, **usual, **settings) for name, settings in _RUNS.items()]


def _points(
    kinked: bool, column: str, after: int, supports: Callable[[float], bool]
) -> Callable[[Evidence], list[Unit]]:
    """A unit for each measurement from some step on: what a difference reads, over the exact ‖Hv‖."""

    def units(evidence: Evidence) -> list[Unit]:
        found = []
        for run in evidence.runs:
            if (run.config.experiment in KINKED) != kinked:
                continue
            for row in run.measurements.to_dict("records"):
                if row["step"] >= after:
                    ratio = float(row[column] / row["operator_norm"])
                    place = {"experiment": run.config.experiment, "step": int(row["step"])}
                    found.append(Unit(place, {"ratio": ratio}, supports(ratio), (run,)))
        return found

    return units


def _by_their_reading(evidence: Evidence) -> list[Unit]:
    return [_reading(run) for run in evidence.runs if run.config.experiment in KINKED and run.outcome == "finished"]


def _reading(run: Run) -> Unit:
    half = last_half(run)
    numbers = {"ratio": float((half.reference_norm / half.edge).median()), "exact": float(half.edge_ratio.median())}
    low, high = NEAR_THE_EDGE
    return Unit({"experiment": run.config.experiment}, numbers, low <= numbers["ratio"] <= high, (run,))


_HERE = ("kinks",)

CLAIMS: tuple[Claim, ...] = (
    Claim(
        "smooth_control",
        "On the smooth Transformer finite differences read the exact curvature.",
        "this page",
        "measurement",
        "‖∇ℓ(w + sv) − ∇ℓ(w − sv)‖/2s at s = 0.001 over ‖Hv‖, v the principal eigenvector",
        f"within {SMOOTH:.0%} of 1",
        _points(False, REFERENCE_STEP, 0, lambda ratio: abs(ratio - 1) <= SMOOTH),
        _HERE,
        band=(1 - SMOOTH, 1 + SMOOTH),
    ),
    Claim(
        "no_limit",
        "On ReLU networks finite differences do not settle: short ones read more than the exact curvature.",
        "this page",
        "measurement",
        "‖∇ℓ(w + sv) − ∇ℓ(w − sv)‖/2s at s = 0.00001 over ‖Hv‖, after the start of training",
        f"at least {MORE}",
        _points(True, SHORT_STEP, 1, lambda ratio: ratio >= MORE),
        _HERE,
        band=(MORE, math.inf),
    ),
    Claim(
        "their_reading",
        "Measured as the paper's code measures, SAM trains at its edge as well.",
        "Long & Bartlett (2024), figures of operator norm and SAM edge",
        "run",
        "median over the last half of training of the norm as the paper's code reads it over the SAM edge",
        f"between {NEAR_THE_EDGE[0]} and {NEAR_THE_EDGE[1]}",
        _by_their_reading,
        _HERE,
        band=NEAR_THE_EDGE,
    ),
)

CHAPTER = Chapter("kinks", "Kinks", "long2024sam", configs, CLAIMS)
