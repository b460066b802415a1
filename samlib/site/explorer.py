"""The trajectory explorer: a page in which the reader picks published runs and sees what was measured along them.

The charts are Altair's; the Vega libraries stand in the page itself, so it works from a file and asks no other host for
anything. The controls, and what ties them to the charts, are in ``explorer.html`` beside this file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np
import pandas as pd
from IPython.display import HTML

from ..claims import last_half
from ..experiments import PROFILES, title
from ..figures import COLOURS, LABELS, changed, command, leading
from ..runs import Run

__all__ = ["MOST_POINTS", "cells", "explore", "groups", "overview", "thin", "trajectories"]

MOST_POINTS = 1000  # per curve
MOST_VALUES = 180_000  # in the page, so that with the libraries it stays below 3 MB

# One panel below the other: the quantities, the title of the axis, whether its scale can be logarithmic.
PANELS = (
    (("operator_norm", "edge", "gd_edge"), "curvature", True),
    (("loss",), "training loss", True),
    (("grad_alignment", "sam_grad_alignment"), "|cos| with eigenvector", False),
)
QUANTITIES = tuple(quantity for panel in PANELS for quantity in panel[0])


def explore(experiments: dict[str, Sequence[Run]]) -> HTML:
    """The explorer for the published runs of some experiments, as one piece of HTML; empty experiments are left out."""
    lengths = np.array([len(run.measurements) for runs in experiments.values() for run in runs])
    most = MOST_POINTS
    while np.minimum(lengths, most).sum() * (len(QUANTITIES) + 1) > MOST_VALUES:
        most = most * 9 // 10
    data = [group for name, runs in experiments.items() for group in groups(name, runs, most)]
    if not data:
        return HTML("<p>No runs are published yet, so there is nothing to explore.</p>")
    content = {
        "groups": data,
        "panels": [panel[0] for panel in PANELS],
        "labels": LABELS,
        "overview": overview().to_dict(),
        "trajectories": trajectories().to_dict(),
    }
    # "<" could end the script element that holds the data.
    encoded = json.dumps(content, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    page = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    return HTML(page.replace("@DATA@", encoded).replace("@VEGA@", _vega()))


def groups(experiment: str, runs: Sequence[Run], most: int = MOST_POINTS) -> list[dict[str, Any]]:
    """Runs that differ in η, ρ and seed alone, as plain values for the page; the grid of the claims comes first.

    Each group has a ``key``, which links use, a ``label``, its ``cells`` and its ``runs``, whose measurements are
    rounded to six digits; what is not finite is None.
    """
    found: dict[tuple[int, str], list[Run]] = {}
    for run in runs:
        found.setdefault((PROFILES.index(run.config.profile), ", ".join(changed(run))), []).append(run)
    standard = (PROFILES.index(leading(runs)), "")
    result = []
    for rank, settings in sorted(found, key=lambda place: (place != standard, place)):
        members = found[rank, settings]
        size = ", ".join(filter(None, [PROFILES[rank], settings]))
        key = experiment if (rank, settings) == standard else f"{experiment}:{size.replace(', ', ':')}"
        label = f"{title(experiment)} ({size})"
        result.append(
            {"key": key, "label": label, "cells": cells(members), "runs": [_plain(run, most) for run in members]}
        )
    return result


def cells(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The grid of (η, ρ): the median over finished runs of the last-half median ``edge_ratio``, and what diverged."""
    places: dict[tuple[float, float], list[Run]] = {}
    for run in runs:
        places.setdefault((run.config.learning_rate, run.config.rho), []).append(run)
    result = []
    for (learning_rate, rho), members in sorted(places.items()):
        ratios = [last_half(run).edge_ratio.median() for run in members if run.outcome == "finished"]
        ratio = float(np.median(ratios)) if ratios else None
        diverged = len(members) - len(ratios)
        text = "diverged" if ratio is None else f"{ratio:.2f}" + ("*" if diverged else "")
        place = {"learning_rate": learning_rate, "rho": rho, "edge_ratio": ratio, "text": text}
        result.append({**place, "runs": len(members), "diverged": diverged})
    return result


