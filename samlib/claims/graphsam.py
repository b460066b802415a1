"""GraphSAM: what is claimed, by thresholds that were set before the runs were recorded.

They come from prototypes on seeds and splits 0 to 2; the record has others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pandas as pd

from ..edges import sam_edge
from ..optim import EPSILON
from ..runs import Run
from ..toys.cached import identity
from .base import Chapter, Claim, Evidence, Unit, last_half, paired
from .graphsam_readings import (
    ages,
    differences,
    in_order,
    method,
    of_cycles,
    of_edges,
    of_quality,
    period,
    refresh,
)
from .graphsam_runs import configs, cost

__all__ = ["CHAPTER", "intervals"]

NEAR_THE_EDGE = (0.9, 1.2)
NEAR_THE_EDGE_OF_THE_PREVIOUS = (0.9, 1.1)
CHEAP = 1.25  # processor time over the base's
OFTEN = 0.8  # share of steps
WITHIN = 0.1  # of a predicted period
FEWEST_SPLITS = 5


def _place(run: Run, **more: Any) -> dict[str, Any]:
    what = run.config.molecules if run.config.experiment == "molecules" else "mnist"
    return {"data": what, "method": method(run), **more, "seed": run.config.seed}


def _cached(runs: Any) -> Iterator[Run]:
    return (r for r in in_order(runs) if r.config.rule == "graphsam" and r.outcome == "finished")


def _evaluations(evidence: Evidence) -> list[Unit]:
    units = []
    for run in _cached(evidence.runs):
        steps = run.config.steps
        excess = float(run.provenance["gradients"] - steps - math.ceil(steps / refresh(run)))
        units.append(Unit(_place(run), {"excess": excess}, excess == 0, (run,)))
    return units


def _processor(evidence: Evidence) -> list[Unit]:
    rows = evidence.toys.get("cost", pd.DataFrame(columns=["rule", "repeat", "cpu_ratio"]))
    name = "epoch, β = 0.99"
    rows = rows[rows.rule == name]
    ratios = zip(rows.repeat.tolist(), rows.cpu_ratio.tolist(), strict=True)
    return [Unit({"method": name, "seed": n}, {"cpu_ratio": ratio}, ratio <= CHEAP) for n, ratio in ratios]


def intervals(runs: Iterable[Run]) -> pd.DataFrame:
    """Mean differences of the test error to the base's, with paired 95 % intervals: a row per set and method."""
    frame = differences(runs)
    rows = []
    for data, name in dict.fromkeys(zip(frame.set.tolist(), frame.method.tolist(), strict=True)):
        part = frame[(frame.set == data) & (frame.method == name)]
        rows.append((data, name, len(part), *paired(part, "difference"), " ".join(part.run_id)))
    return pd.DataFrame(rows, columns=["set", "method", "splits", "mean", "low", "high", "run_ids"])


def _improves(evidence: Evidence) -> list[Unit]:
    units = []
    for data, name, splits, mean, low, high, ids in intervals(evidence.runs).to_numpy().tolist():
        if name == "SAM" or splits < FEWEST_SPLITS:
            continue
        numbers = {"difference": mean, "low": low, "high": high, "splits": float(splits)}
        behind = tuple(run for run in evidence.runs if run.id in ids.split())
        units.append(Unit({"data": data, "method": name}, numbers, high < 0, behind))
    return units


def _hull(details: pd.DataFrame, statistic: str) -> tuple[float, float, float]:
    return float(details[statistic].mean()), float(details.low.min()), float(details.high.max())


def _uphill(beta: float) -> Callable[[Evidence], list[Unit]]:
    def units(evidence: Evidence) -> list[Unit]:
        found = []
        for run in _cached(of_quality(evidence.runs)):
            if run.config.cache_beta != beta or "uphill" not in run.config.path:
                continue
            rows = ages(run)
            rows = rows[rows.age >= 4]
            share = float((rows.uphill > 0).mean())
            numbers = {"share": share, "cosine": float(rows.uphill_cosine.mean())}
            found.append(Unit(_place(run), numbers, share >= OFTEN, (run,)))
        return found

    return units


def _near(value: float, bounds: tuple[float, float]) -> bool:
    return bool(bounds[0] <= value <= bounds[1])


def _held(runs: Any) -> Iterator[Run]:
    """The full-batch runs that hold their direction, for ten steps at most."""
    both = (*of_edges(runs), *of_edges(runs, "molecules"))
    return (run for run in _cached(both) if run.config.cache_beta == 1 and run.config.every <= 10)


def _curvature(rows: pd.DataFrame) -> dict[str, float]:
    """What is told beside a ratio, which may be one on a quadratic too: how far λ itself has come down."""
    return {"norm": float(rows.operator_norm.median()), "of 2/η": float((rows.operator_norm / rows.gd_edge).median())}


def _at_the_sam_edge(evidence: Evidence) -> list[Unit]:
    units = []
    for run in _held(evidence.runs):
        rows = last_half(run)
        edge = sam_edge(rows.grad_norm.to_numpy() + EPSILON, run.config.learning_rate, run.config.rho)
        ratio = float((rows.operator_norm / edge).median())
        units.append(Unit(_place(run), {"ratio": ratio, **_curvature(rows)}, _near(ratio, NEAR_THE_EDGE), (run,)))
    return units


