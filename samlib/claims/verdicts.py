"""The claims of the paper, each with a statistic and a threshold, and the verdict that the published runs give.

A statistic is a number per run; a run *supports* a claim if its number lies within the threshold. The rule is the same
for all claims: at least 80 % of the runs support it, *reproduced*; at least 40 %, *partly*; else *not reproduced*. The
thresholds below were fixed after short trial runs on MNIST, and before the published runs of CIFAR-10 and
tiny_shakespeare were recorded. The interval is a bootstrap over learning
rates, rhos and seeds: settings are drawn first, then the seeds within each.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from ..experiments import PROFILES, title
from ..figures import leading, standard
from ..runs import Run, atomic_write, published_path, published_runs

__all__ = [
    "CLAIMS",
    "Claim",
    "Verdict",
    "agrees_with_record",
    "evaluate",
    "last_half",
    "record",
    "summary",
    "table",
    "verdicts",
]

Outcome = Literal["reproduced", "partly", "not reproduced", "not recorded"]

NEAR_THE_EDGE = (0.9, 1.2)  # a ratio of operator norm and edge that counts as being at the edge
FALLS_BY = 1.2  # factor by which λ itself must fall after contact
FAR_BELOW = 2.0  # factor that counts as far below 2/η


@dataclass(frozen=True)
class Claim:
    """A claim of the paper and how it is tested.

    Attributes:
        key: short name.
        text: the claim.
        original: where the paper makes it.
        experiments: those it is made for.
        statistic: what is computed for each run.
        threshold: which values support the claim.
        measure: computes it: a dictionary of numbers per run, of which the first is the statistic; None if the run
            does not bear on the claim.
        supports: whether the numbers of a run support the claim.
    """

    key: str
    text: str
    original: str
    experiments: tuple[str, ...]
    statistic: str
    threshold: str
    measure: Callable[[Run, Sequence[Run]], dict[str, float] | None]
    supports: Callable[[dict[str, float]], bool]


@dataclass(frozen=True)
class Verdict:
    """What the runs of one experiment say about one claim.

    Attributes:
        claim, experiment: which.
        profile: of the runs.
        leading: whether this profile speaks for the experiment, see :func:`samlib.figures.leading`.
        outcome: "reproduced", "partly", "not reproduced", or "not recorded" if no published run bears on it.
        value: median of the statistic over runs, with ``low`` and ``high``, a 95 % bootstrap interval.
        supporting: runs that support the claim, of ``total``.
        details: one row per run: id, η, ρ, seed, the numbers, and whether it supports the claim.
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


def last_half(run: Run) -> pd.DataFrame:
    rows = run.measurements
    return rows[rows.step >= rows.step.max() / 2]


def _is_sam(run: Run) -> bool:
    return run.config.sharpness_aware and run.outcome == "finished"


def _gd_at_its_edge(run: Run, _: Sequence[Run]) -> dict[str, float] | None:
    if run.config.sharpness_aware or run.outcome != "finished":
        return None
    # A learning rate so small that the edge is not reached within the run says nothing about what happens there.
    if run.measurements.edge_ratio.max() < 0.95:
        return None
    return {"ratio": last_half(run).edge_ratio.median(), "initial_ratio": run.measurements.edge_ratio.iloc[0]}


def _sam_at_its_edge(run: Run, _: Sequence[Run]) -> dict[str, float] | None:
    if not _is_sam(run):
        return None
    rows = run.measurements
    after = rows[(rows.edge_ratio >= 0.95).cummax()]
    fall, slope = (np.nan, np.nan)
    if len(after) > 2:
        fall = after.eigenvalue_1.iloc[0] / after.eigenvalue_1.iloc[-1]
        x, y = np.log(after.sam_edge), np.log(after.operator_norm)
        slope = x.cov(y) / x.var() if x.var() > 0 else np.nan
    ratio = last_half(run).edge_ratio.median()
    return {"ratio": ratio, "fall": fall, "slope": slope, "largest_ratio": rows.edge_ratio[rows.step > 0].max()}


def _far_below(run: Run, _: Sequence[Run]) -> dict[str, float] | None:
    if not _is_sam(run):
        return None
    rows = run.measurements
    at = rows[rows.loss <= rows.loss.iloc[0] / 2]
    point = at.iloc[0] if len(at) else rows.iloc[-1]
    return {"gd_edge/sam_edge": point.gd_edge / point.sam_edge, "gd_edge/λ": point.gd_edge / point.operator_norm}


