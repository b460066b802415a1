"""The universal class: what its recorded runs say, as tables for pictures and pages."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from ..runs import Run
from .base import last_half
from .universal_runs import LEVELS, STUDIES, measure_at_level, study
from .universal_statistics import MEASURES, OWN_MEASURE

__all__ = ["edges_table", "measures_table", "mechanism_table", "own_columns", "price_table"]


def own_columns() -> dict[str, str]:
    """The measure that each rule of the table is named for."""
    named = {name: name.split(",")[0].split(" ")[0] for name in STUDIES["table"]}
    return {name: OWN_MEASURE[word] for name, word in named.items() if word in OWN_MEASURE}


def measures_table(runs: Sequence[Run]) -> pd.DataFrame:
    """The measures at equal loss over those of GD with the same seed; also test error in points above that of GD,
    gradients, and what became of the run. GD's own rows hold its values."""
    found, rows = study(runs, "table"), []
    for (name, seed), run in found.items():
        gd = found.get(("GD", seed))
        values = {column: measure_at_level(run, LEVELS["table"], column) for column in (*MEASURES, "test_metric")}
        if gd is not None and name != "GD":
            base = {column: measure_at_level(gd, LEVELS["table"], column) for column in values}
            test = 100 * (values["test_metric"] - base["test_metric"])
            values = {column: values[column] / base[column] for column in MEASURES} | {"test_metric": test}
        row = {"rule": name, "seed": seed, **values, "gradients": run.provenance["gradients"], "outcome": run.outcome}
        rows.append(row | {"steps": int(run.last.step), "run_id": run.id})
    columns = ("rule", "seed", *MEASURES, "test_metric", "gradients", "outcome", "steps", "run_id")
    return pd.DataFrame(rows, columns=columns)


def price_table(runs: Sequence[Run]) -> pd.DataFrame:
    """A rule's own measure, and its gradients, over those of SAM with the same seed; but of the published determinant's
    double, the trace at its size."""
    found, rows = study(runs, "table"), []
    for (name, seed), run in found.items():
        column = own_columns().get(name)
        sam = found.get(("SAM", seed))
        if column and sam is not None and name != "trace at h/√3":
            ours, theirs = (measure_at_level(r, LEVELS["table"], column) for r in (run, sam))
            cost = run.provenance["gradients"] / sam.provenance["gradients"]
            rows.append({"rule": name, "seed": seed, "ratio": ours / theirs, "cost": cost})
    return pd.DataFrame(rows, columns=("rule", "seed", "ratio", "cost"))


def mechanism_table(runs: Sequence[Run]) -> pd.DataFrame:
    """‖H‖_F at equal loss over that of SGD with the same seed, and the test error where each run stopped."""
    found, rows = study(runs, "published"), []
    for (name, seed), run in found.items():
        norm = measure_at_level(run, LEVELS["published"], "frobenius_norm")
        sgd = found.get(("SGD", seed))
        base = measure_at_level(sgd, LEVELS["published"], "frobenius_norm") if sgd else np.nan
        row = {"rule": name, "seed": seed, "ratio": norm / base, "frobenius_norm": norm, "steps": int(run.last.step)}
        rows.append(row | {"test_metric": run.last.test_metric, "outcome": run.outcome})
    columns = ("rule", "seed", "ratio", "frobenius_norm", "steps", "test_metric", "outcome")
    return pd.DataFrame(rows, columns=columns)


def edges_table(runs: Sequence[Run]) -> pd.DataFrame:
    """Medians over the last half of training: λ_max of the loss and of the own objective over 2/η, and the ratio to
    the edge of the rule's own law."""
    rows = []
    for (name, seed), run in study(runs, "edges").items():
        row = {"rule": name, "seed": seed, "outcome": run.outcome, "steps": int(run.last.step)}
        values = dict.fromkeys(("sharpness", "own", "ratio"), np.nan)
        if run.outcome == "finished":
            half = last_half(run)
            own = half.own_sharpness / half.gd_edge if "own_sharpness" in half else pd.Series(np.nan, half.index)
            columns = {"sharpness": half.eigenvalue_1 / half.gd_edge, "own": own, "ratio": half.edge_ratio}
            values = {key: float(np.median(column)) for key, column in columns.items()}
        rows.append(row | values)
    return pd.DataFrame(rows, columns=("rule", "seed", "outcome", "steps", "sharpness", "own", "ratio"))
