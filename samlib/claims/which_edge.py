"""An edge for every rule: the runs, one learning rate a rule, and what is claimed of where they train.

The learning rates come from trials with seed 0, which is not among the seeds of the recorded runs, and are chosen so
that each rule reaches its edge within the run, where such a rate was found.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..config import RunConfig
from ..runs import Run
from .base import Chapter, Claim, Evidence, Unit, last_half, rows_at_an_edge
from .paper import NEAR_THE_EDGE

__all__ = ["CHAPTER", "REACHED", "RULES", "SEEDS", "by_rule", "configs"]

SEEDS = (1, 2, 3)
REACHED = 0.95  # of its edge: a run that never comes so close says nothing about what happens there
STEADY = 1.25  # largest over smallest λ that counts as constant
MOVES = 1.5  # how far ‖g‖ must move for that to say anything
APART = 1.2  # factor between two edges that can be told apart

_SHARPNESS_AWARE_ADAM = "SAM around Adam"

RULES: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "mnist": {
        "gradient descent": {"learning_rate": 1.0},
        "heavy ball 0.9": {"learning_rate": 4.0, "momentum": 0.9},
        "heavy ball 0.5": {"learning_rate": 1.0, "momentum": 0.5},
        "Nesterov 0.9": {"learning_rate": 2.0, "momentum": 0.9, "nesterov": True},
        "weight decay": {"learning_rate": 1.0, "weight_decay": 1e-4},
        "SAM": {"learning_rate": 0.3, "rho": 0.1},
        "SAM, momentum 0.9": {"learning_rate": 0.3, "rho": 0.1, "momentum": 0.9},
        "unnormalised SAM, ρ = 0.3": {"learning_rate": 0.5, "rule": "usam", "rho": 0.3},
        "unnormalised SAM, ρ = 1": {"learning_rate": 0.5, "rule": "usam", "rho": 1.0},
        "Adam": {"learning_rate": 2e-3, "base": "adam"},
        _SHARPNESS_AWARE_ADAM: {"learning_rate": 2e-3, "base": "adam", "rho": 0.01},
    },
    "cifar10": {
        "heavy ball 0.9": {"learning_rate": 0.003, "momentum": 0.9},
        "Nesterov 0.9": {"learning_rate": 0.0035, "momentum": 0.9, "nesterov": True},
        "SAM, momentum 0.9": {"learning_rate": 0.001, "rho": 0.1, "momentum": 0.9},
        "unnormalised SAM, ρ = 0.01": {"learning_rate": 0.001, "rule": "usam", "rho": 0.01},
        "Adam": {"learning_rate": 1e-3, "base": "adam"},
    },
}

_LENGTHS: Mapping[str, Mapping[str, int]] = {
    "mnist": {"steps": 1500, "measure_every": 25},
    "cifar10": {"steps": 250, "measure_every": 10},
}


def _config(experiment: str, rule: str, seed: int) -> RunConfig:
    usual = {"experiment": experiment, "profile": "reduced", "data": "real", "device": "cpu", "seed": seed, "rho": 0.0}
    return RunConfig(**{**usual, **_LENGTHS[experiment], **RULES[experiment][rule]})


def configs() -> list[RunConfig]:
    """All runs, seed by seed, in the order of recording."""
    return [_config(e, rule, seed) for seed in SEEDS for e in RULES for rule in RULES[e]]


def by_rule(runs: Sequence[Run], experiment: str) -> dict[tuple[str, int], Run]:
    """The recorded runs of an experiment, by rule and seed, in the order of the figure."""
    recorded = {run.config.model_copy(update={"data": "real"}): run for run in runs}
    wanted = {(rule, seed): _config(experiment, rule, seed) for rule in RULES[experiment] for seed in SEEDS}
    return {place: recorded[config] for place, config in wanted.items() if config in recorded}


def _reached(run: Run) -> bool:
    return run.outcome == "finished" and rows_at_an_edge(run).edge_ratio.max() >= REACHED


def _units(
    chosen: Callable[[str], bool],
    statistic: Callable[[Run], dict[str, float]],
    supports: Callable[[dict[str, float]], bool],
    bears: Callable[[Run], bool] = _reached,
) -> Callable[[Evidence], list[Unit]]:
    def units(evidence: Evidence) -> list[Unit]:
        found = []
        for experiment in RULES:
            for (rule, seed), run in by_rule(evidence.runs, experiment).items():
                if chosen(rule) and bears(run):
                    numbers = statistic(run)
                    place = {"experiment": experiment, "rule": rule, "seed": seed}
                    found.append(Unit(place, numbers, bool(supports(numbers)), (run,)))
        return found

    return units


def _ratio(run: Run) -> dict[str, float]:
    return {"ratio": float(last_half(run).edge_ratio.median())}


def _near(numbers: dict[str, float]) -> bool:
    low, high = NEAR_THE_EDGE
    return low <= numbers["ratio"] <= high


def _steadiness(run: Run) -> dict[str, float]:
    half = last_half(run)
    spread = half.eigenvalue_1.max() / half.eigenvalue_1.min()
    return {"spread": float(spread), "spread of ‖g‖": float(half.grad_norm.max() / half.grad_norm.min())}


def _which(run: Run) -> dict[str, float]:
    """How far λ is, in logarithms, from the rule's own edge and from 2/η."""
    half = last_half(run)
    own, plain = half.edge_ratio.median(), (half.eigenvalue_1 / half.gd_edge).median()
    share = abs(math.log(own)) / abs(math.log(plain))
    return {"share": float(share), "own": float(own), "plain": float(plain)}


