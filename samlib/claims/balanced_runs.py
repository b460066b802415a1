"""Balanced features: the runs that are recorded, and how two of them are compared at equal training loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from ..config import RunConfig
from ..runs import Run

__all__ = ["LEVELS", "NETWORKS", "SEEDS", "Pair", "at_level", "cell", "configs", "differences", "pairs"]

LEVELS = (1.0, 0.5, 0.3, 0.1, 0.03, 0.01)
SEEDS = tuple(range(100, 108))  # trials, before the thresholds were set, had seeds below 10

NETWORKS: dict[str, dict[str, Any]] = {
    "CNN with BatchNorm": {"network": "convolutional", "learning_rate": 0.05},
    "MLP": {"network": "mlp", "batch_norm": False, "tile": 8, "learning_rate": 0.1, "momentum": 0.0},
    "MLP with BatchNorm": {"network": "mlp", "batch_norm": True, "tile": 8, "learning_rate": 0.05},
}
"""Networks by name. Momentum is 0.9 where it is not said: with it, the MLP of η = 0.1 does not train to low losses."""

_SHORT = {"steps": 5000, "stop_at_loss": LEVELS[3], "measure_at_losses": LEVELS[:4]}
_LONG = {"steps": 6000}
_JACOBIAN, _WEIGHTS = {"rho": 0.3, "rule": "jacobian_sam"}, {"rho": 0.3, "rule": "weights_sam"}
# The most important first. In each group all runs of a seed come together, so that whole pairs are recorded.
_GROUPS: tuple[tuple[tuple[str, dict[str, Any]], ...], ...] = (
    (
        ("CNN with BatchNorm", {"rho": 0.0}),
        ("CNN with BatchNorm", {"rho": 0.3}),
        ("MLP", {"rho": 0.0, **_LONG}),
        ("MLP", {"rho": 0.1, **_LONG}),
    ),
    (("MLP", {"rho": 0.3, **_SHORT}), ("MLP", _JACOBIAN | _SHORT), ("MLP", _WEIGHTS | _SHORT)),
    (("CNN with BatchNorm", {"rho": 0.1}), ("CNN with BatchNorm", _JACOBIAN)),
    (("CNN with BatchNorm", {"rho": 0.6}),),
    (("MLP with BatchNorm", {"rho": 0.0}), ("MLP with BatchNorm", {"rho": 0.3})),
    (
        ("MLP", {"rho": 0.3, "rule": "layer_sam", "layers": ["last"], **_SHORT}),
        ("MLP", {"rho": 0.3, "rule": "layer_sam", "layers": ["body"], **_SHORT}),
        ("CNN with BatchNorm", _WEIGHTS),
    ),
)
_EDGE_RHOS = (0.0, 0.05, 0.1, 0.2)


def configs() -> list[RunConfig]:
    """The runs of the chapter, in the order of recording."""
    groups = [[_probed(*c, seed) for seed in SEEDS for c in group] for group in _GROUPS]
    edges = [_at_the_edge(rho, SEEDS[0]) for rho in _EDGE_RHOS]
    return [*groups[0], *groups[1], *edges, *(config for group in groups[2:] for config in group)]


def _probed(network: str, settings: dict[str, Any], seed: int) -> RunConfig:
    common = {"measure_at_losses": LEVELS, "stop_at_loss": LEVELS[-1], "loss_every": 10, "steps": 4000}
    chosen = {**common, **NETWORKS[network], **settings}
    return _config(seed, measure_every=chosen["steps"], observables=("example_weights", "probes"), **chosen)


def _at_the_edge(rho: float, seed: int) -> RunConfig:
    """Full-batch SAM on the MLP, with the edge beside the probes; its batches are the whole training set."""
    levels = {"measure_at_losses": LEVELS, "stop_at_loss": LEVELS[4], "steps": 4000, "measure_every": 200}
    chosen = {**NETWORKS["MLP"], **levels, "learning_rate": 0.2, "batch_size": 4000}
    return _config(seed, rho=rho, observables=("edge", "probes"), **chosen)


def _config(seed: int, **settings: Any) -> RunConfig:
    return RunConfig(experiment="digits_on_cifar", profile="reduced", data="real", device="cpu", seed=seed, **settings)


def cell(runs: Sequence[Run], network: str, rho: float, rule: str = "sam", **settings: Any) -> dict[int, Run]:
    """Recorded runs of one kind, by seed: a network, a radius and a rule; without those that measured the edge."""
    wanted = {"rho": rho, "rule": rule, **NETWORKS[network], **settings}
    return {
        run.config.seed: run
        for run in runs
        if "probes" in run.config.observables
        and "edge" not in run.config.observables
        and all(getattr(run.config, name, None) == value for name, value in wanted.items())
    }


def at_level(run: Run, level: float) -> pd.Series | None:
    """The measurement where the training loss first passed a level, or None if it never did.

    One look at the loss may find two levels passed; then one row counts for both.
    """
    rows = run.measurements
    passed = rows[rows["loss_level"] <= level] if "loss_level" in rows else rows[:0]
    return passed.iloc[0] if len(passed) else None


class Pair(NamedTuple):
    """A run and that of plain SGD with the same data, initial weights and batches, where both first pass a level."""

    run: Run
    plain: Run
    at: pd.Series | None
    plain_at: pd.Series | None

    def difference(self, column: str) -> float:
        """Of a column at equal loss, this run's minus plain SGD's; NaN where one of the two did not arrive."""
        if self.at is None or self.plain_at is None:
            return np.nan
        return float(self.at[column] - self.plain_at[column])

    @property
    def cost(self) -> float:
        """Steps to the level, over those of plain SGD."""
        return np.nan if self.at is None or self.plain_at is None else float(self.at.step / self.plain_at.step)


def pairs(
    runs: Sequence[Run], network: str, rho: float, level: float, rule: str = "sam", **settings: Any
) -> list[Pair]:
    """All pairs of a kind, by seed; a run that does not reach the level is in its pair nonetheless."""
    plain = cell(runs, network, 0.0)
    chosen = cell(runs, network, rho, rule, **settings)
    return [
        Pair(chosen[seed], plain[seed], at_level(chosen[seed], level), at_level(plain[seed], level))
        for seed in sorted(chosen.keys() & plain.keys())
    ]


def differences(found: Sequence[Pair], column: str) -> np.ndarray:
    """Differences of a probe's error in points, of the pairs of which both arrived."""
    values = np.array([100 * pair.difference(column) for pair in found], dtype=float)
    return values[np.isfinite(values)]
