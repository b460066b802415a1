"""A claim: whom it is about, what is computed, what supports it; and the verdict that the evidence gives.

A statistic is a number per unit: a run, a seed, a pair of runs, a grid, a toy problem. A unit *supports* a claim if its
numbers meet the threshold. The rule is the same for all claims: at least 80 % of the units support it, *reproduced*; at
least 40 %, *partly*; else *not reproduced*. Thresholds are fixed before the runs that are judged are recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from ..config import RunConfig
from ..runs import Run

__all__ = [
    "PARTLY",
    "REPRODUCED",
    "Chapter",
    "Claim",
    "Evidence",
    "Outcome",
    "Unit",
    "Verdict",
    "bootstrap",
    "evaluate",
    "last_half",
    "paired",
    "rows_at_an_edge",
]

Outcome = Literal["reproduced", "partly", "not reproduced", "not recorded"]
REPRODUCED, PARTLY = 0.8, 0.4  # the shares of units from which on a claim is so called


class Unit(NamedTuple):
    """What bears on a claim: labels that tell units apart, numbers, the first of which is the statistic, and runs."""

    labels: dict[str, Any]
    numbers: dict[str, float]
    supports: bool
    runs: tuple[Run, ...] = ()


class Evidence(NamedTuple):
    """What a claim is judged by: recorded runs, and the results of toy problems by name."""

    runs: Sequence[Run]
    toys: dict[str, pd.DataFrame]


Interval = Callable[[pd.DataFrame, str], tuple[float, float, float]]


@dataclass(frozen=True)
class Claim:
    """A claim and how it is tested.

    Attributes:
        key: short name.
        text: the claim.
        original: where it is made.
        unit: what is counted: "run", "seed", "pair of runs", "toy", ….
        statistic: what is computed for each unit.
        threshold: which values support the claim.
        units: computes it from the evidence; no units if nothing bears on the claim.
        experiments: those that it is made for; of a chapter's claims, the chapter.
        interval: value and interval of the statistic over all units, from their table and its name.
        expected: what trials made us expect, where that is not that the claim holds.
        band: the values of the statistic that support the claim, for pictures; infinite on an open side.
    """

    key: str
    text: str
    original: str
    unit: str
    statistic: str
    threshold: str
    units: Callable[[Evidence], list[Unit]]
    experiments: tuple[str, ...]
    interval: Interval = field(default_factory=lambda: bootstrap)
    expected: str = ""
    band: tuple[float, float] = (-np.inf, np.inf)


@dataclass(frozen=True)
class Chapter:
    """A related system: the runs to record, the toy problems to solve, and the claims they bear on.

    Attributes:
        name: of its published files, ``data/published/<name>.parquet``.
        title: as a page calls it.
        paper: the key of the paper in the bibliography.
        configs: the runs.
        toys: the toy problems by name: each gives a table.
        claims: in the order of the page.
    """

    name: str
    title: str
    paper: str
    configs: Callable[[], list[RunConfig]]
    claims: tuple[Claim, ...]
    toys: dict[str, Callable[[], pd.DataFrame]] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """What the evidence says about one claim.

    Attributes:
        claim: which.
        experiment: or chapter.
        profile: of the runs.
        leading: whether this profile speaks for the experiment, see :func:`samlib.selection.leading`.
        outcome: "reproduced", "partly", "not reproduced", or "not recorded" if nothing bears on it.
        value: the statistic over all units, by default its median, with ``low`` and ``high``, a 95 % interval.
        supporting: units that support the claim, of ``total``.
        details: one row per unit: its labels, the ids of its runs, the numbers, and whether it supports the claim.
        statistic: the column of ``details`` that holds the statistic.
    """

    claim: Claim
    experiment: str
    profile: str
    leading: bool
    outcome: Outcome
    value: float
    low: float
    high: float
    supporting: int
    total: int
    details: pd.DataFrame
    statistic: str = ""


def evaluate(
    claim: Claim, evidence: Evidence, experiment: str, profile: str = "reduced", leads: bool = True
) -> Verdict:
    """The verdict of some evidence on a claim."""
    units = claim.units(evidence)
    place = (claim, experiment, profile, leads)
    if not units:
        return Verdict(*place, "not recorded", np.nan, np.nan, np.nan, 0, 0, pd.DataFrame())
    details = pd.DataFrame(
        [{"run_id": " ".join(r.id for r in u.runs), **u.labels, **u.numbers, "supports": u.supports} for u in units]
    )
    supporting, total = int(details.supports.sum()), len(details)
    share = supporting / total
    outcome: Outcome = "reproduced" if share >= REPRODUCED else "partly" if share >= PARTLY else "not reproduced"
    statistic = next(iter(units[0].numbers))
    value, low, high = claim.interval(details, statistic)
    return Verdict(*place, outcome, value, low, high, supporting, total, details, statistic)


def bootstrap(details: pd.DataFrame, statistic: str, draws: int = 2000) -> tuple[float, float, float]:
    """The median, and a 95 % bootstrap interval over settings and seeds: settings are drawn first, then seeds."""
    labels = list(details)[1 : list(details).index(statistic)]
    settings = [name for name in labels if name != "seed"]
    groups = details.groupby(settings, dropna=False) if settings else [((), details)]
    cells = [group[statistic].to_numpy(float) for _, group in groups]
    random = np.random.default_rng(0)

    def median(values: np.ndarray) -> float:
        known = values[~np.isnan(values)]  # a run that diverged has no statistic
        return float(np.median(known)) if len(known) else np.nan

    def draw() -> float:
        chosen = random.integers(0, len(cells), len(cells))
        return median(np.concatenate([random.choice(cells[i], len(cells[i])) for i in chosen]))

    drawn = np.array([draw() for _ in range(draws)])
    low, high = np.percentile(drawn[~np.isnan(drawn)], [2.5, 97.5]) if not np.isnan(drawn).all() else (np.nan, np.nan)
    return median(details[statistic].to_numpy(float)), float(low), float(high)


def paired(details: pd.DataFrame, statistic: str) -> tuple[float, float, float]:
    """The mean of paired differences, and its 95 % interval by Student's t; infinite for fewer than two."""
    from scipy.stats import t

    values = details[statistic].to_numpy(float)
    if len(values) < 2:
        return float(values.mean()), -np.inf, np.inf
    half = float(t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))
    return float(values.mean()), float(values.mean()) - half, float(values.mean()) + half


def rows_at_an_edge(run: Run) -> pd.DataFrame:
    """The measurements that say something about an edge: those whose operator norm is the sharpness, and does not come
    from the negative end of the spectrum."""
    rows = run.measurements
    return rows[rows.eigenvalue_1 >= rows.operator_norm] if "eigenvalue_1" in rows else rows


def last_half(run: Run) -> pd.DataFrame:
    """Of the measurements that say something about an edge, those of the last half of training."""
    rows = rows_at_an_edge(run)
    return rows[rows.step >= run.measurements.step.max() / 2]