def thin(rows: pd.DataFrame, most: int) -> pd.DataFrame:
    """At most so many rows, evenly spaced, with the first and the last."""
    if len(rows) <= most:
        return rows
    return rows.iloc[np.linspace(0, len(rows) - 1, most).round().astype(int)]


def _plain(run: Run, most: int) -> dict[str, Any]:
    rows = thin(run.measurements, most)
    config = run.config
    return {
        "id": run.id,
        "learning_rate": config.learning_rate,
        "rho": config.rho,
        "seed": config.seed,
        "diverged": int(run.last.step) if run.outcome == "diverged" else None,
        "command": command(run),
        "step": rows.step.tolist(),
        # At ρ = 0 there is no SAM gradient, and the SAM edge is the other one.
        **{name: [_rounded(value) for value in rows.get(name, [np.nan] * len(rows))] for name in QUANTITIES},
    }


def _rounded(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


def overview() -> alt.LayerChart:
    """The grid as a heatmap, to be filled with ``cells``, each with ``selected``; a click signals ``cell``."""
    base = alt.Chart(alt.NamedData(name="cells")).encode(
        x=alt.X("rho:O", title="ρ", axis=alt.Axis(labelAngle=0, domain=False, ticks=False)),
        y=alt.Y("learning_rate:O", title="η", sort="descending", axis=alt.Axis(domain=False, ticks=False)),
    )
    tooltip = [
        alt.Tooltip("learning_rate:Q", title="η"),
        alt.Tooltip("rho:Q", title="ρ"),
        alt.Tooltip("edge_ratio:Q", title="‖H‖ / edge", format=".3f"),
        alt.Tooltip("runs:Q"),
        alt.Tooltip("diverged:Q"),
    ]
    # Blue is below the edge, orange above; equally far in ratio is equally strong.
    scale = alt.Scale(type="log", domain=[0.5, 1, 2], range=["#2f6fa8", "#f3efe6", "#c4560f"], clamp=True)
    tiles = (
        base.mark_rect(cursor="pointer", cornerRadius=3)
        .encode(
            color=alt.condition(
                alt.datum.edge_ratio != None,  # noqa: E711  (an expression of Vega's, not a comparison)
                alt.Color("edge_ratio:Q", scale=scale, legend=None),
                alt.value("#8a8a8a"),
            ),
            tooltip=tooltip,
        )
        .add_params(alt.selection_point(name="cell", fields=["learning_rate", "rho"], on="click", clear=False))
    )
    chosen = base.transform_filter("datum.selected").mark_rect(
        filled=False, stroke="#c2185b", strokeWidth=3, cornerRadius=3
    )
    pale = "isValid(datum.edge_ratio) && abs(log(datum.edge_ratio)) < 0.45"
    text = base.mark_text(fontSize=13, fontWeight="bold").encode(
        text="text:N",
        color=alt.condition(pale, alt.value("#1a1a1a"), alt.value("white")),
        tooltip=tooltip,
    )
    return _themed(alt.layer(tiles, chosen, text).properties(height=alt.Step(44)))


def trajectories() -> alt.VConcatChart:
    """Three panels over the same steps, to be filled with ``points``: step, seed, quantity, value and, for one point of
    each quantity, its ``label``. They move together, and the rule stands at the step ``at`` in each.
    """
    views = [f"{panel[0][0]}_{i}" for i, panel in enumerate(PANELS)]  # Altair numbers the views of a concatenation
    hover = alt.PointSelectionConfig(
        type="point", fields=["step"], on="pointerover", nearest=True, clear="pointerout", resolve="global"
    )
    # Dragging moves the steps, Ctrl and the wheel (or a pinch on a touchpad) enlarge them; the page still scrolls.
    drag = "[pointerdown[event.pointerType === 'mouse'], window:pointerup] > window:pointermove!"
    steps = alt.IntervalSelectionConfig(
        type="interval", encodings=["x"], zoom="wheel![event.ctrlKey]", translate=drag, resolve="global"
    )
    params = [
        alt.VariableParameter(name="at", value=-1),
        alt.TopLevelSelectionParameter(name="hover", select=hover, views=views),
        alt.TopLevelSelectionParameter(name="steps", select=steps, bind="scales", views=views),
    ]
    charts = [_panel(*panel) for panel in PANELS]
    return _themed(alt.vconcat(*charts, spacing=14, params=params).resolve_scale(x="shared", color="shared"))


def _panel(quantities: tuple[str, ...], title: str, log: bool) -> Any:
    last = quantities == PANELS[-1][0]
    y_scale = alt.Scale(type="log", nice=False, padding=20) if log else alt.Scale(domain=[0, 1])
    palette = alt.Scale(domain=list(QUANTITIES), range=[COLOURS[name] for name in QUANTITIES])
    x_axis = alt.Axis(labels=last, ticks=last, tickCount=6, labelOverlap=True, title="step" if last else None)
    base: Any = (
        alt.Chart(alt.NamedData(name="points"))
        .transform_filter(alt.FieldOneOfPredicate(field="quantity", oneOf=list(quantities)))
        .encode(
            x=alt.X("step:Q", axis=x_axis, scale=alt.Scale(nice=False)),
            y=alt.Y("value:Q", title=title, scale=y_scale, axis=alt.Axis(tickCount=5)),
            color=alt.Color("quantity:N", scale=palette, legend=None),
        )
    )
    lines = base.mark_line(strokeWidth=1.6, opacity=0.85, clip=True).encode(
        detail="seed:N",
        strokeDash=alt.condition(alt.datum.quantity == "gd_edge", alt.value([5, 3]), alt.value([1, 0])),
    )
    # Written out: Vega-Lite 6.4 loses the words of an encoded tooltip where the nearest point answers for the pointer.
    of = "(datum.datum || datum)"
    tooltip = f"{{title: {of}.name, value: format({of}.value, '.4~g'), step: {of}.step, seed: {of}.seed}}"
    points = (
        base.mark_point(filled=True, size=45, clip=True, tooltip=alt.expr(tooltip))
        .encode(opacity=alt.condition("datum.step === at", alt.value(1), alt.value(0)))
        .properties(name=quantities[0])  # the view in which the pointer selects
    )
    rule = (
        alt.Chart(alt.NamedData(name="points"))
        .transform_filter("datum.step === at")
        .transform_aggregate(step="max(step)")
        .mark_rule(color="#8a8a8a", clip=True)
        .encode(x="step:Q")
    )
    # The SAM edge and the gradient's alignment lie below what they are compared with.
    below = "indexof(['edge', 'grad_alignment'], datum.quantity) >= 0 ? 16 : -10"
    aside = "datum.end ? 'right' : 'center'"
    labels = (
        base.transform_filter("isValid(datum.label)")
        .mark_text(fontWeight="bold", fontSize=12, dy=alt.expr(below), align=alt.expr(aside))
        .encode(text="label:N")
    )
    return alt.layer(rule, lines, points, labels).properties(height=190 if len(quantities) > 1 else 120)


def _themed(chart: Any) -> Any:
    """In the page's text colour, whatever the theme: SVG knows it as ``currentColor``."""
    ink = "currentColor"
    axis = {"labelColor": ink, "titleColor": ink, "domainColor": ink, "tickColor": ink, "gridColor": ink}
    plain = {"gridOpacity": 0.12, "titleFontWeight": "normal", "labelFontSize": 12, "titleFontSize": 13}
    return (
        chart.configure(background="transparent", font="inherit", aria=False)
        .configure_axis(**axis, **plain)
        .configure_axisY(minExtent=46)
        .configure_view(stroke=None)
    )


def _vega() -> str:
    """Vega, Vega-Lite and Vega-Embed in one piece of JavaScript, in a scope of their own."""
    import vl_convert

    major, minor, _ = alt.SCHEMA_VERSION.split(".")
    bundle = vl_convert.javascript_bundle(vl_version=f"{major}.{minor}")  # type: ignore[call-arg]
    return f"(() => {{{bundle}}})();"