def _at_its_own_edge(evidence: Evidence) -> list[Unit]:
    units = []
    for run in _held(evidence.runs):
        rows = last_half(run)
        rows = rows[run.config.learning_rate * rows.operator_norm < 1]
        if len(rows):
            ratio = float(rows.edge_ratio.median())
            numbers = {"ratio": ratio, **_curvature(rows)}
            units.append(Unit(_place(run), numbers, _near(ratio, NEAR_THE_EDGE), (run,)))
    return units


def _at_the_edge_of_the_previous(evidence: Evidence) -> list[Unit]:
    units = []
    for run in _cached(of_edges(evidence.runs)):
        if run.config.cache_beta == 0:
            rows = last_half(run)
            ratio = float((rows.operator_norm * run.config.rho / rows.sam_grad_norm).median())
            supports = _near(ratio, NEAR_THE_EDGE_OF_THE_PREVIOUS)
            units.append(Unit(_place(run), {"ratio": ratio, **_curvature(rows)}, supports, (run,)))
    return units


def _periods(evidence: Evidence) -> list[Unit]:
    units = []
    for run in of_cycles(evidence.runs):
        if run.outcome == "finished":
            found, wanted = period(run)
            numbers = {"ratio": found / wanted, "period": found, "predicted": wanted}
            units.append(Unit(_place(run), numbers, abs(found / wanted - 1) <= WITHIN, (run,)))
    return units


_HERE = ("graphsam",)
_OWN = "a prediction of this book"
_PUBLISHED = "Wang et al. (2024)"
_EDGE = f"between {NEAR_THE_EDGE[0]} and {NEAR_THE_EDGE[1]}"

CLAIMS = (
    Claim(
        "evaluations",
        "A period of k steps costs exactly T + ⌈T/k⌉ gradients in T steps.",
        f"{_PUBLISHED}, abstract: a lower cost than SAM",
        "run",
        "gradients of the run minus T + ⌈T/k⌉",
        "0",
        _evaluations,
        _HERE,
        band=(-0.5, 0.5),
    ),
    Claim(
        "cost",
        "A perturbation cached for an epoch costs hardly more than the base optimizer.",
        f"{_PUBLISHED}, abstract: a lower cost than SAM",
        "repeat of the comparison",
        "processor time of a step over that of the base",
        f"at most {CHEAP}",
        _processor,
        _HERE,
        band=(0, CHEAP),
    ),
    Claim(
        "improves",
        "On molecules, the cached perturbation improves on Adam.",
        _PUBLISHED,
        "set and method",
        "mean difference of the test error to Adam's over scaffold splits",
        f"at least {FEWEST_SPLITS} splits, and the paired 95 % interval lies below 0",
        _improves,
        _HERE,
        interval=_hull,
        expected="no gain was seen in trials",
        band=(-math.inf, 0),
    ),
    Claim(
        "uphill",
        "The cached perturbation, averaged with β = 0.99 as published, goes uphill.",
        f"{_PUBLISHED}: it approximates SAM's",
        "run",
        "share of steps, four and more after a true gradient, whose perturbation raises the loss of their mini-batch",
        f"at least {OFTEN}",
        _uphill(0.99),
        _HERE,
        expected="in trials on ESOL it went downhill",
        band=(OFTEN, 1.0),
    ),
    Claim(
        "uphill_previous",
        "The gradient of the step before (β = 0) goes uphill.",
        _OWN,
        "run",
        "share of steps, four and more after a true gradient, whose perturbation raises the loss of their mini-batch",
        f"at least {OFTEN}",
        _uphill(0.0),
        _HERE,
        band=(OFTEN, 1.0),
    ),
    Claim(
        "sam_edge",
        "SAM with a held perturbation trains at the SAM edge.",
        "what Long & Bartlett (2024) found for SAM",
        "run",
        "median of ‖H‖/SAM edge over the last half of training, k ≤ 10",
        _EDGE,
        _at_the_sam_edge,
        _HERE,
        expected="below it, at an edge of its own",
        band=NEAR_THE_EDGE,
    ),
    Claim(
        "own_edge",
        "SAM with a held perturbation trains at an edge of its own.",
        _OWN,
        "run",
        "median of ‖H‖/edge over the last half of training, k ≤ 10, where ηλ < 1",
        _EDGE,
        _at_its_own_edge,
        _HERE,
        band=NEAR_THE_EDGE,
    ),
    Claim(
        "previous_edge",
        "With β = 0 the cached perturbation trains at ‖u‖/ρ.",
        _OWN,
        "run",
        "median of ρλ/‖u‖ over the last half of training",
        f"between {NEAR_THE_EDGE_OF_THE_PREVIOUS[0]} and {NEAR_THE_EDGE_OF_THE_PREVIOUS[1]}",
        _at_the_edge_of_the_previous,
        _HERE,
        band=NEAR_THE_EDGE_OF_THE_PREVIOUS,
    ),
    Claim(
        "period",
        "At its edge a cached perturbation oscillates with a period of 2k steps, or of 2π/arccos(1 − ηλ/2) with β = 0.",
        _OWN,
        "run",
        "period along the principal eigenvector over the predicted one",
        f"within {WITHIN:.0%}",
        _periods,
        _HERE,
        band=(1 - WITHIN, 1 + WITHIN),
    ),
)

CHAPTER = Chapter(
    "graphsam", "GraphSAM", "wang2024efficient", configs, CLAIMS, toys={"cost": cost, "identity": identity}
)
