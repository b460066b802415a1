"""Pictures of the toy problems of the universal class: resting places, flows and drifts beside their theory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from ..toys.universal import HYPERBOLA_RULES, hyperbola_flow
from .shapes import panels
from .style import COLOURS, FOREGROUND, Figure, drawing

__all__ = ["drift", "hyperbola", "resting_places", "rule"]

BLUE, GREY = COLOURS["operator_norm"], COLOURS["gd_edge"]


def rule(name: Any) -> str:
    """How pages call a rule of the toys: GD, SAM, Frobenius, trace, determinant."""
    return {"gd": "GD", "sam": "SAM", "frobenius": "Frobenius"}.get(name, str(name))


def _kinds(table: pd.DataFrame) -> pd.Series:
    """Rule, directions and their number, in words."""
    return table.name.map(rule) + np.where(table.paired, ", paired", ", plain") + ", n = " + table.samples.astype(str)


def resting_places(table: pd.DataFrame) -> Figure:
    """Where each rule rests in the valley, beside theory: a panel per measure, a row per rule."""
    names = {"frobenius_norm": "‖H‖_F", "trace": "tr H", "log_determinant": "log det(I + H)", "sharpness": "λ_max"}
    shown = table[table.beta == 1.0]

    def panel(measure: str) -> Callable[[Axes], None]:
        part = shown[shown.measure == measure]
        kinds = _kinds(part).where(part.name != "sam", "SAM")

        def draw(axis: Axes) -> None:
            rows = list(dict.fromkeys(kinds))
            axis.axvline(part.theory.iloc[0], color=GREY, linestyle=(0, (5, 2)))
            for place, kind in enumerate(rows):
                chosen = part[kinds == kind]
                axis.errorbar(
                    *(chosen.u, np.full(len(chosen), place)),
                    xerr=chosen.wander,
                    fmt="o",
                    color=BLUE,
                    alpha=0.7,
                    elinewidth=0.8,
                )
            axis.set_yticks(range(len(rows)), rows)
            axis.set_ylim(len(rows) - 0.4, -0.6)
            axis.set_xlabel("u")

        return draw

    draws = {f"{names[m]}: least at u = {place(shown, m):.3f}": panel(m) for m in names if m in set(shown.measure)}
    by = ["measure", "name", "samples", "paired"]
    middle = shown.groupby(by, sort=False).u.mean().reset_index().rename(columns={"name": "name_"})
    alt = "Resting places in the valley. " + "; ".join(
        f"{rule(row.name_)} of {row.samples} {'paired' if row.paired else 'plain'}: {row.u:.3f}"
        for row in middle.itertuples()
    )
    caption = (
        "Mean of u over the second half of the path, from u = 0.6 and from −0.9, for each seed; bars: how far a path "
        "wanders about it. Dashed: where the measure is least."
    )
    options: dict[str, Any] = {"name": "resting_places", "alt": alt, "caption": caption, "data": table}
    return panels(draws, **options, share_y=False, size=(4.1, 2.1))


def place(table: pd.DataFrame, measure: str) -> float:
    """Where theory puts the least value of a measure."""
    return float(table[table.measure == measure].theory.iloc[0])


def hyperbola(table: pd.DataFrame) -> Figure:
    """tr H along the hyperbola beside the tangential flow."""
    followed = table[table.flow.notna()]
    settled = float(table[table.name == "gd"].trace.iloc[0])

    def panel(key: tuple[Any, ...], part: pd.DataFrame) -> Callable[[Axes], None]:
        follows = next(r for r in HYPERBOLA_RULES if (r.name, r.paired, r.strength) == key)
        assert follows.sharpness is not None
        steps = np.linspace(0, part.steps.max(), 60)
        times = (follows.learning_rate * steps[1:]).tolist()
        flow = hyperbola_flow(follows.sharpness, follows.pull, settled, times)

        def draw(axis: Axes) -> None:
            axis.plot(steps, [settled, *flow], color=GREY, linestyle=(0, (5, 2)))
            axis.errorbar(part.steps, part.trace, yerr=part.trace_sd, fmt="o", color=BLUE, markersize=5)
            axis.axhline(2, color=FOREGROUND, linewidth=0.6)
            axis.set(xlabel="steps", ylabel="tr H")

        return draw

    draws = {
        f"{rule(name)}, {'paired' if paired else 'plain'}, λ = {strength:g}": panel((name, paired, strength), part)
        for (name, paired, strength), part in followed.groupby(["name", "paired", "strength"], sort=False)
    }
    away = float((followed.trace / followed.flow - 1).abs().max())
    alt = f"tr H along the hyperbola for four rules, and the tangential flow; they differ by {away:.1%} of it at most"
    caption = (
        "tr H along the minima xy = 1, mean and deviation over copies, for each seed. Dashed: the flow along the "
        f"manifold, dw/dt = −λρ² grad S. Gradient descent stays at {settled:.2f}; the least possible is 2."
    )
    size = (3.4, 2.4)
    return panels(draws, name="hyperbola", alt=alt, caption=caption, data=table, share_x=False, size=size)


def drift(table: pd.DataFrame, band: tuple[float, float]) -> Figure:
    """Slope of the mean update on the gradient of the measure, on a manifold of minima."""
    chosen = table[table.rho == 0.01]
    kinds = _kinds(chosen)
    rows = list(dict.fromkeys(kinds))

    def draw(canvas: Canvas) -> pd.DataFrame:
        axis = canvas.subplots()
        axis.axvspan(*band, color=COLOURS["loss"], alpha=0.13, linewidth=0)
        for place, kind in enumerate(rows):
            part = chosen[kinds == kind]
            heights = place + np.linspace(-0.2, 0.2, len(part))
            axis.errorbar(part.slope, heights, xerr=2 * part.slope_error, fmt="o", color=BLUE, markersize=5)
        axis.axvline(1, color=GREY, linestyle=(0, (5, 2)))
        axis.set_yticks(range(len(rows)), rows)
        axis.invert_yaxis()
        axis.set_xlabel("slope of the mean update on ∇S")
        return table

    means = chosen.groupby(kinds, sort=False).slope.mean()
    alt = "Slope of the mean update on the gradient of the measure: " + ", ".join(
        f"{k} {v:.2f}" for k, v in means.items()
    )
    caption = (
        "Slope of the mean tangential update on the gradient of the stated measure at ρ = 0.01, with two standard "
        "errors, for each seed. The band is that of the claim, for Frobenius. From few directions the determinant "
        "leans to the trace."
    )
    return drawing(draw, (6.6, 0.3 * len(rows) + 1), "drift", alt, caption)
