"""The report of a sweep: its table as files, heatmaps over the swept parameters, and a page that shows both."""

from __future__ import annotations

import html
import importlib.metadata
import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
import numpy as np
import pandas as pd

from ..files import as_text, atomic_write
from .executing import execute
from .planning import load
from .points import COLUMNS, RESULTS
from .table import table

if TYPE_CHECKING:
    from ..figures import Figure

__all__ = ["ReportError", "axes", "heatmap", "heatmaps", "links", "report", "table"]

_PAGE = Path(__file__).with_suffix(".ipynb")
_MEASURED = {
    "edge_ratio_late": "Edge ratio, median over the last half of training",
    "edge_ratio": "Edge ratio at the end of training",
    "loss": "Training loss at the end",
    "test_metric": "Test error, or test loss of the language model",
}


class ReportError(Exception):
    """A report that could not be made: points without a result, or a page that failed; the message says which."""


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
    frame.to_parquet(buffer, index=False)
    atomic_write(folder / "table.parquet", buffer.getvalue())
    atomic_write(folder / "table.csv", frame.to_csv(index=False).encode())
    with filelock.FileLock(folder / ".lock"):
        done = execute(_PAGE, folder / "report.ipynb", {"folder": as_text(folder)}, folder, folder / "report.log")
        if done.outcome != "finished":
            raise ReportError(f"the tables are written, but the report's notebook {done.outcome}:\n{done.error}")
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
    # nbconvert looks for its templates beside the interpreter only, and among the folders of the working folder: in an
    # environment on top of another one they are where nbconvert is.
    files = importlib.metadata.files("nbconvert") or []
    found = {f.locate().parents[1] for f in files if f.name == "conf.json" and "templates" in f.parts}  # type: ignore
    templates = [str(path) for path in found]
    exporter = HTMLExporter(
        config=Config(TagRemovePreprocessor=removed, HTMLExporter=offline),
        extra_template_basedirs=templates,
        extra_template_paths=templates,
    )
    page, _ = exporter.from_notebook_node(nbformat.read(notebook, as_version=4), {"metadata": {"name": "Sweep"}})
    atomic_write(notebook.with_suffix(".html"), page.encode("utf-8", "backslashreplace"))


def axes(frame: pd.DataFrame, folder: str | os.PathLike[str]) -> list[str]:
    """The swept parameters, numbers before words, those with most values first."""
    names = load(folder).swept
    numeric = {n: pd.api.types.is_numeric_dtype(frame[n]) for n in names}
    return sorted(names, key=lambda n: (not numeric[n], -frame[n].astype(str).nunique()))


def heatmaps(frame: pd.DataFrame, over: Sequence[str]) -> list[Figure]:
    """A heatmap of each measured or recorded quantity over the first two of the swept parameters."""
    results = [str(c) for c in list(frame)[list(frame).index("outcome") :] if c not in COLUMNS]
    numeric = [c for c in results if c in frame.select_dtypes("number")]
    measured = [c for c in _MEASURED if c in numeric and frame[c].notna().any()]
    known = {"operator_norm", *_MEASURED}
    recorded = [c for c in numeric if c not in known and frame[c].nunique() > 1]
    return [heatmap(frame, column, over) for column in measured + recorded]


