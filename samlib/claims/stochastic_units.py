"""What bears on the claims of the stochastic edge: units from recorded runs, and from toy problems."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd

from ..runs import Run
from .base import Evidence, Unit
from .stochastic_runs import KERNELS, ends

__all__ = [
    "at_edge",
    "critical_kernels",
    "far",
    "fixed",
    "foretold",
    "linear",
    "lowered",
    "matched",
    "nominal",
    "preferred",
    "quadratic",
    "settles",
    "share",
    "sharpening",
    "spread",
    "white",
    "with_sam",
]

AT_THE_EDGE = (0.85, 1.12)  # ηλ_gen/2 that counts as being at the stochastic edge
AT_ONE = (0.8, 1.2)  # K that counts as being at 1
SHARPER = 3.0  # factor by which the full batch ends sharper than the smallest batch that learns
RANK = 0.9  # least rank correlation of batch size and sharpness
PREFERRED = 1.25  # factor by which the sharpness must fall more than the trace, to be damped preferentially
FAR, NEAR = 0.4, 0.75  # ηλ/2 of small batches at most, of the full batch at least
SURE = (0.7, 0.9)  # K below which runs of the quadratic model learn, and from which they fail
TRAINS, FAILS = 0.85, 3.4  # initial K_tr at most, at least
SPREAD = 1.5  # ratio of the largest to the smallest critical K_tr
LOWERED = 0.67  # K with SAM over K without

TIGHT = (0.98, 1.0)  # threshold over that of K = 1, where all examples are alike and many
ROUNDING = 1e-6


def _toy(evidence: Evidence, name: str) -> list[dict[str, Any]]:
    rows: Any = evidence.toys[name].to_dict("records") if name in evidence.toys else []
    return rows


def linear(evidence: Evidence) -> list[Unit]:
    """The exact threshold of linear regressions over the learning rate at which K is 1."""
    found = []
    for row in _toy(evidence, "linear"):
        place = {
            "N": row["examples"],
            "C": row["outputs"],
            "α": row["decay"],
            "B": row["batch_size"],
            "seed": row["seed"],
        }
        value = row["exact_rate"] / row["kernel_rate"]
        found.append(Unit(place, {"threshold": value}, value <= 1 + ROUNDING))
    return found


def white(evidence: Evidence) -> list[Unit]:
    """The same where all examples are alike and many."""
    chosen = [u for u in linear(evidence) if u.labels["α"] == 0 and u.labels["N"] == 400]
    return [u._replace(supports=_in(u.numbers["threshold"], TIGHT)) for u in chosen]


def fixed(evidence: Evidence) -> list[Unit]:
    """SAM on a linear regression: φηλ_gen/2, where nothing but the gradient can move."""
    found = []
    for row in _toy(evidence, "control"):
        place = {"B": row["batch_size"], "ρ": row["rho"], "seed": row["seed"]}
        numbers = {"φηλ_gen/2": row["edge_ratio"], "φ": row["factor"], "drift": row["drift"]}
        found.append(Unit(place, numbers, _in(row["edge_ratio"], AT_THE_EDGE)))
    return found


def quadratic(evidence: Evidence) -> list[Unit]:
    """Whether K_tr where the full batch ends tells which runs of the quadratic model learn."""
    found = []
    for row in _toy(evidence, "quadratic"):
        # Where the full batch itself is near its edge, or without noise, the kernel has nothing to say.
        if not row["full_edge_ratio"] < 0.7 or not row["fraction"] or SURE[0] <= row["kernel_trace"] < SURE[1]:
            continue
        foretold = bool(row["trained"]) == (row["kernel_trace"] < SURE[0])
        place = {"α": row["decay"], "ηλ₀": row["rate"], "B": row["batch_size"], "seed": row["seed"]}
        numbers = {"foretold": float(foretold), "kernel_trace": row["kernel_trace"], "trained": row["trained"]}
        found.append(Unit(place, numbers, foretold))
    return found


def share(details: pd.DataFrame, statistic: str) -> tuple[float, float, float]:
    """The share of units, and its 95 % interval by Wilson's formula."""
    n, part = len(details), float(details[statistic].mean())
    middle, half = part + 1.92 / n, 1.96 * np.sqrt(part * (1 - part) / n + 0.96 / n**2)
    return part, float((middle - half) / (1 + 3.84 / n)), float((middle + half) / (1 + 3.84 / n))


def _rows(evidence: Evidence, part: str) -> tuple[pd.DataFrame, dict[str, Run]]:
    runs = {run.id: run for run in evidence.runs}
    table = ends(evidence.runs)
    return table[table.part == part], runs


