"""The universal class: the statistics of its claims, each a number per unit, and the thresholds that support them.

The thresholds were fixed after trial runs on seeds 0 to 2, before any of the runs and toys that are judged were made.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from ..runs import Run
from .base import Evidence, Unit, last_half
from .universal_runs import LEVELS, SEEDS, STUDIES, measure_at_level, study

__all__ = [
    "AT_START",
    "BELOW",
    "COSINE",
    "DRIFT",
    "KINKED",
    "MEASURES",
    "MECHANISM",
    "NO_EFFECT",
    "OWN_AT_MOST",
    "OWN_EDGE",
    "OWN_MEASURE",
    "REST",
    "REST_WITHIN",
    "SAME",
    "SMOOTH",
    "better_than_sam",
    "determinant_is_trace",
    "drift",
    "kinks",
    "own_edge",
    "own_measure",
    "published_mechanism",
    "published_strength",
    "ratio_to",
    "resting_places",
    "selectivity",
]

OWN_MEASURE = {"Frobenius": "frobenius_norm", "trace": "trace", "determinant": "log_determinant"}
MEASURES = ("eigenvalue_1", "trace", "frobenius_norm", "log_determinant")
DRIFT, COSINE = (0.95, 1.05), 0.995
REST = {"frobenius_norm": 8, "trace": 4, "log_determinant": 16}  # measures with a resting place, and their samples
REST_WITHIN = 0.03
OWN_AT_MOST = {"Frobenius, paired": 0.6, "trace, plain": 0.6, "determinant, paired": 0.7}
NO_EFFECT = 0.97
MECHANISM = (0.93, 0.75)  # the Frobenius term alone keeps so much of ‖H‖_F, the published update at most that
SAME = 0.03
OWN_EDGE, BELOW = (0.9, 1.15), 0.85
AT_THEIR_EDGE = ("GD", "unnormalised SAM", "trace, paired", "determinant, paired", "Frobenius, paired")
KINKED, SMOOTH, AT_START = 3.0, (0.9, 1.1), (0.8, 1.2)


def _own(name: str) -> str:
    """The column of the measure that a rule of the tables is about."""
    return OWN_MEASURE[name.split(",")[0].split(" ")[0]]


def ratio_to(evidence: Evidence, kind: str, name: str, seed: int, column: str, to: str = "GD") -> float:
    """A measure of a run at the level of its study over that of gradient descent from the same initial weights."""
    runs = study(evidence.runs, kind)
    ours, gd = (measure_at_level(runs[n, seed], LEVELS[kind], column) for n in (name, to))
    return ours / gd


def _pair(evidence: Evidence, kind: str, seed: int, *names: str) -> tuple[Run, ...]:
    """The runs of some names at a seed, or none if one is missing."""
    runs = study(evidence.runs, kind)
    found = tuple(runs[name, seed] for name in names if (name, seed) in runs)
    return found if len(found) == len(names) else ()


def _seeds(
    kind: str,
    names: tuple[str, ...],
    numbers: Callable[[Evidence, int], dict[str, float]],
    supports: Callable[[dict[str, float]], bool],
) -> Callable[[Evidence], list[Unit]]:
    """A unit for each seed at which all named runs are recorded."""

    def units(evidence: Evidence) -> list[Unit]:
        found = []
        for seed in SEEDS:
            if runs := _pair(evidence, kind, seed, *names):
                values = numbers(evidence, seed)
                found.append(Unit({"seed": seed}, values, bool(supports(values)), runs))
        return found

    return units


def drift(evidence: Evidence) -> list[Unit]:
    rows = evidence.toys.get("drift", pd.DataFrame())
    found = []
    row: Any
    for row in rows.itertuples():
        if row.name == "frobenius" and row.rho == 0.01:
            numbers = {"slope": row.slope, "slope_error": row.slope_error, "cosine": row.cosine}
            labels = {"directions": "paired" if row.paired else "plain", "n": int(row.samples), "seed": int(row.seed)}
            good = DRIFT[0] <= row.slope <= DRIFT[1] and row.cosine >= COSINE
            found.append(Unit(labels, numbers, bool(good)))
    return found


def resting_places(evidence: Evidence) -> list[Unit]:
    rows = evidence.toys.get("resting", pd.DataFrame())
    found = []
    for seed in sorted(rows.seed.unique()) if len(rows) else []:
        places = {}
        for measure, samples in REST.items():
            chosen = rows[(rows.seed == seed) & (rows.measure == measure) & rows.paired & (rows.samples == samples)]
            chosen = chosen[chosen.beta == 1.0]
            away = float((chosen.u - chosen.theory).abs().max())
            places[measure] = (away, float(chosen.u.mean()), float(chosen.theory.iloc[0]))
        order = places["frobenius_norm"][1] > places["trace"][1] > places["log_determinant"][1]
        for measure, (away, u, theory) in places.items():
            numbers = {"away": away, "u": u, "theory": theory}
            good = away <= REST_WITHIN and order
            found.append(Unit({"measure": measure, "seed": int(seed)}, numbers, bool(good)))
    return found


def own_measure(evidence: Evidence) -> list[Unit]:
    found = []
    for name, bound in OWN_AT_MOST.items():
        for seed in SEEDS:
            if runs := _pair(evidence, "table", seed, name, "GD"):
                ratio = ratio_to(evidence, "table", name, seed, _own(name))
                found.append(Unit({"rule": name, "seed": seed}, {"ratio": ratio}, ratio <= bound, runs))
    return found


def _selectivity(evidence: Evidence, seed: int) -> dict[str, float]:
    values = {
        name: ratio_to(evidence, "table", name, seed, "frobenius_norm")
        / ratio_to(evidence, "table", name, seed, "trace")
        for name in ("Frobenius, paired", "trace, plain")
    }
    ours, other = values.values()
    return {"difference": ours - other, "frobenius": ours, "trace": other}


def _mechanism(evidence: Evidence, seed: int) -> dict[str, float]:
    names = {"plain": "Frobenius, published", "paired": "its Frobenius term"}
    return {k: ratio_to(evidence, "published", n, seed, "frobenius_norm", "SGD") for k, n in names.items()}


def _published_determinant(evidence: Evidence, seed: int) -> dict[str, float]:
    ratios = {
        column: ratio_to(evidence, "table", "determinant, published", seed, column, "trace at h/√3")
        for column in MEASURES
    }
    return {"difference": max(abs(r - 1) for r in ratios.values())} | ratios


def better_than_sam(evidence: Evidence) -> list[Unit]:
    found = []
    for name in STUDIES["table"]:
        for seed in SEEDS if name.split(",")[0] in OWN_MEASURE else ():
            if runs := _pair(evidence, "table", seed, name, "SAM"):
                ratio = ratio_to(evidence, "table", name, seed, _own(name), "SAM")
                cost = runs[0].provenance["gradients"] / runs[1].provenance["gradients"]
                good = ratio < 1 and cost <= 1
                found.append(Unit({"rule": name, "seed": seed}, {"ratio": ratio, "cost": cost}, good, runs))
    return found


def own_edge(evidence: Evidence) -> list[Unit]:
    found = []
    for (name, seed), run in study(evidence.runs, "edges").items():
        if name not in (*AT_THEIR_EDGE, "trace, plain, n = 1"):
            continue
        numbers = {"ratio": math.nan, "sharpness": math.nan}
        if run.outcome == "finished":
            half = last_half(run)
            numbers = {
                "ratio": float((half.own_sharpness / half.gd_edge).median()),
                "sharpness": float((half.eigenvalue_1 / half.gd_edge).median()),
            }
        low, high = OWN_EDGE if name in AT_THEIR_EDGE else (-np.inf, BELOW)
        wanted = f"{name} ({low:g} to {high:g})" if name in AT_THEIR_EDGE else f"{name} (below {high:g})"
        good = low <= numbers["ratio"] <= high and (name in AT_THEIR_EDGE or numbers["ratio"] < high)
        found.append(Unit({"rule": wanted, "seed": seed}, numbers, bool(good), (run,)))
    return found


def kinks(evidence: Evidence) -> list[Unit]:
    found = []
    for (name, seed), run in study(evidence.runs, "kinks").items():
        ratios = run.measurements["sampled_trace_0.0001"] / run.measurements.trace
        cases = {f"{name}, after {run.last.step:.0f} steps": (ratios.iloc[-1], KINKED if name == "ReLU" else SMOOTH)}
        if name == "ReLU":
            cases[f"{name}, at the start"] = (ratios.iloc[0], AT_START)
        for case, (ratio, wanted) in cases.items():
            low, high = wanted if isinstance(wanted, tuple) else (wanted, np.inf)
            good = bool(low <= ratio <= high)
            found.append(Unit({"network": case, "seed": seed}, {"ratio": float(ratio)}, good, (run,)))
    return found


selectivity = _seeds(
    "table", ("Frobenius, paired", "trace, plain", "GD"), _selectivity, lambda numbers: numbers["difference"] < 0
)

published_strength = _seeds(
    "table",
    ("Frobenius, published", "GD"),
    lambda evidence, seed: {"ratio": ratio_to(evidence, "table", "Frobenius, published", seed, "frobenius_norm")},
    lambda numbers: numbers["ratio"] < NO_EFFECT,
)

published_mechanism = _seeds(
    "published",
    ("Frobenius, published", "its Frobenius term", "SGD"),
    _mechanism,
    lambda numbers: numbers["plain"] <= MECHANISM[1] and numbers["paired"] >= MECHANISM[0],
)

determinant_is_trace = _seeds(
    "table",
    ("determinant, published", "trace at h/√3"),
    _published_determinant,
    lambda numbers: numbers["difference"] <= SAME,
)