def _better_aligned(run: Run, _: Sequence[Run]) -> dict[str, float] | None:
    if not _is_sam(run):
        return None
    half = last_half(run)
    return {
        "difference": (half.sam_grad_alignment - half.grad_alignment).mean(),
        "sam_grad_alignment": half.sam_grad_alignment.mean(),
        "grad_alignment": half.grad_alignment.mean(),
    }


def _generalizes(run: Run, runs: Sequence[Run]) -> dict[str, float] | None:
    same = [r for r in runs if r.config == run.config.model_copy(update={"rho": 0.0}) and r.outcome == "finished"]
    if not _is_sam(run) or not same:
        return None
    gd = same[0]
    # SAM spends two gradients a step: at equal cost it has made half as many steps.
    halfway = run.measurements.iloc[(run.measurements.step - run.config.steps / 2).abs().argmin()]
    return {
        "test_ratio": run.last.test_metric / gd.last.test_metric,
        "loss_ratio": run.last.loss / gd.last.loss,
        "loss_ratio_equal_gradients": halfway.loss / gd.last.loss,
    }


def _within(value: float, bounds: tuple[float, float]) -> bool:
    return bool(bounds[0] <= value <= bounds[1])


_NEAR = f"between {NEAR_THE_EDGE[0]} and {NEAR_THE_EDGE[1]}"
_IMAGES = ("mnist", "cifar10")
_ALL = (*_IMAGES, "shakespeare")

CLAIMS: tuple[Claim, ...] = (
    Claim(
        "gd",
        "With gradient descent the operator norm reaches 2/η and stays near it.",
        "Figures with ρ = 0; Cohen et al. (2021)",
        _IMAGES,
        "median of ‖H‖/(2/η) over the last half of training, for runs that come within 5 % of 2/η",
        _NEAR,
        _gd_at_its_edge,
        lambda s: _within(s["ratio"], NEAR_THE_EDGE),
    ),
    Claim(
        "sam",
        "With SAM the operator norm tracks the SAM edge, and λ itself falls with it.",
        "Figures of operator norm and SAM edge",
        _IMAGES,
        "median of ‖H‖/sam_edge over the last half of training; fall of λ after first contact (ratio ≥ 0.95)",
        f"{_NEAR}, and λ falls by a factor of at least {FALLS_BY}",
        _sam_at_its_edge,
        lambda s: _within(s["ratio"], NEAR_THE_EDGE) and s["fall"] >= FALLS_BY,
    ),
    Claim(
        "below",
        "The SAM edge, and with it the operator norm, lies far below 2/η, already while the loss is large.",
        "Figures of operator norm, SAM edge and 2/η",
        _ALL,
        "(2/η)/sam_edge and (2/η)/‖H‖ when the loss has first halved",
        f"both at least {FAR_BELOW:g}",
        _far_below,
        lambda s: s["gd_edge/sam_edge"] >= FAR_BELOW and s["gd_edge/λ"] >= FAR_BELOW,
    ),
    Claim(
        "alignment",
        "The SAM gradient is better aligned with the principal eigenvector than the gradient.",
        "Figures of alignments",
        _ALL,
        "mean over the last half of training of |cos| of the SAM gradient minus |cos| of the gradient",
        "greater than 0",
        _better_aligned,
        lambda s: s["difference"] > 0,
    ),
    Claim(
        "stochastic",
        "With mini-batches, the operator norm of the mini-batch Hessian still tracks the SAM edge.",
        "Figures of the language model",
        ("shakespeare",),
        "median of ‖H‖/sam_edge over the last half of training; fall of λ after first contact (ratio ≥ 0.95)",
        f"{_NEAR}, and λ falls by a factor of at least {FALLS_BY}",
        _sam_at_its_edge,
        lambda s: _within(s["ratio"], NEAR_THE_EDGE) and s["fall"] >= FALLS_BY,
    ),
    Claim(
        "test",
        "SAM's test error (or test loss) is lower than that of gradient descent at equal steps.",
        "Tables of test error",
        _ALL,
        "test metric of SAM divided by that of ρ = 0 with the same η and seed",
        "less than 1",
        _generalizes,
        lambda s: s["test_ratio"] < 1,
    ),
)