def _grids(evidence: Evidence) -> Iterator[tuple[dict[str, Any], pd.DataFrame, tuple[Run, ...]]]:
    """Per learning rate and seed: the runs of 1,000 examples that learn, by batch size, if the full batch is there."""
    rows, runs = _rows(evidence, "sharpening")
    for (rate, seed), group in rows.groupby(["learning_rate", "seed"]):
        learnt = group[group.trained].sort_values("batch_size")
        if len(learnt) > 2 and learnt.batch_size.iloc[-1] == learnt.examples.iloc[-1]:
            yield {"η": rate, "seed": seed}, learnt, tuple(runs[i] for i in learnt.run_id)


def _fall(values: pd.Series) -> float:
    return float(values.iloc[-1] / values.iloc[0])


def sharpening(evidence: Evidence) -> list[Unit]:
    """How much sharper the full batch ends than the smallest batch that learns."""
    found = []
    for place, rows, runs in _grids(evidence):
        rank = float(rows.batch_size.rank().corr(rows.sharpness.rank()))  # Spearman's; NaN of constants
        numbers = {"ratio": _fall(rows.sharpness), "rank": rank, "smallest_batch": float(rows.batch_size.iloc[0])}
        found.append(Unit(place, numbers, numbers["ratio"] >= SHARPER and rank >= RANK, runs))
    return found


def matched(evidence: Evidence) -> list[Unit]:
    """The same where the training loss first is 0.012."""
    found = []
    for place, rows, runs in _grids(evidence):
        there = rows[rows.matched_sharpness.notna()]
        if len(there) > 2 and there.batch_size.iloc[-1] == rows.batch_size.iloc[-1]:
            numbers = {"ratio": _fall(there.matched_sharpness), "smallest_batch": float(there.batch_size.iloc[0])}
            found.append(Unit(place, numbers, numbers["ratio"] >= SHARPER, runs))
    return found


def preferred(evidence: Evidence) -> list[Unit]:
    """How much more the sharpness falls with the batch size than the trace does."""
    found = []
    for place, rows, runs in _grids(evidence):
        sharpness, trace = _fall(rows.sharpness), _fall(rows.trace)
        numbers = {"preference": sharpness / trace, "sharpness_ratio": sharpness, "trace_ratio": trace}
        found.append(Unit(place, numbers, numbers["preference"] >= PREFERRED, runs))
    return found


def far(evidence: Evidence) -> list[Unit]:
    """Where ηλ/2 ends with small batches and with the full one."""
    found = []
    for place, rows, runs in _grids(evidence):
        small = rows[rows.batch_size.isin((2, 4))]
        if place["η"] == 1 and len(small):
            numbers = {"small_batch": float(small.edge_ratio.max()), "full_batch": float(rows.edge_ratio.iloc[-1])}
            found.append(Unit(place, numbers, numbers["small_batch"] <= FAR and numbers["full_batch"] >= NEAR, runs))
    return found


def _each(rows: pd.DataFrame, runs: dict[str, Run], numbers: list[str], supports: Callable[[Any], bool]) -> list[Unit]:
    """One unit per run; the first number is the statistic."""
    found = []
    for row in rows.sort_values(["examples", "batch_size", "seed"]).to_dict("records"):
        place = {"N": row["examples"], "B": row["batch_size"], "seed": row["seed"]}
        found.append(Unit(place, {n: row[n] for n in numbers}, bool(supports(row)), (runs[row["run_id"]],)))
    return found


def settles(evidence: Evidence) -> list[Unit]:
    """Where K settles with small batches."""
    parts = [_rows(evidence, name) for name in ("sharpening", "settling")]
    rows = pd.concat([r[r.trained & (r.learning_rate == 1) & r.batch_size.between(2, 16)] for r, _ in parts])
    return _each(rows, parts[0][1], ["settled_kernel", "edge_ratio"], lambda r: _in(r["settled_kernel"], AT_ONE))


def at_edge(evidence: Evidence) -> list[Unit]:
    """Where ηλ_gen/2 ends."""
    rows, runs = _rows(evidence, "settling")
    rows = rows[(rows.outcome == "finished") & (rows.learning_rate == 1) & (rows.batch_size >= 2)]
    numbers = ["sgd_edge_ratio", "first_sgd_edge_ratio", "edge_ratio", "kernel", "exact_kernel"]
    return _each(rows, runs, numbers, lambda r: _in(r["sgd_edge_ratio"], AT_THE_EDGE))


