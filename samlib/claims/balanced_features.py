"""Balanced features: what is claimed, by which thresholds.

The thresholds were fixed after trial runs with other seeds, before the runs that are judged were recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from ..runs import Run
from . import balanced_toys
from .balanced_runs import LEVELS, Pair, at_level, cell, configs, differences, pairs
from .base import Chapter, Claim, Evidence, Unit, paired

__all__ = ["CHAPTER", "interval_of", "ratio_of_means"]

PAYS = 0.5  # points of the digit's probe error that count as paying with it
MORE_UNIFORM = 0.9  # share of measurements in which the weights must be more uniform
CARRIES = 0.5  # share of SAM's effect that its Jacobian must reproduce
RHOS = (0.1, 0.3, 0.6)
_KINDS = tuple((network, rho) for network in ("CNN with BatchNorm", "MLP") for rho in (0.0, 0.1, 0.3))


def interval_of(values: np.ndarray) -> tuple[float, float, float]:
    """Mean of paired differences, with its 95 % interval by Student's t."""
    return paired(pd.DataFrame({"x": values}), "x")


def ratio_of_means(over: np.ndarray, under: np.ndarray, confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean of ``over`` divided by that of ``under``, paired, with Fieller's interval.

    The interval holds all θ for which mean(over − θ·under) is not significantly different from 0 by Student's t. It is
    infinite where ``under`` itself is not significantly different from 0.
    """
    from scipy.stats import t

    n = len(over)
    value = float(np.mean(over) / np.mean(under)) if n else np.nan
    if n < 2:
        return value, -np.inf, np.inf
    bound = t.ppf((1 + confidence) / 2, n - 1) ** 2 / n
    spread = np.cov(over, under)
    a = np.mean(under) ** 2 - bound * spread[1, 1]
    b = np.mean(over) * np.mean(under) - bound * spread[0, 1]
    c = np.mean(over) ** 2 - bound * spread[0, 0]
    if a <= 0:
        return value, -np.inf, np.inf
    root = np.sqrt(max(b * b - a * c, 0.0))
    return value, float((b - root) / a), float((b + root) / a)


def _of_its_unit(details: pd.DataFrame, statistic: str) -> tuple[float, float, float]:
    """Value and interval of a claim whose one unit is a comparison of many pairs."""
    first = details.iloc[0]
    return float(first[statistic]), float(first.low), float(first.high)


def _behind(found: Sequence[Pair]) -> tuple[Run, ...]:
    """The runs of some pairs, each once."""
    return tuple({run.id: run for pair in found for run in (pair.run, pair.plain)}.values())


def _comparison(
    network: str, rho: float, level: float, column: str, supports: Callable[[float], bool]
) -> Callable[[Evidence], list[Unit]]:
    """The one unit of a claim about a probe at equal loss: all pairs, judged by the upper end of their interval."""

    def units(evidence: Evidence) -> list[Unit]:
        found = pairs(evidence.runs, network, rho, level)
        values = differences(found, column)
        if len(values) < 2:
            return []
        mean, low, high = interval_of(values)
        numbers = {
            "difference": mean,
            "low": low,
            "high": high,
            "pairs": len(values),
            "lower": int((values < 0).sum()),
            "not_arrived": len(found) - len(values),
        }
        place = {"network": network, "ρ": rho, "loss": level}
        return [Unit(place, numbers, bool(supports(high)), _behind(found))]

    return units


def _uniform(levels: Sequence[float]) -> Callable[[Evidence], list[Unit]]:
    """For each kind of run the share of its measurements in which the perturbed point has the lower Gini."""

    def units(evidence: Evidence) -> list[Unit]:
        found = []
        for network, rho in _KINDS:
            runs = cell(evidence.runs, network, rho)
            rows = [row for run in runs.values() for level in levels if (row := at_level(run, level)) is not None]
            change = np.array([row.perturbed_weights_gini - row.weights_gini for row in rows])
            if len(change):
                share = float((change < 0).mean())
                numbers = {"share": share, "change": float(change.mean()), "measurements": len(change)}
                place = {"network": network, "ρ": rho}
                found.append(Unit(place, numbers, share >= MORE_UNIFORM, tuple(runs.values())))
        return found

    return units


def _jacobian(evidence: Evidence) -> list[Unit]:
    whole = {p.run.config.seed: p for p in pairs(evidence.runs, "CNN with BatchNorm", 0.3, 0.01)}
    part = {p.run.config.seed: p for p in pairs(evidence.runs, "CNN with BatchNorm", 0.3, 0.01, "jacobian_sam")}
    both = [(part[seed], whole[seed]) for seed in sorted(part.keys() & whole.keys())]
    values = 100 * np.array([[pair.difference("probe_object") for pair in two] for two in both]).reshape(-1, 2)
    values = values[np.isfinite(values).all(1)]
    if len(values) < 2:
        return []
    share, low, high = ratio_of_means(values[:, 0], values[:, 1])
    numbers = {
        "share": share,
        "low": low,
        "high": high,
        "jacobian": float(values[:, 0].mean()),
        "sam": float(values[:, 1].mean()),
        "pairs": len(values),
        "not_arrived": len(both) - len(values),
    }
    runs = _behind([pair for two in both for pair in two])
    return [Unit({"network": "CNN with BatchNorm", "ρ": 0.3, "loss": 0.01}, numbers, low > CARRIES, runs)]


def _grows(evidence: Evidence) -> list[Unit]:
    found = {rho: {p.run.config.seed: p for p in pairs(evidence.runs, "CNN with BatchNorm", rho, 0.01)} for rho in RHOS}
    seeds = sorted(set.intersection(*(set(by_seed) for by_seed in found.values())))
    slopes, costs = [], []
    for seed in seeds:
        errors = [100 * found[rho][seed].difference("probe_object") for rho in RHOS]
        if np.isfinite(errors).all():
            slopes.append(float(np.polyfit(RHOS, errors, 1)[0]))
            costs.append([found[rho][seed].cost for rho in RHOS])
    if len(slopes) < 2:
        return []
    mean, low, high = interval_of(np.array(slopes))
    slower = dict(zip((f"steps × at ρ = {rho:g}" for rho in RHOS), np.mean(costs, axis=0).tolist(), strict=True))
    numbers = {"slope": mean, "low": low, "high": high, "pairs": len(slopes), "not_arrived": len(seeds) - len(slopes)}
    behind = [found[rho][seed] for seed in seeds for rho in RHOS]
    return [Unit({"network": "CNN with BatchNorm", "loss": 0.01}, numbers | slower, high < 0, _behind(behind))]


_THEIRS = "Springer et al. (2024), abstract"
_PAIRED = "mean difference to SGD, in points of error, with the same seed at equal training loss"
_IN = ("balanced_features",)

CLAIMS = (
    Claim(
        "harder",
        "SAM learns the harder feature better than SGD at equal loss (CNN with BatchNorm, ρ = 0.3, loss 0.01).",
        _THEIRS,
        "comparison",
        f"object's probe error: {_PAIRED}",
        "95 % interval of the paired difference below 0",
        _comparison("CNN with BatchNorm", 0.3, 0.01, "probe_object", lambda high: high < 0),
        _IN,
        _of_its_unit,
        band=(-np.inf, 0.0),
    ),
    Claim(
        "easier",
        "SAM does not pay for the harder feature with the easier one (CNN with BatchNorm, ρ = 0.3, loss 0.01).",
        _THEIRS,
        "comparison",
        f"digit's probe error: {_PAIRED}",
        f"upper end of the 95 % interval at most +{PAYS:g} points",
        _comparison("CNN with BatchNorm", 0.3, 0.01, "probe_digit", lambda high: high <= PAYS),
        _IN,
        _of_its_unit,
        band=(-np.inf, PAYS),
    ),
    Claim(
        "unnormalised",
        "SAM learns the harder feature better without normalisation, too (MLP, ρ = 0.1, loss 0.1).",
        f"{_THEIRS}, which names no architecture",
        "comparison",
        f"object's probe error: {_PAIRED}",
        "95 % interval of the paired difference below 0",
        _comparison("MLP", 0.1, 0.1, "probe_object", lambda high: high < 0),
        _IN,
        _of_its_unit,
        "the opposite",
        (-np.inf, 0.0),
    ),
    Claim(
        "weights",
        "The examples' weights are more uniform at the perturbed point than at w, while the loss falls from 1 to 0.1.",
        "Springer et al. (2024), importance weights",
        "kind of run",
        "share of measurements with the lower Gini coefficient at the perturbed point",
        f"at least {MORE_UNIFORM:g}",
        _uniform(LEVELS[:4]),
        _IN,
        band=(MORE_UNIFORM, np.inf),
    ),
    Claim(
        "weights_late",
        "At losses 0.03 and 0.01, too, the examples' weights are more uniform at the perturbed point.",
        "Springer et al. (2024), importance weights",
        "kind of run",
        "share of measurements with the lower Gini coefficient at the perturbed point",
        f"at least {MORE_UNIFORM:g}",
        _uniform(LEVELS[4:]),
        _IN,
        expected="in part",
        band=(MORE_UNIFORM, np.inf),
    ),
    Claim(
        "jacobian",
        "The Jacobian's part of SAM's gradient carries the effect, as in the diagonal net (CNN, BatchNorm, ρ = 0.3).",
        "the second part of Springer et al. (2024); the diagonal net of this chapter",
        "comparison",
        "share of SAM's effect on the object's probe at loss 0.01 that the Jacobian's part alone reproduces",
        f"95 % interval (Fieller) above {CARRIES:g}",
        _jacobian,
        _IN,
        _of_its_unit,
        "open",
        (CARRIES, np.inf),
    ),
    Claim(
        "grows",
        "The effect grows with ρ (CNN with BatchNorm, ρ = 0.1, 0.3, 0.6, loss 0.01).",
        "this chapter",
        "comparison",
        "slope of the object's paired difference over ρ, in points per unit of ρ, by seed",
        "95 % interval below 0",
        _grows,
        _IN,
        _of_its_unit,
        "until training slows",
        (-np.inf, 0.0),
    ),
)

CHAPTER = Chapter(
    "balanced_features", "Balanced features", "springer2024sharpness", configs, CLAIMS, balanced_toys.TOYS
)
