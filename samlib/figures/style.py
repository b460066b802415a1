"""The book's style: a picture with its words, data and origin, as inline SVG that follows the page's theme.

One colour means one quantity everywhere; the palette is safe for colour-blind readers and holds on light and dark.
"""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import matplotlib.lines
import matplotlib.ticker
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from ..runs import Run
from ..selection import command

if TYPE_CHECKING:
    from pandas.io.formats.style import Styler

__all__ = [
    "COLOURS",
    "FOREGROUND",
    "LABELS",
    "LEAST",
    "STYLE",
    "Figure",
    "drawing",
    "key",
    "plain_log",
    "render",
    "wide",
]

FOREGROUND = "#010203"  # becomes the page's text colour
LEAST = 1.15  # a picture's points are drawn at this many pixels or more, so that its text of 10 points can be read
MOST = 1.5  # and at this many at most, where there is room
COLUMN = 7.5  # a wider picture, in inches, needs the margin too

COLOURS = {
    "operator_norm": "#3a87c8",
    "edge": "#e2661a",
    "gd_edge": "#8a8a8a",
    "loss": "#1b9e77",
    "test_metric": "#1b9e77",
    "grad_alignment": "#a08a1f",
    "sam_grad_alignment": "#b55fa8",
}

LABELS = {
    "operator_norm": "operator norm ‖H‖",
    "edge": "SAM edge",
    "gd_edge": "GD edge 2/η",
    "loss": "training loss",
    "grad_alignment": "gradient",
    "sam_grad_alignment": "SAM gradient",
    "edge_ratio": "‖H‖ / edge",
}

STYLE: Any = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), FOREGROUND),
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": FOREGROUND,
    "grid.alpha": 0.12,
    "grid.linewidth": 0.6,
    "font.size": 10,
    "axes.titlesize": 10,
    "lines.linewidth": 1.6,
    "svg.fonttype": "none",
    "axes.formatter.use_mathtext": False,
    "axes.unicode_minus": True,
}


@dataclass(frozen=True)
class Figure:
    """A picture for a notebook or a page; shown as HTML.

    Attributes:
        svg: the drawing.
        alt: what it shows, for readers who cannot see it.
        caption: the line under it.
        data: what is drawn, one row per point.
        runs: the runs behind it.
        name: file name of the data, without extension.
        wide: whether it uses the whole width of the page, the margin included.
    """

    svg: str
    alt: str
    caption: str
    data: pd.DataFrame
    runs: tuple[Run, ...]
    name: str
    wide: bool = False

    def _repr_html_(self) -> str:
        csv = base64.b64encode(self.data.to_csv(index=False, float_format="%.6g").encode()).decode()
        ids = ", ".join(f"<code>{run.id}</code>" for run in self.runs)
        commands = sorted({command(run) for run in self.runs})
        shown = "\n".join(commands[:3]) + (f"\n… and {len(commands) - 3} more" if len(commands) > 3 else "")
        origin = (
            f"<details><summary>{len(self.runs)} run{'s' * (len(self.runs) > 1)} behind this figure</summary>"
            f"<p>{ids}</p><pre>{html.escape(shown)}</pre></details>"
            if self.runs
            else ""
        )
        link = f'<a download="{self.name}.csv" href="data:text/csv;base64,{csv}">Data (CSV)</a>'
        return (
            f'<figure class="samlib-figure{" full-width" * self.wide}"><div style="overflow-x:auto">{self.svg}</div>'
            f"<figcaption><p>{self.caption}</p>{link}{origin}</figcaption></figure>"
        )


class _Powers(mpl.ticker.LogFormatter):
    """Ticks of a logarithmic axis in letters of one size: Matplotlib's own exponents are too small to be read."""

    def _num_to_string(self, value: float, vmin: float, vmax: float) -> str:
        exponent = f"{value:.0e}".partition("e")[2]
        if 1e-3 <= value <= 1e4 or not np.isclose(value, 10.0 ** int(exponent)):
            return f"{value:g}"
        return "10" + str(int(exponent)).translate(str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻"))


def render(canvas: Canvas, alt: str, most: float = MOST) -> str:
    """A Matplotlib figure as inline SVG: transparent, in the page's text colour, with an accessible name.

    Args:
        canvas: the figure.
        alt: what it shows.
        most: how far it is enlarged where there is room, in pixels per point.
    """
    for part in canvas.axes:
        for axis in (part.xaxis, part.yaxis):
            if isinstance(axis.get_major_formatter(), mpl.ticker.LogFormatterMathtext):
                axis.set_major_formatter(_Powers())
            if isinstance(axis.get_minor_formatter(), mpl.ticker.LogFormatterMathtext):
                axis.set_minor_formatter(_Powers(labelOnlyBase=False))
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": alt}):
        canvas.savefig(buffer, format="svg", bbox_inches="tight", pad_inches=0.05, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(FOREGROUND, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    opening = re.match(r"<svg[^>]*>", svg)
    assert opening
    box = re.search(r'viewBox="[^"]*?([\d.]+) [\d.]+"', opening[0])
    assert box
    label = html.escape(alt, quote=True)
    width = float(box[1])
    size = f"width:100%;min-width:{LEAST * width:.0f}px;max-width:{most * width:.0f}px;height:auto"
    head = f'<svg role="img" aria-label="{label}" {box[0]} style="{size}"'
    head += ' xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">'
    return re.sub(r"\n\s*", "\n", head + svg[opening.end() :])


def drawing(
    draw: Callable[[Canvas], pd.DataFrame],
    size: tuple[float, float],
    name: str,
    alt: str,
    caption: str,
    runs: Sequence[Run] = (),
    most: float = MOST,
) -> Figure:
    """A figure of one's own in the book's style.

    Args:
        draw: draws on an empty Matplotlib figure and returns what it drew as a table.
        size: width and height in inches.
        name: file name of the data, without extension.
        alt: what the picture shows.
        caption: the line under it.
        runs: the runs behind it, if any.
        most: as for :func:`render`.
    """
    with mpl.rc_context(STYLE):
        canvas = Canvas(figsize=size, layout="constrained")
        data = draw(canvas)
        svg = render(canvas, alt, most)
    return Figure(svg, alt, caption, data, tuple(runs), name, wide=size[0] > COLUMN)


def key(canvas: Canvas, entries: dict[str, str]) -> None:
    """Names in their colours above the panels: a legend that needs no swatches to be looked up."""
    handles = [mpl.lines.Line2D([], [], color=c, linewidth=2.4) for c in entries.values()]
    canvas.legend(
        handles,
        list(entries),
        labelcolor=list(entries.values()),
        loc="outside upper left",
        ncols=len(entries),
        frameon=False,
        handlelength=1.2,
        columnspacing=1.4,
        prop={"weight": "bold", "size": 10},
    )


def plain_log(axis: Axes) -> None:
    """Plain numbers on a logarithmic axis, few of them."""
    axis.yaxis.set_major_formatter(mpl.ticker.StrMethodFormatter("{x:g}"))
    low, high = axis.get_ylim()
    if high / low < 1000:
        axis.yaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 2, 5) if high / low < 50 else (1, 3)))
    axis.yaxis.set_minor_formatter(mpl.ticker.NullFormatter())


def wide(table: pd.DataFrame) -> Styler:
    """A table without its index that uses the whole width of the page, the margin included."""
    return table.style.hide().set_table_attributes('class="full-width"')
