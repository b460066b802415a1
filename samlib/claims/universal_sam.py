"""The universal class: what is claimed of it, and the runs and toy problems that bear on it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd

from ..toys.drift import drift_table
from ..toys.universal import hyperbola_table, invariance_table, resting_table, scale_table
from . import universal_statistics as of
from .base import Chapter, Claim, paired
from .universal_runs import LEVELS, SEEDS, configs

__all__ = ["CHAPTER", "solved"]


def solved(table: Callable[[int], pd.DataFrame]) -> Callable[[], pd.DataFrame]:
    """A toy problem for each seed."""
    return lambda: pd.concat([table(seed).assign(seed=seed) for seed in SEEDS], ignore_index=True)


_PAPER = "Tahmasebi et al. (2024)"
_AT = f"at training loss {LEVELS['table']:g}"
_CHAPTER = ("universal_sam",)

CLAIMS: tuple[Claim, ...] = (
    Claim(
        "drift",
        "On a manifold of minima the mean update of Frobenius-SAM drifts against the gradient of ¼‖H‖²_F.",
        f"{_PAPER}, the class's implicit bias",
        "toy",
        "slope of the mean tangential update on that of ¼∇‖H‖²_F, at ρ = 0.01",
        f"between {of.DRIFT[0]} and {of.DRIFT[1]}, and cos at least {of.COSINE}",
        of.drift,
        _CHAPTER,
        band=of.DRIFT,
    ),
    Claim(
        "resting_places",
        "Where the measures have different least values on the minima, each rule comes to rest at its own.",
        f"{_PAPER}, the class's implicit bias",
        "toy",
        "largest distance from theory, of two starting points",
        f"at most {of.REST_WITHIN}, and the three in the order of theory",
        of.resting_places,
        _CHAPTER,
        band=(-np.inf, of.REST_WITHIN),
    ),
    Claim(
        "own_measure",
        "Each rule lowers the measure that it is named for.",
        _PAPER,
        "pair of runs",
        f"‖H‖_F, tr H or log det(I + H) over that of GD, {_AT}",
        "at most 0.6 for Frobenius and trace, 0.7 for determinant",
        of.own_measure,
        _CHAPTER,
    ),
    Claim(
        "selectivity",
        "Frobenius-SAM lowers ‖H‖_F more than it lowers the trace, compared with trace-SAM.",
        _PAPER,
        "seed",
        "(ratio of ‖H‖_F)/(ratio of tr H) of Frobenius-SAM minus that of trace-SAM",
        "less than 0",
        of.selectivity,
        _CHAPTER,
        interval=paired,
        band=(-np.inf, 0.0),
    ),
    Claim(
        "published_strength",
        "At its published strength Frobenius-SAM lowers ‖H‖_F of the squared-error network.",
        f"{_PAPER}, settings of the public code",
        "seed",
        f"‖H‖_F over that of GD, {_AT}",
        f"below {of.NO_EFFECT}",
        of.published_strength,
        _CHAPTER,
        expected="not to hold",
        band=(-np.inf, of.NO_EFFECT),
    ),
    Claim(
        "published_mechanism",
        "On the deep network with cross-entropy the published settings lower ‖H‖_F, but not by their Frobenius term.",
        "this chapter",
        "seed",
        f"‖H‖_F over that of SGD, at training loss {LEVELS['published']:g}: as published, and its Frobenius term alone",
        f"as published at most {of.MECHANISM[1]}, the term alone at least {of.MECHANISM[0]}",
        of.published_mechanism,
        _CHAPTER,
        band=(-np.inf, of.MECHANISM[1]),
    ),
    Claim(
        "determinant_is_trace",
        "The published determinant settings do what the trace does with directions of the same size.",
        "this chapter",
        "seed",
        "largest difference of a measure (λ_max, tr, ‖H‖_F, log det) from that of the trace, relative",
        f"at most {of.SAME}",
        of.determinant_is_trace,
        _CHAPTER,
        band=(-np.inf, of.SAME),
    ),
    Claim(
        "better_than_sam",
        "A rule lowers its own measure more than SAM does, at no more gradients.",
        _PAPER,
        "pair of runs",
        f"its own measure over that of SAM with ρ = 0.1, {_AT}",
        "below 1, with at most as many gradients",
        of.better_than_sam,
        _CHAPTER,
        expected="none",
        band=(-np.inf, 1.0),
    ),
    Claim(
        "own_edge",
        "Each rule trains where λ_max of its own mean objective is 2/η, unless one sample's noise keeps it lower.",
        "this chapter, after Cohen et al. (2021)",
        "run",
        "median of λ_max of the own objective over 2/η, last half of training",
        f"between {of.OWN_EDGE[0]} and {of.OWN_EDGE[1]}; with one plain direction below {of.BELOW}",
        of.own_edge,
        _CHAPTER,
        band=of.OWN_EDGE,
    ),
    Claim(
        "kinks",
        "Trained ReLU networks rest at their kinks: small perturbations see far more curvature than the Hessian holds.",
        "this chapter",
        "run",
        "trace sampled at ρ = 0.0001 over tr H",
        f"at least {of.KINKED:g} for trained ReLU; {of.SMOOTH[0]} to {of.SMOOTH[1]} for GELU, "
        f"{of.AT_START[0]} to {of.AT_START[1]} for ReLU at the start",
        of.kinks,
        _CHAPTER,
    ),
)

TOYS = {
    "hyperbola": solved(hyperbola_table),
    "resting": solved(resting_table),
    "scale": solved(scale_table),
    "invariance": invariance_table,
    "drift": solved(drift_table),
}

CHAPTER = Chapter("universal_sam", "The universal class", "tahmasebi2024universal", configs, CLAIMS, TOYS)
