"""The results of a sweep: one tidy table, heatmaps over the swept parameters, and a page that shows both."""

from __future__ import annotations

import html
import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ..files import atomic_write
from .executing import execute
from .planning import Sweep, load
from .points import RESULTS, Point, Status

if TYPE_CHECKING:
    from ..figures import Figure
    from ..runs import RunStore

__all__ = ["ReportError", "axes", "heatmap", "heatmaps", "links", "report", "table"]

_PAGE = Path(__file__).with_suffix(".ipynb")
_MEASURED = {
    "edge_ratio_late": "Edge ratio, median over the last half of training",
    "edge_ratio": "Edge ratio at the end of training",
    "loss": "Training loss at the end",
    "test_metric": "Test error, or test loss of the language model",
}
_FIXED = ("point", "outcome", "run_id", "operator_norm", "seconds", "notebook")


class ReportError(Exception):
    """A report that could not be made: points without a result, or a page that failed; the message says which."""


def table(folder: str | os.PathLike[str]) -> pd.DataFrame:
    """One row per point, in the order of the sweep.

    Columns: ``point``; each parameter that was given; ``outcome``; ``run_id``; ``loss``, ``operator_norm``,
    ``edge_ratio`` and ``test_metric`` of the run's last measurement; ``edge_ratio_late``, the median edge ratio over
    the last half of training; what the notebook recorded with :func:`samlib.journal.record`; ``seconds`` of wall time;
    ``notebook``, the executed notebook's path within the folder. A point that trained several runs has all their ids
    and no measurements.

    Raises:
        SweepError: if the folder holds no sweep.
    """
    sweep = load(folder)
    store = None
    if any(status and status.runs for status in map(sweep.status, sweep.points)):
        from ..runs import RunStore

        store = RunStore(sweep.out / "runs")
    return pd.DataFrame([_row(sweep, point, store) for point in sweep.points])


def _row(sweep: Sweep, point: Point, store: RunStore | None) -> dict[str, Any]:
    status = sweep.status(point) or Status("missing", seconds=math.nan)
    row = {"point": point.id, **point.params, "outcome": status.outcome, "run_id": " ".join(status.runs)}
    if status.outcome in RESULTS and len(status.runs) == 1 and store:
        folder = Path(point.params["store"]) if "store" in point.params else None
        row |= _measurements(type(store)(sweep.cwd / folder) if folder else store, status.runs[0])
    executed = sweep.out / point.id / "executed.ipynb"
    shown = f"{point.id}/executed.ipynb" if status.outcome in RESULTS and executed.exists() else ""
    return row | status.values | {"seconds": status.seconds, "notebook": shown}


def _measurements(store: RunStore, run_id: str) -> dict[str, Any]:
    run = store.load(run_id)
    if run is None:
        return {}
    rows, last = run.measurements, run.last
    late = rows.loc[rows.step >= last.step / 2, "edge_ratio"] if "edge_ratio" in rows else pd.Series(dtype=float)
    names = ("loss", "operator_norm", "edge_ratio", "test_metric")
    values = {name: float(last.get(name, math.nan)) for name in names}
    return values | {"edge_ratio_late": float(late.median()) if run.outcome == "finished" else math.nan}


def report(folder: str | os.PathLike[str], allow_partial: bool = False) -> pd.DataFrame:
    """Write ``table.csv``, ``table.parquet``, ``report.ipynb`` and ``report.html`` into a sweep's folder.

    Args:
        folder: the sweep.
        allow_partial: accept points without a result.

    Returns:
        The table.

    Raises:
        SweepError: if the folder holds no sweep.
        ReportError: if points have no result, or the page could not be made.
    """
    folder = Path(folder).absolute()
    frame = table(folder)
    missing = frame[~frame.outcome.isin(RESULTS)]
    if len(missing) and not allow_partial:
        counts = ", ".join(f"{n} {outcome}" for outcome, n in missing.outcome.value_counts().items())
        ids = ", ".join(missing.point[:3]) + (", …" if len(missing) > 3 else "")
        raise ReportError(
            f"{len(missing)} of {len(frame)} points have no result ({counts}: {ids}); "
            "run the sweep's command again, or report what there is with --allow-partial"
        )
    buffer = io.BytesIO()
    plain = frame.map(lambda v: str(v) if isinstance(v, (list, dict)) else v)
    plain.to_parquet(buffer, index=False)
    atomic_write(folder / "table.parquet", buffer.getvalue())
    atomic_write(folder / "table.csv", plain.to_csv(index=False).encode())
    done = execute(_PAGE, folder / "report.ipynb", {"folder": str(folder)}, folder, folder / "report.log")
    if done.outcome != "finished":
        raise ReportError(f"the report's notebook {done.outcome}:\n{done.error}")
    _write_html(folder / "report.ipynb")
    return frame


def _write_html(notebook: Path) -> None:
    import nbformat
    from nbconvert import HTMLExporter
    from traitlets.config import Config

    removed = {"enabled": True, "remove_input_tags": ["hide-input", "parameters", "injected-parameters"]}
    offline = {
        "exclude_output_prompt": True,
        "require_js_url": "",
        "jquery_url": "",
        "mathjax_url": "",
        "mermaid_js_url": "",
    }
    exporter = HTMLExporter(config=Config(TagRemovePreprocessor=removed, HTMLExporter=offline))
    page, _ = exporter.from_notebook_node(nbformat.read(notebook, as_version=4), {"metadata": {"name": "Sweep"}})
    atomic_write(notebook.with_suffix(".html"), page.encode())


