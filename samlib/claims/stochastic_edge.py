"""The stochastic edge: what is recorded for the chapter, and what is claimed.

Thresholds were set after prototypes with other seeds, and before these runs were recorded. Two statements of the paper
that the prototypes did not confirm are tested like the others.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pandas as pd

from ..toys.noise import linear_thresholds, quadratic_runs
from ..toys.sam_noise import sam_on_regression
from . import stochastic_units as of
from .base import Chapter, Claim, Evidence, Interval, Unit, bootstrap
from .stochastic_runs import MATCHED, SEEDS, TRACES, configs

__all__ = ["CHAPTER"]

DECAYS = (0.0, 0.5, 1.0)


def _linear() -> pd.DataFrame:
    sizes: Any = {50: (1, 4, 16), 100: (1, 4, 16, 64), 400: (1, 4, 16, 64)}
    grid = itertools.product(DECAYS, ((50, 1), (100, 1), (400, 1), (100, 3)))
    return _table(linear_thresholds(n, sizes[n], tuple(TRACES), c, decay) for decay, (n, c) in grid)


def _pathwise() -> pd.DataFrame:
    ways: Any = ("subsets", "epochs")
    return _table(linear_thresholds(50, (1, 4, 16), SEEDS, 1, decay, ways) for decay in DECAYS)


def _quadratic() -> pd.DataFrame:
    rates, sizes, seeds = (0.1, 0.2, 0.4, 0.6, 0.8), (1, 2, 4, 8, 16), range(1001, 1009)
    return _table(quadratic_runs(rates, sizes, seeds, decay) for decay in DECAYS)


def _control() -> pd.DataFrame:
    return pd.DataFrame(sam_on_regression((2, 4, 16, 100), (0.03, 0.1, 0.3), SEEDS))


def _table(parts: Iterable[list[dict[str, float]]]) -> pd.DataFrame:
    return pd.DataFrame(itertools.chain.from_iterable(parts))


PAPER, OURS = "Agarwala & Pennington (2024)", "this chapter"


def _claim(
    key: str,
    text: str,
    original: str,
    unit: str,
    statistic: str,
    threshold: str,
    units: Callable[[Evidence], list[Unit]],
    band: tuple[float, float],
    expected: str = "",
    interval: Interval = bootstrap,
) -> Claim:
    place = (key, text, original, unit, statistic, threshold, units, ("stochastic_edge",))
    return Claim(*place, interval=interval, expected=expected, band=band)


_NEAR = f"between {of.AT_THE_EDGE[0]} and {of.AT_THE_EDGE[1]}"
_INF = np.inf

CLAIMS = (
    _claim(
        "bound",
        "The kernel norm bounds the largest stable learning rate of a linear model: where K is 1, it is unstable.",
        OURS,
        "regression",
        "largest learning rate stable in mean square over that at which K = 1",
        "at most 1",
        of.linear,
        (-_INF, 1.0),
    ),
    _claim(
        "white",
        "Where all examples are alike and many, K = 1 is the edge.",
        OURS,
        "regression",
        "largest stable learning rate over that at which K = 1, for N = 400 and a white spectrum",
        f"between {of.TIGHT[0]} and {of.TIGHT[1]:g}",
        of.white,
        of.TIGHT,
    ),
    _claim(
        "quadratic",
        "Where the tangent kernel moves, its trace at the full batch's solution tells which runs of SGD learn.",
        f"{PAPER}, as we read it",
        "run",
        "whether a run learns if and only if K_tr there is small",
        f"learns if K_tr < {of.SURE[0]}, fails if K_tr ≥ {of.SURE[1]}",
        of.quadratic,
        (0.5, _INF),
        interval=of.share,
    ),
    _claim(
        "sharpening",
        "Sharpening is conservative: the smaller the batch, the less sharp is where SGD ends.",
        PAPER,
        "grid",
        "λ of the full batch over λ of the smallest batch that learns, after 3,000 steps",
        f"at least {of.SHARPER:g}, and rank correlation of B and λ at least {of.RANK}",
        of.sharpening,
        (of.SHARPER, _INF),
    ),
    _claim(
        "matched",
        "At equal training loss, too, the smaller the batch, the less sharp.",
        PAPER,
        "grid",
        f"λ of the full batch over that of the smallest, where the training loss first is {MATCHED}",
        f"at least {of.SHARPER:g}",
        of.matched,
        (of.SHARPER, _INF),
    ),
    _claim(
        "preferred",
        "The noise damps the large eigenvalues preferentially.",
        PAPER,
        "grid",
        "how much more λ falls than the trace, from the full batch to the smallest that learns",
        f"by a factor of at least {of.PREFERRED}",
        of.preferred,
        (of.PREFERRED, _INF),
        "not reproduced: in trials the trace fell as much",
    ),
    _claim(
        "far",
        "With small batches the edge of gradient descent is far away, and the full batch is near it.",
        PAPER,
        "seed",
        "largest ηλ/2 of B = 2 and 4 after 3,000 steps, η = 1",
        f"at most {of.FAR}, that of the full batch at least {of.NEAR}",
        of.far,
        (-_INF, of.FAR),
    ),
    _claim(
        "settles",
        "With small batches K settles at 1.",
        f"{PAPER}, as we read it",
        "run",
        "median of K from step 600 on; η = 1, B from 2 to 16",
        f"between {of.AT_ONE[0]} and {of.AT_ONE[1]}",
        of.settles,
        of.AT_ONE,
        "not reproduced: in trials K settled between 0.2 and 0.45",
    ),
    _claim(
        "at_edge",
        "What settles at the edge is the batch-aware sharpness λ_gen.",
        OURS,
        "run",
        "ηλ_gen/2 after 3,000 steps; η = 1, N = 100, B ≥ 2",
        _NEAR,
        of.at_edge,
        of.AT_THE_EDGE,
    ),
    _claim(
        "foretold",
        "K_tr at the initial weights foretells whether training succeeds.",
        f"{PAPER}, as we read it",
        "run",
        "whether a run learns if and only if K_tr is small; B ≤ 8",
        f"learns if K_tr ≤ {of.TRAINS}, fails if K_tr ≥ {of.FAILS}",
        of.foretold,
        (0.5, _INF),
        interval=of.share,
    ),
    _claim(
        "spread",
        "The critical K_tr is the same for all small batches.",
        OURS,
        "grid",
        "largest over smallest critical K_tr of B = 1, 2, 4, each a mean over seeds",
        f"less than {of.SPREAD}",
        of.spread,
        (-_INF, of.SPREAD),
    ),
    _claim(
        "lowered",
        "SAM lowers the kernel norm.",
        OURS,
        "pair of runs",
        "K with SAM over K without, at the end; runs that learn",
        f"less than {of.LOWERED}",
        of.lowered,
        (-_INF, of.LOWERED),
    ),
    _claim(
        "control",
        "A ratio φηλ_gen/2 near 1 is no evidence: on a linear regression, whose curvature is fixed, SAM shows it too.",
        OURS,
        "regression",
        "φηλ_gen/2 over the second half of training",
        _NEAR,
        of.fixed,
        of.AT_THE_EDGE,
    ),
)

CHAPTER = Chapter(
    "stochastic_edge",
    "The stochastic edge",
    "agarwala2024high",
    configs,
    CLAIMS,
    {"linear": _linear, "pathwise": _pathwise, "quadratic": _quadratic, "control": _control},
)
