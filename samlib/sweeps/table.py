"""The results of a sweep in one tidy table, whatever its notebook takes and records."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from .planning import Sweep, load
from .points import COLUMNS, RESULTS, Point, Status

if TYPE_CHECKING:
    from ..runs import RunStore

__all__ = ["table"]

_MEASURED = ("loss", "operator_norm", "edge_ratio", "test_metric", "edge_ratio_late")


def table(folder: str | os.PathLike[str]) -> pd.DataFrame:
    """One row per point, in the order of the sweep.

    Columns: ``point``; each parameter that was given; ``outcome``; ``run_id``; ``loss``, ``operator_norm``,
    ``edge_ratio`` and ``test_metric`` of the run's last measurement; ``edge_ratio_late``, the median edge ratio over
    the last half of training; what the notebook recorded with :func:`samlib.journal.record`; ``seconds`` of wall time;
    ``notebook``, the executed notebook's path within the folder. A point that trained several runs has all their ids
    and no measurements.

    A column holds numbers, truth values or text; where points differ in kind, text. A measurement whose name is a
    parameter's gets ``run_`` before it, a record whose name is taken ``recorded_``.

    Raises:
        SweepError: if the folder holds no sweep.
    """
    sweep = load(folder)
    statuses = [sweep.status(point) or Status("missing", seconds=math.nan) for point in sweep.points]
    measured = [_measured(sweep, *pair) for pair in zip(sweep.points, statuses, strict=True)]

    given = {name: name for point in sweep.points for name in point.params}
    taken = {*COLUMNS, *given}
    runs = _free((name for row in measured for name in row), "run_", taken)
    recorded = _free((name for status in statuses for name in status.values), "recorded_", taken)

    rows = []
    for point, status, measurements in zip(sweep.points, statuses, measured, strict=True):
        executed = sweep.out / point.id / "executed.ipynb"
        row = {"outcome": status.outcome, "run_id": " ".join(status.runs), "seconds": status.seconds}
        row["notebook"] = f"{point.id}/executed.ipynb" if status.outcome in RESULTS and executed.exists() else ""
        row |= {"point": point.id, **point.params}
        row |= {runs[name]: value for name, value in measurements.items()}
        rows.append(row | {recorded[name]: value for name, value in status.values.items()})
    columns = ("point", *given, "outcome", "run_id", *runs.values(), *recorded.values(), "seconds", "notebook")
    return pd.DataFrame({_text(name): _column([row.get(name) for row in rows]) for name in columns})


def _free(names: Iterable[str], prefix: str, taken: set[str]) -> dict[str, str]:
    """A column for each name, with the prefix where it is taken; the columns count as taken from here on."""
    columns: dict[str, str] = {}
    for name in dict.fromkeys(names):
        column = name
        while column in taken:
            column = prefix + column
        taken.add(column)
        columns[name] = column
    return columns


def _column(values: list[Any]) -> pd.Series:
    """Values as one kind, which CSV and Parquet can hold: truth values, numbers, else text."""
    kinds = {type(value) for value in values if value is not None}
    if kinds == {bool}:
        return pd.Series(values, dtype="boolean" if None in values else bool)
    if kinds and kinds <= {int, float} and all(abs(v) <= 2**53 for v in values if isinstance(v, int)):
        return pd.Series(values, dtype="int64" if kinds == {int} and None not in values else "float64")
    return pd.Series([None if value is None else _text(value) for value in values], dtype=object)


def _text(value: Any) -> str:
    return str(value).encode("utf-8", "backslashreplace").decode("utf-8")


def _measured(sweep: Sweep, point: Point, status: Status) -> dict[str, Any]:
    """What the last measurement of a point's run says; nothing if it has no run, or several."""
    if status.outcome not in RESULTS or len(status.runs) != 1:
        return {}
    from ..runs import RunStore, StoreError

    folder = Path(point.params["store"]) if isinstance(point.params.get("store"), str) else sweep.out / "runs"
    try:
        return _measurements(RunStore(sweep.cwd / folder), status.runs[0])
    except StoreError:  # the runs are on another machine
        return {}


def _measurements(store: RunStore, run_id: str) -> dict[str, Any]:
    run = store.load(run_id)
    if run is None:
        return {}
    rows, last = run.measurements, run.last
    late = rows.loc[rows.step >= last.step / 2, "edge_ratio"] if "edge_ratio" in rows else pd.Series(dtype=float)
    values = {name: float(last.get(name, math.nan)) for name in _MEASURED[:-1]}
    return values | {_MEASURED[-1]: float(late.median()) if run.outcome == "finished" else math.nan}