def _apart(run: Run) -> bool:
    """Whether a rule's edge and 2/η can be told apart in the last half of a run, and both are edges of H itself."""
    half = last_half(run)
    gap = abs(math.log((half.edge / half.gd_edge).median()))
    return run.config.base != "adam" and _reached(run) and gap >= math.log(APART)


_NEAR = f"between {NEAR_THE_EDGE[0]} and {NEAR_THE_EDGE[1]}"
_OF_ALL = f"median of the ratio over the last half of training, of runs that come within {1 - REACHED:.0%} of the edge"
_HERE = ("which_edge",)

CLAIMS: tuple[Claim, ...] = (
    Claim(
        "own_edge",
        "Every rule that reaches its own edge trains there.",
        "this chapter, after Cohen et al. (2021, 2022), Agarwala & Dauphin (2023), Long & Bartlett (2024)",
        "run",
        _OF_ALL,
        _NEAR,
        _units(lambda rule: rule != _SHARPNESS_AWARE_ADAM, _ratio, _near),
        _HERE,
        band=NEAR_THE_EDGE,
    ),
    Claim(
        "not_plain",
        "Where a rule's edge is not 2/η, it is the rule's own edge that holds the sharpness, not 2/η.",
        "this chapter",
        "run",
        "distance of λ from the own edge over that from 2/η, in logarithms, last half of training",
        "at most 0.5",
        _units(lambda rule: True, _which, lambda numbers: numbers["share"] <= 0.5, _apart),
        _HERE,
        band=(-math.inf, 0.5),
    ),
    Claim(
        "usam_constant",
        "The edge of unnormalised SAM does not depend on ‖g‖: λ stays constant while ‖g‖ moves.",
        "this chapter, after Agarwala & Dauphin (2023)",
        "run",
        f"largest over smallest λ, last half of training, of runs at their edge where ‖g‖ moves by {MOVES:g} or more",
        f"at most {STEADY}",
        _units(
            lambda rule: rule.startswith("unnormalised"),
            _steadiness,
            lambda numbers: numbers["spread"] <= STEADY,
            lambda run: _reached(run) and _steadiness(run)["spread of ‖g‖"] >= MOVES,
        ),
        _HERE,
        band=(-math.inf, STEADY),
    ),
    Claim(
        "sam_around_adam",
        "SAM around Adam trains at Adam's edge.",
        "this chapter",
        "run",
        "median of the ratio over the last half of training",
        _NEAR,
        _units(lambda rule: rule == _SHARPNESS_AWARE_ADAM, _ratio, _near, lambda run: run.outcome == "finished"),
        _HERE,
        expected="none: no law is derived for it",
        band=NEAR_THE_EDGE,
    ),
)

CHAPTER = Chapter("which_edge", "Which edge?", "cohen2021edge", configs, CLAIMS)