def axes(frame: pd.DataFrame, folder: str | os.PathLike[str]) -> list[str]:
    """The swept parameters, numbers before words, those with most values first."""
    names = load(folder).swept
    numeric = {n: pd.api.types.is_numeric_dtype(frame[n]) for n in names}
    return sorted(names, key=lambda n: (not numeric[n], -frame[n].astype(str).nunique()))


def heatmaps(frame: pd.DataFrame, over: Sequence[str]) -> list[Figure]:
    """A heatmap of each measured or recorded quantity over the first two of the swept parameters."""
    known = {*_FIXED, *over}
    numeric = [c for c in frame.select_dtypes("number") if c not in known and c not in _MEASURED]
    recorded = [c for c in numeric if frame[c].nunique() > 1 and list(frame).index(c) > list(frame).index("outcome")]
    shown = [c for c in (*_MEASURED, *recorded) if c in frame and frame[c].notna().any()]
    return [heatmap(frame, str(column), over) for column in shown]


def heatmap(frame: pd.DataFrame, column: str, over: Sequence[str]) -> Figure:
    """One quantity over two parameters; medians over the points that differ in further ones.

    Args:
        frame: the table of a sweep.
        column: what to show.
        over: the swept parameters; the first runs across, the second up.
    """
    import matplotlib as mpl
    import seaborn as sns

    from ..figures import drawing

    across, up = over[0], over[1] if len(over) > 1 else None
    further = list(over[2:])
    part = frame.assign(_across=_ordered(frame[across]), _up=_ordered(frame[up]) if up else "")
    values = part.pivot_table(index="_up", columns="_across", values=column, aggfunc="median", dropna=False)
    diverged = part[part.outcome == "diverged"].groupby(["_up", "_across"]).size()
    opens = part[part.notebook != ""].groupby(["_up", "_across"]).notebook.first()
    title = _MEASURED.get(column, column)
    centre = 1.0 if column.startswith("edge_ratio") else None
    grid = values.to_numpy(float)
    flat = grid[np.isfinite(grid)]
    low, high = (float(flat.min()), float(flat.max())) if len(flat) else (0.0, 1.0)
    if centre:  # as far on either side, so that white is the edge
        reach = max(abs(high - 1), abs(1 - low), 0.05)
        low, high = 1 - reach, 1 + reach

    def draw(canvas: Any) -> pd.DataFrame:
        axis = canvas.subplots()
        norm = mpl.colors.Normalize(low, high)
        if not centre and low > 0 and high / low > 30:
            norm = mpl.colors.LogNorm(low, high)
        palette = sns.color_palette("vlag" if centre else "crest", as_cmap=True)
        axis.pcolormesh(grid, cmap=palette, norm=norm, edgecolors="none")
        for (i, j), value in np.ndenumerate(grid):
            place = (values.index[i], values.columns[j])
            text, colour = "diverged" if place in diverged else "–", mpl.rcParams["text.color"]
            if np.isfinite(value):
                text, colour = f"{value:.3g}", "black" if sum(palette(norm(value))[:3]) > 1.6 else "white"
            url = opens.get(place)
            axis.text(j + 0.5, i + 0.5, text, ha="center", va="center", color=colour, url=url, fontsize=9)
        axis.set_xticks([j + 0.5 for j in range(len(values.columns))], [_plain(v) for v in values.columns])
        axis.set_yticks([i + 0.5 for i in range(len(values.index))], [_plain(v) for v in values.index])
        axis.tick_params(length=0)
        axis.set(xlabel=across, ylabel=up or "", title=title)
        axis.grid(False)
        return frame[[*dict.fromkeys([*over, column])]]

    size = (1.6 + 0.85 * max(3, len(values.columns)), 1.1 + 0.45 * max(1, len(values.index)))
    where = across + (f" and {up}" if up else "")
    extremes = f", from {flat.min():.3g} to {flat.max():.3g}" if len(flat) else ""
    note = f" Medians over {', '.join(further)}." if further else ""
    note += " A number opens the notebook of its point." if len(opens) else ""
    if centre:
        note += " White is the edge of stability."
    caption = f"{title} over {html.escape(where)}.{note}"
    return drawing(draw, size, column, f"Heatmap of {title[0].lower()}{title[1:]} over {where}{extremes}", caption)


def _ordered(values: pd.Series) -> pd.Series:
    """Numbers as they are, so that they are sorted as such; anything else as text."""
    return values if pd.api.types.is_numeric_dtype(values) and values.notna().all() else values.map(_plain)


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def links(frame: pd.DataFrame, over: Sequence[str]) -> Any:
    """The table for a page: swept parameters and results, numbers short, each point linked to its notebook."""
    shared = [name for name in list(frame)[1 : list(frame).index("outcome")] if name not in over]
    shown = frame.drop(columns=["notebook", *shared])
    shown["point"] = [
        f'<a href="{notebook}">{point}</a>' if notebook else point
        for point, notebook in zip(frame.point, frame.notebook, strict=True)
    ]
    caption = ", ".join(f"{name} = {html.escape(str(frame[name].iloc[0]))}" for name in shared)
    styled = shown.style.hide().format(lambda v: f"{v:.4g}", subset=list(shown.select_dtypes("number")), na_rep="–")
    return styled.set_caption(f"The same for all points: {caption}") if caption else styled
