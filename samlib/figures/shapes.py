"""Two shapes that many pages need: panels that use the page's width and stack on a phone, and the forest plot."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from ..claims import Verdict
from ..runs import Run
from .style import COLOURS, FOREGROUND, LEAST, STYLE, Figure, drawing, plain_log, render

__all__ = ["SHOWN", "forest", "legend", "panels"]

# Verdicts by word, shape and colour.
SHOWN = {
    "reproduced": ("●", "#1b7f5f"),
    "partly": ("◐", "#a86a00"),
    "not reproduced": ("○", "#b3403a"),
    "not recorded": ("–", "#777777"),
}


def panels(
    draws: Mapping[str, Callable[[Axes], None]],
    *,
    name: str,
    alt: str,
    caption: str,
    data: pd.DataFrame,
    runs: Sequence[Run] = (),
    key: Mapping[str, str] | None = None,
    size: tuple[float, float] = (3.4, 2.5),
    share_x: bool = True,
    share_y: bool = True,
    log: bool = False,
) -> Figure:
    """A grid of panels, as many beside each other as the page is wide for; one below the other on a phone.

    Args:
        draws: for each panel its title and what draws it on its axes.
        name: file name of the data, without extension.
        alt: what the picture shows.
        caption: the line under it.
        data: what is drawn.
        runs: the runs behind it.
        key: names in their colours, above the panels.
        size: of a panel, in inches; text is drawn at 10 points.
        share_x, share_y: give all panels the same range.
        log: the vertical scale is logarithmic: with plain numbers, few of them.
    """
    with mpl.rc_context(STYLE):
        canvases = []
        for title, draw in draws.items():
            canvas = Canvas(figsize=size, layout="constrained")
            axis = canvas.subplots()
            draw(axis)
            axis.set_title(title)
            canvases.append((title, canvas, axis))
        for shared, get, put in (
            (share_x, Axes.get_xlim, Axes.set_xlim),
            (share_y, Axes.get_ylim, Axes.set_ylim),
        ):
            if shared:
                limits = np.array([get(axis) for _, _, axis in canvases])
                for _, _, axis in canvases:
                    put(axis, limits[:, 0].min(), limits[:, 1].max())
        if log:
            for _, _, axis in canvases:
                plain_log(axis)
        words = _shared_words([axis for _, _, axis in canvases])
        pictures = "".join(f"<div>{render(canvas, f'{alt}: {title}')}</div>" for title, canvas, _ in canvases)
    least = f"--panel:{LEAST * 72 * size[0]:.0f}px"
    return Figure(
        f'{legend(key or {})}{words}<div class="samlib-panels" style="{least}">{pictures}</div>',
        alt,
        caption,
        data,
        tuple(runs),
        name,
        wide=len(canvases) > 2,
    )


def _shared_words(axes: Sequence[Axes]) -> str:
    """What the axes of all panels have in common is said once, above them, and taken off the panels."""
    if len(axes) < 2:
        return ""
    ways: list[tuple[str, Callable[[Axes], str], Callable[[Axes, str], Any]]] = [
        ("↑", Axes.get_ylabel, Axes.set_ylabel),
        ("→", Axes.get_xlabel, Axes.set_xlabel),
    ]
    said = []
    for arrow, get, put in ways:
        if len(labels := {get(axis) for axis in axes}) == 1 and (label := labels.pop()):
            said.append(f"{arrow} {html.escape(label)}")
            for axis in axes:
                put(axis, "")
    return f'<p class="samlib-axes">{" &emsp; ".join(said)}</p>' if said else ""


def legend(names: Mapping[str, str]) -> str:
    """Names with their colours, as HTML: the line has the colour, the words that of the page."""
    spans = "".join(
        f'<span><b aria-hidden="true" style="color:{colour}">━</b> {html.escape(name)}</span>'
        for name, colour in names.items()
    )
    return f'<p class="samlib-key">{spans}</p>' if spans else ""


def forest(verdict: Verdict, label: Callable[[Any], str] | None = None, log: bool = False) -> Figure:
    """A verdict as a picture: the statistic of every unit, a row per setting, with the interval over all and the band
    of values that support the claim.

    Args:
        verdict: with units.
        label: the name of a unit's row; by default its labels without the seed.
        log: a logarithmic scale.
    """
    details, column, claim = verdict.details, verdict.statistic, verdict.claim
    names = [c for c in list(details)[1 : list(details).index(column)] if c != "seed"]

    def usual(row: Any) -> str:
        return ", ".join(row[n] if isinstance(row[n], str) else f"{n} = {row[n]:g}" for n in names)

    rows = details.apply(label or usual, axis=1) if len(details) else pd.Series(dtype=str)
    order = list(dict.fromkeys(rows))
    low, high = claim.band
    words = textwrap.wrap(claim.statistic, 80)

    def draw(canvas: Canvas) -> pd.DataFrame:
        axis = canvas.subplots()
        for place, name in enumerate(order):
            chosen = details[rows == name]
            for outcome, held in (("reproduced", chosen.supports), ("not reproduced", ~chosen.supports)):
                colour, full = SHOWN[outcome][1], outcome == "reproduced"
                values = chosen[column][held]
                face = colour if full else "none"
                axis.scatter(
                    values, [place] * len(values), s=34, facecolors=face, edgecolors=colour, alpha=0.8, zorder=3
                )
        last = len(order)
        if np.isfinite([verdict.low, verdict.high]).all():
            axis.plot([verdict.low, verdict.high], [last, last], color=FOREGROUND, linewidth=2)
        axis.plot([verdict.value], [last], "D", color=FOREGROUND, markersize=7)
        if log:
            axis.set_xscale("log")
        if finite := [end for end in (low, high) if np.isfinite(end)]:
            # A band that no unit lies in is shown all the same.
            axis.update_datalim([(end, 0) for end in finite], updatey=False)
            axis.autoscale_view(scaley=False)
            left, right = axis.get_xlim()
            axis.axvspan(max(low, left), min(high, right), color=COLOURS["loss"], alpha=0.13, linewidth=0, zorder=0)
            axis.set_xlim(left, right)
        axis.set_yticks([*range(last), last], [*order, "all"])
        axis.set_ylim(last + 0.5, -0.5)
        axis.set_xlabel("\n".join(words))
        return details

    shape, _ = SHOWN[verdict.outcome]
    caption = (
        f"{html.escape(claim.text)} <strong>{shape} {verdict.outcome}</strong>: {verdict.supporting} of "
        f"{verdict.total}, the full dots. Wanted: {html.escape(claim.threshold)} (the band). The diamond is over all, "
        "with its 95 % interval."
    )
    alt = f"Forest plot of {column} for {verdict.total} units: {verdict.outcome}"
    size = (7.0, 0.9 + 0.28 * (len(order) + 1) + 0.2 * len(words))
    return drawing(draw, size, f"{claim.key}_{verdict.experiment}", alt, caption)