def evaluate(
    runs: Sequence[Run], claim: Claim, experiment: str, profile: str = "reduced", leads: bool = True, draws: int = 2000
) -> Verdict:
    """The verdict of some runs of one experiment and profile on a claim."""
    about = (claim, experiment, profile, leads)
    rows = []
    for run in runs:
        numbers = claim.measure(run, runs)
        if numbers is not None:
            where = {"η": run.config.learning_rate, "ρ": run.config.rho, "seed": run.config.seed}
            rows.append({"run_id": run.id, **where, **numbers, "supports": claim.supports(numbers)})
    details = pd.DataFrame(rows)
    if details.empty:
        return Verdict(*about, "not recorded", np.nan, np.nan, np.nan, 0, 0, details)
    supporting, total = int(details.supports.sum()), len(details)
    share = supporting / total
    outcome: Outcome = "reproduced" if share >= 0.8 else "partly" if share >= 0.4 else "not reproduced"
    statistic = details.columns[4]
    cells = [group[statistic].to_numpy() for _, group in details.groupby(["η", "ρ"])]
    random = np.random.default_rng(0)

    def draw() -> float:
        chosen = random.integers(0, len(cells), len(cells))
        return float(np.median(np.concatenate([random.choice(cells[i], len(cells[i])) for i in chosen])))

    low, high = np.percentile([draw() for _ in range(draws)], [2.5, 97.5])
    value = float(details[statistic].median())
    return Verdict(*about, outcome, value, float(low), float(high), supporting, total, details)


def verdicts(folder: Path | None = None) -> list[Verdict]:
    """All verdicts from the published runs, in the order of the claims: for each experiment that of the leading
    profile, then those of the others that have runs on the claim."""
    published = {name: published_runs(name, folder) for name in _ALL}
    results = []
    for claim in CLAIMS:
        for name in claim.experiments:
            leads = leading(published[name])
            for profile in (leads, *(p for p in reversed(PROFILES) if p not in (leads, "quick"))):
                verdict = evaluate(standard(published[name], profile), claim, name, profile, profile == leads)
                if verdict.leading or verdict.total:
                    results.append(verdict)
    return results


def table(results: Sequence[Verdict]) -> pd.DataFrame:
    """Verdicts as a table for a page or a terminal."""
    return pd.DataFrame(
        {
            "claim": [v.claim.text for v in results],
            "experiment": [title(v.experiment) for v in results],
            "profile": [v.profile for v in results],
            "statistic": [f"{v.value:.3g} [{v.low:.3g}, {v.high:.3g}]" if v.total else "–" for v in results],
            "threshold": [v.claim.threshold for v in results],
            "supporting runs": [f"{v.supporting} of {v.total}" for v in results],
            "verdict": [v.outcome for v in results],
        }
    )


def summary(results: Sequence[Verdict]) -> pd.DataFrame:
    """One row per claim, one column per experiment: verdict and supporting runs of the leading profile."""
    cells = {
        (v.claim.text, title(v.experiment)): f"{v.outcome} ({v.supporting}/{v.total})" if v.total else v.outcome
        for v in results
        if v.leading
    }
    names = [title(name) for name in _ALL]
    # A word joiner keeps 2/η in one line.
    rows = [
        {"claim": c.text.replace("/η", "/\u2060η"), **{name: cells.get((c.text, name), "–") for name in names}}
        for c in CLAIMS
    ]
    return pd.DataFrame(rows)


def record(results: Sequence[Verdict], folder: Path | None = None) -> None:
    """Write the verdicts down beside the published runs."""
    atomic_write(_record_path(folder), (json.dumps(_summary(results), indent=1) + "\n").encode())


def agrees_with_record(results: Sequence[Verdict], folder: Path | None = None) -> list[str]:
    """Differences between verdicts and those written down; empty if they agree."""
    path = _record_path(folder)
    recorded = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    computed = _summary(results)
    return [
        f"{name}: computed {computed.get(name)}, recorded {recorded.get(name)}"
        for name in sorted({*computed, *recorded})
        if computed.get(name) != recorded.get(name)
    ]


def _record_path(folder: Path | None) -> Path:
    return published_path("claims", folder).with_suffix(".json")


def _summary(results: Sequence[Verdict]) -> dict[str, str]:
    return {
        f"{v.claim.key}/{v.experiment}/{v.profile}": f"{v.outcome} ({v.supporting} of {v.total} runs)" for v in results
    }
