"""One run that tells the story: the operator norm meets its edge and falls with it, far below 2/η."""

from __future__ import annotations

import io
import re
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from ..experiments import title
from ..runs import Run
from ..selection import tidy
from .style import COLOURS, FOREGROUND, LABELS, STYLE, Figure, drawing, plain_log

__all__ = ["card", "headline", "seen", "standalone", "story"]

EITHER = "#7d838c"  # text that can be read on white and on black alike


def card(run: Run | None, title: str) -> bytes:
    """A PNG of 1200 × 630 pixels with a title and the story of a run, for links from other sites."""
    with mpl.rc_context({**STYLE, "figure.facecolor": "white", "savefig.facecolor": "white", "font.size": 16}):
        canvas = Canvas(figsize=(12, 6.3), dpi=100, layout="constrained")
        canvas.suptitle(title, fontsize=30, weight="bold", wrap=True)
        if run:
            story(canvas.subplots(), tidy([run], "operator_norm", "edge", "gd_edge"), size=2)
        buffer = io.BytesIO()
        canvas.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def headline(run: Run) -> Figure:
    """One run large, with names on the curves: the picture that tells the story."""
    frame = tidy([run], "operator_norm", "edge", "gd_edge")

    def draw(canvas: Canvas) -> pd.DataFrame:
        story(canvas.subplots(), frame, size=0.9)
        return frame

    config, last = run.config, run.last
    caption = (
        f"{title(config.experiment)}, η = {config.learning_rate:g}, ρ = {config.rho:g}, seed {config.seed}, profile "
        f"{config.profile}: at step {last.step:.0f} the ratio of operator norm and SAM edge is {last.edge_ratio:.2f}, "
        f"and 2/η is {last.gd_edge / last.edge:.1f} times the SAM edge."
    )
    # So narrow that a phone shows all of it; elsewhere it is enlarged.
    return drawing(draw, (4.1, 2.7), "headline", seen(run), caption, [run], most=1.8)


def seen(run: Run) -> str:
    """What the story shows, in words."""
    last = run.last
    return (
        f"During SAM training on {title(run.config.experiment)} the norm of the Hessian meets the SAM edge and falls "
        f"with it to {last.operator_norm:.2g}, far below the gradient-descent edge {last.gd_edge:.2g}"
    )


def story(axis: Axes, frame: pd.DataFrame, size: float = 1, named: bool = True) -> None:
    """Operator norm and both edges of one run, by default with names where the curves end."""
    for quantity in ("gd_edge", "edge", "operator_norm"):
        dash = (0, (5, 2)) if quantity == "gd_edge" else "-"
        axis.plot(frame.step, frame[quantity], color=COLOURS[quantity], linestyle=dash, linewidth=2.4 * size)
    axis.set(yscale="log", xlabel="step", ylabel="curvature")
    axis.margins(x=0.02)
    plain_log(axis)
    if named:
        _name_the_ends(axis, frame, size)


def _name_the_ends(axis: Axes, frame: pd.DataFrame, size: float) -> None:
    """Each name stands at its curve's height, moved until none covers another."""
    low, high = np.log(axis.get_ylim())
    ends = {
        name: float((np.log(frame[name].iloc[-1]) - low) / (high - low))
        for name in ("edge", "operator_norm", "gd_edge")
    }
    free = 0.0
    for name, height in sorted(ends.items(), key=lambda end: end[1]):
        ends[name] = max(height, free)
        free = ends[name] + 0.09 * size
    beyond = max(0.0, free - 0.09 * size - 1)
    for name, height in ends.items():
        words: dict[str, Any] = {"color": COLOURS[name], "weight": "bold", "fontsize": 11 * size, "va": "center"}
        axis.text(1.01, height - beyond, LABELS[name], transform=axis.transAxes, **words)


def standalone(run: Run) -> str:
    """The story as an SVG file that can be read on light and on dark pages; the same bytes every time."""
    style = {**STYLE, "svg.hashsalt": "standalone", "font.size": 13}
    with mpl.rc_context(style):
        canvas = Canvas(figsize=(9, 3.6))
        # No layout that depends on how wide a machine's letters are.
        axis = canvas.add_axes((0.07, 0.17, 0.67, 0.74))
        story(axis, tidy([run], "operator_norm", "edge", "gd_edge"), size=1.3)
        buffer = io.StringIO()
        canvas.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    return re.sub(r"\n\s*", "\n", svg.replace(FOREGROUND, EITHER).replace("<svg", '<svg role="img"', 1)).strip() + "\n"