def heatmap(frame: pd.DataFrame, column: str, over: Sequence[str]) -> Figure:
    """One quantity over two parameters; medians over the points that differ in further ones.

    Args:
        frame: the table of a sweep.
        column: what to show.
        over: the swept parameters; the first runs across, the second up.
    """
    from ..figures import drawing

    across, up = over[0], over[1] if len(over) > 1 else None
    # Under names of our own: those of the table may be any.
    part = pd.DataFrame({"across": _ordered(frame[across]), "up": _ordered(frame[up]) if up else ""})
    part = part.assign(value=frame[column].astype(float), outcome=frame.outcome, notebook=frame.notebook)
    values = part.pivot_table(index="up", columns="across", values="value", aggfunc="median", dropna=False)
    diverged = part[part.outcome == "diverged"].groupby(["up", "across"]).size()
    opens = part[part.notebook != ""].groupby(["up", "across"]).notebook.first()
    title, centred = _MEASURED.get(column, column), column in ("edge_ratio", "edge_ratio_late")
    grid = values.to_numpy(float)
    flat = grid[np.isfinite(grid)]

    def draw(canvas: Any) -> pd.DataFrame:
        axis = canvas.subplots()
        colours = _colours(flat, centred)
        axis.pcolormesh(grid, cmap=colours.cmap, norm=colours.norm, edgecolors="none")
        for (i, j), value in np.ndenumerate(grid):
            place = (values.index[i], values.columns[j])
            text, colour = "diverged" if place in diverged else "–", None
            if not np.isnan(value):
                text, colour = f"{value:.3g}", "black" if sum(colours.to_rgba(value)[:3]) > 1.6 else "white"
            url = opens.get(place)
            axis.text(j + 0.5, i + 0.5, text, ha="center", va="center", color=colour, url=url, fontsize=9)
        axis.set_xticks([j + 0.5 for j in range(len(values.columns))], [_label(v) for v in values.columns])
        axis.set_yticks([i + 0.5 for i in range(len(values.index))], [_label(v) for v in values.index])
        axis.tick_params(length=0)
        axis.set(xlabel=_label(across), ylabel=_label(up or ""), title=_label(title, 80))
        axis.grid(False)
        return frame[[*dict.fromkeys([*over, column])]]

    size = (1.6 + 0.85 * max(3, len(values.columns)), 1.1 + 0.45 * max(1, len(values.index)))
    where = across + (f" and {up}" if up else "")
    extremes = f", from {flat.min():.3g} to {flat.max():.3g}" if len(flat) else ""
    caption = html.escape(f"{title} over {where}.")
    caption += html.escape(f" Medians over {', '.join(over[2:])}.") if over[2:] else ""
    caption += " A number opens the notebook of its point." if len(opens) else ""
    caption += " White is the edge of stability." if centred else ""
    alt = f"Heatmap of {title[:1].lower()}{title[1:]} over {where}{extremes}"
    return drawing(draw, size, re.sub(r"\W", "_", column), alt, caption)


def _colours(values: np.ndarray, centred: bool) -> Any:
    """What colour a value has; where 1 is the edge, as far on either side, so that it is white."""
    import matplotlib as mpl
    import matplotlib.cm
    import seaborn as sns

    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    if centred:
        reach = max(abs(high - 1), abs(1 - low), 0.05)
        low, high = 1 - reach, 1 + reach
    scale = mpl.colors.LogNorm if not centred and low > 0 and high / low > 30 else mpl.colors.Normalize
    return mpl.cm.ScalarMappable(scale(low, high), sns.color_palette("vlag" if centred else "crest", as_cmap=True))


def _ordered(values: pd.Series) -> pd.Series:
    """Numbers as they are, so that they are sorted as such; anything else as text."""
    return values if pd.api.types.is_numeric_dtype(values) and values.notna().all() else values.map(_plain)


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _label(value: Any, length: int = 40) -> str:
    """A value beside an axis: in one line, not too long, and a dollar is no mathematics."""
    return _short(_plain(value), length).replace("$", r"\$")


def _short(text: str, length: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"


def links(frame: pd.DataFrame, over: Sequence[str]) -> Any:
    """The table for a page: swept parameters and results, numbers short, each point linked to its notebook."""
    shared = [name for name in list(frame)[1 : list(frame).index("outcome")] if name not in over]
    shown = frame.drop(columns=["notebook", *shared])
    shown["point"] = [
        f'<a href="{notebook}">{point}</a>' if notebook else point
        for point, notebook in zip(frame.point, frame.notebook, strict=True)
    ]
    numbers = list(shown.select_dtypes("number"))
    words = [name for name in shown if name not in {"point", *numbers}]
    styled = shown.style.hide().format(lambda v: f"{v:.4g}", subset=numbers, na_rep="–")
    styled = styled.format(lambda v: html.escape(_short(str(v), 80)), subset=words, na_rep="–")
    styled = styled.format_index(lambda name: html.escape(str(name)), axis="columns")
    caption = ", ".join(html.escape(f"{name} = {frame[name].iloc[0]}") for name in shared)
    return styled.set_caption(f"The same for all points: {caption}") if caption else styled