def nominal(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of the part "rates" with the ``nominal`` K_tr that each was meant to start with."""
    kernels = np.array(KERNELS)
    return rows.assign(nominal=[float(kernels[abs(np.log(kernels / k)).argmin()]) for k in rows.trace_kernel])


def _rates(evidence: Evidence) -> tuple[pd.DataFrame, dict[str, Run]]:
    rows, runs = _rows(evidence, "rates")
    return nominal(rows), runs


def foretold(evidence: Evidence) -> list[Unit]:
    """Whether the initial K_tr tells which runs learn."""
    rows, runs = _rates(evidence)
    rows = rows[(rows.batch_size <= 8) & ((rows.nominal <= TRAINS) | (rows.nominal >= FAILS))]
    rows = rows.assign(foretold=(rows.trained == (rows.nominal <= TRAINS)).astype(float))
    return _each(rows, runs, ["foretold", "trace_kernel", "learning_rate"], lambda r: r["foretold"] == 1)


def critical_kernels(rows: pd.DataFrame) -> pd.DataFrame:
    """The initial K_tr from which runs fail, and learning rate and ηλ₀/2 there: geometric means over the seeds.

    Of a seed it is the geometric midpoint between the first value at which the run fails and the one before.

    Args:
        rows: of :func:`samlib.claims.stochastic_runs.ends`, of the part "rates", with the ``nominal`` K_tr.

    Returns:
        Indexed by batch size, with ``kernel``, ``learning_rate`` and ``edge_ratio``.
    """
    found = []
    step = KERNELS[1] / KERNELS[0]
    grid = (KERNELS[0] / step, *KERNELS, KERNELS[-1] * step)
    for (size, _), group in rows.groupby(["batch_size", "seed"]):
        if len(group) < len(KERNELS):
            continue
        trained, one = group.sort_values("nominal").trained.to_numpy(), group.iloc[0]
        at = len(trained) if trained.all() else int(trained.argmin())
        critical = float(np.sqrt(grid[at] * grid[at + 1]))
        scale = critical / one.trace_kernel  # to which learning rates are proportional
        values = {"learning_rate": scale * one.learning_rate, "edge_ratio": scale * one.first_edge_ratio}
        found.append({"batch_size": size, "kernel": critical, **values})
    columns = ["kernel", "learning_rate", "edge_ratio"]
    table = pd.DataFrame(found, columns=["batch_size", *columns])
    table[columns] = np.log(table[columns].astype(float))
    return table.groupby("batch_size").mean().map(np.exp)


def spread(evidence: Evidence) -> list[Unit]:
    """How much the critical values differ between single examples, pairs and fours."""
    rows, runs = _rates(evidence)
    rows = rows[rows.batch_size <= 4]
    found = critical_kernels(rows)
    if len(found) < 3:
        return []
    ratios = found.max() / found.min()
    numbers = {"spread": ratios.kernel, "rate_spread": ratios.learning_rate, "edge_spread": ratios.edge_ratio}
    return [Unit({"B": "1 to 4"}, numbers, ratios.kernel < SPREAD, tuple(runs[i] for i in rows.run_id))]


def with_sam(table: pd.DataFrame) -> pd.DataFrame:
    """Runs with SAM beside those without: K, trace and λ_gen over those of ρ = 0, same batch size and seed.

    Args:
        table: of :func:`samlib.claims.stochastic_runs.ends`.

    Returns:
        One row per run, those of ρ = 0 too: ``run_id`` and that of ρ = 0, ``plain_id``; ``rho``, ``batch_size``,
        ``seed``; ``trained``, if both learnt; ``kernel``, ``trace`` and ``sgd_sharpness``, and ``ratio`` φηλ_gen/2.
    """
    table = table[(table.learning_rate == 1) & table.part.isin(("settling", "sam"))]
    same = ["batch_size", "seed"]
    found = table.merge(table[table.rho == 0], on=same, suffixes=("", "_plain"))
    found = found.sort_values(["batch_size", "rho", "seed"], ignore_index=True)
    sizes = {name: found[name] / found[f"{name}_plain"] for name in ("kernel", "trace", "sgd_sharpness")}
    sizes["kernel"] = sizes["kernel"].where(found.batch_size < found.examples)  # the full batch has no noise
    both = {"trained": found.trained & found.trained_plain, "plain_id": found.run_id_plain}
    return found[["run_id", "rho", *same]].assign(**both, **sizes, ratio=found.factor * found.sgd_edge_ratio)


def lowered(evidence: Evidence) -> list[Unit]:
    """K with SAM over K without, of runs that learn."""
    runs = {run.id: run for run in evidence.runs}
    rows = with_sam(ends(evidence.runs))
    found = []
    for row in rows[rows.trained & (rows.rho > 0) & (rows.batch_size < 100)].to_dict("records"):
        place = {"B": row["batch_size"], "ρ": row["rho"], "seed": row["seed"]}
        numbers = {name: row[name] for name in ("kernel", "trace", "sgd_sharpness", "ratio")}
        found.append(Unit(place, numbers, row["kernel"] < LOWERED, (runs[row["run_id"]], runs[row["plain_id"]])))
    return found


def _in(value: float, bounds: tuple[float, float]) -> bool:
    return bool(bounds[0] <= value <= bounds[1])
