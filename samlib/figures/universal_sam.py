"""Pictures of the chapter on the universal class, from its recorded runs; its toy problems are beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from ..runs import Run
from .shapes import panels
from .style import COLOURS, Figure, drawing

if TYPE_CHECKING:
    Runs = Mapping[tuple[str, int], Run]

__all__ = ["edges", "kinks", "measures", "mechanism", "price"]

MEASURES = {
    "eigenvalue_1": "λ_max",
    "trace": "tr H",
    "frobenius_norm": "‖H‖_F",
    "log_determinant": "log det(I + H)",
}
BLUE, GREY = COLOURS["operator_norm"], COLOURS["gd_edge"]


def _dots(axis: Axes, frame: pd.DataFrame, column: str, rows: Sequence[str], own: Callable[[str], bool]) -> None:
    """A row for each rule and a dot for each seed; a filled diamond where ``own`` says so."""
    for place, name in enumerate(rows):
        values = frame[frame.rule == name][column].dropna()
        mine = own(name)
        face = BLUE if mine else "none"
        axis.plot(values, [place] * len(values), "D" if mine else "o", color=BLUE, markerfacecolor=face, markersize=6)
        if not len(values):
            axis.text(0.5, place, "loss not reached", va="center")
    axis.set_yticks(range(len(rows)), rows)
    axis.set_ylim(len(rows) - 0.5, -0.5)


def measures(table: pd.DataFrame, own: Mapping[str, str], runs: Sequence[Run], level: float) -> Figure:
    """Four measures at equal loss, over those of gradient descent: a panel each, a row per rule, a dot per seed.

    Args:
        table: columns rule, seed and the four measures, as ratios.
        own: the column of the measure that a rule is about.
        runs: behind it.
        level: the training loss of the comparison.
    """
    rows = list(dict.fromkeys(table.rule))

    def panel(column: str) -> Callable[[Axes], None]:
        def draw(axis: Axes) -> None:
            axis.axvline(1, color=GREY, linestyle=(0, (5, 2)))
            _dots(axis, table, column, rows, lambda name: own.get(name) == column)

        return draw

    means = table.groupby("rule", sort=False)[list(MEASURES)].mean()
    alt = "Ratios to gradient descent of " + "; ".join(
        f"{label}: " + ", ".join(f"{rule} {value:.2f}" for rule, value in means[column].items())
        for column, label in MEASURES.items()
    )
    caption = (
        f"Each measure at training loss {level:g}, over that of gradient descent (1) from the same initial weights; "
        "a dot per seed. A filled diamond is the measure that the rule is named for."
    )
    draws = {label: panel(column) for column, label in MEASURES.items()}
    size = (4.2, 0.32 * len(rows) + 0.9)
    return panels(draws, name="measures", alt=alt, caption=caption, data=table, runs=runs, size=size)


def price(table: pd.DataFrame, runs: Sequence[Run]) -> Figure:
    """What a rule spends, and how far its own measure falls, each over those of SAM.

    Args:
        table: columns rule, seed, ratio and cost.
        runs: behind it.
    """

    def draw(canvas: Canvas) -> pd.DataFrame:
        axis = canvas.subplots()
        axis.axvline(1, color=GREY, linestyle=(0, (5, 2)))
        axis.axhline(1, color=GREY, linestyle=(0, (5, 2)))
        falling = sorted(table.groupby("rule"), key=lambda group: -group[1].ratio.mean())
        for number, (name, part) in enumerate(falling):
            axis.plot(part.cost, part.ratio, "o", color=BLUE)
            above = number % 2 == 0  # of neighbours one above and one below
            place = (float(part.cost.mean()), float(part.ratio.max() if above else part.ratio.min()))
            axis.annotate(str(name), place, (0, 9 if above else -18), textcoords="offset points", ha="center")
        axis.set(xscale="log", xlabel="gradients / those of SAM", ylabel="own measure / that of SAM")
        axis.set_xticks([0.5, 1, 2, 3], ["0.5", "1", "2", "3"], minor=False)
        axis.minorticks_off()
        axis.margins(0.18, 0.15)
        return table

    below = table[(table.ratio < 1) & (table.cost <= 1)]
    alt = f"Own measure against gradients, both over SAM's, for {len(table)} runs: {len(below)} lie below 1 in both"
    caption = (
        "The measure that a rule is named for, and the gradients it took to the same training loss, each over those of "
        "SAM with ρ = 0.1. Below left of the dashed lines a rule would beat SAM at its own price."
    )
    return drawing(draw, (6.4, 3.6), "price", alt, caption, runs)


def mechanism(table: pd.DataFrame, runs: Sequence[Run], bounds: tuple[float, float], level: float) -> Figure:
    """‖H‖_F of the published settings and of each of their terms, over that of SGD.

    Args:
        table: columns rule, seed, ratio and test.
        runs: behind it.
        bounds: what the claim wants of the term alone, and of the published settings.
        level: the training loss of the comparison.
    """
    rows = list(dict.fromkeys(table.rule))

    def draw(canvas: Canvas) -> pd.DataFrame:
        axis = canvas.subplots()
        axis.axvline(1, color=GREY, linestyle=(0, (5, 2)))
        for bound in bounds:
            axis.axvline(bound, color=COLOURS["loss"], linewidth=0.8)
        _dots(axis, table, "ratio", rows, lambda name: name == "Frobenius, published")
        axis.set_xlabel("‖H‖_F / that of SGD")
        return table

    means = table.groupby("rule", sort=False).ratio.mean()
    alt = "‖H‖_F over that of SGD: " + ", ".join(f"{rule} {value:.2f}" for rule, value in means.items())
    caption = (
        f"‖H‖_F at training loss {level:g} over that of SGD with the same seed; deep network, cross-entropy, published "
        f"ρ, λ and n. Thin lines: the claim wants the diamonds left of {bounds[1]}, the Frobenius term right of "
        f"{bounds[0]}."
    )
    return drawing(draw, (6.6, 0.32 * len(rows) + 1), "mechanism", alt, caption, runs)


def kinks(runs: Runs, radii: Sequence[float]) -> Figure:
    """The trace as perturbations of a radius see it, over that of the Hessian: a panel per network, a line per run."""
    records = [
        {
            "network": name,
            "seed": seed,
            "step": int(row.step),
            "rho": rho,
            "ratio": row[f"sampled_trace_{rho:g}"] / row.trace,
        }
        for (name, seed), run in runs.items()
        for _, row in run.measurements.iterrows()
        for rho in radii
    ]
    table = pd.DataFrame(records)
    last = int(table.step.max())

    def panel(name: str) -> Callable[[Axes], None]:
        def draw(axis: Axes) -> None:
            for step, style in ((0, (0, (1, 1.5))), (last, "-")):
                part = table[(table.network == name) & (table.step == step)]
                for _, line in part.groupby("seed"):
                    axis.plot(line.rho, line.ratio, "o", linestyle=style, color=BLUE, markersize=4)
            axis.axhline(1, color=GREY, linestyle=(0, (5, 2)))
            axis.set(xscale="log", yscale="log", xlabel="radius ρ", ylabel="sampled trace / tr H")
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter("{x:g}")

        return draw

    least = table[table.rho == min(radii)].groupby(["network", "step"]).ratio.mean().reset_index()
    alt = f"Sampled trace over tr H at ρ = {min(radii):g}: " + ", ".join(
        f"{row.network} at step {row.step}: {row.ratio:.2f}" for row in least.itertuples()
    )
    caption = (
        "The trace that perturbations of radius ρ see, over that of the Hessian. Dotted: initial weights; solid: after "
        f"{last} steps of gradient descent. A line per seed."
    )
    draws = {name: panel(name) for name in dict.fromkeys(table.network)}
    return panels(draws, name="kinks", alt=alt, caption=caption, data=table, runs=list(runs.values()))


def edges(table: pd.DataFrame, runs: Sequence[Run]) -> Figure:
    """At which edge each rule trains: λ_max of the loss and of the rule's own objective, over 2/η.

    Args:
        table: columns rule, seed, sharpness, own, ratio (to the rule's own law) and outcome.
        runs: behind it.
    """
    rows = list(dict.fromkeys(table.rule))
    looks: dict[str, dict[str, Any]] = {
        "sharpness": {"marker": "o", "color": BLUE, "label": "λ_max of the loss"},
        "own": {"marker": "D", "color": COLOURS["edge"], "label": "λ_max of the rule's own objective"},
    }

    def draw(canvas: Canvas) -> pd.DataFrame:
        axis = canvas.subplots()
        axis.axvline(1, color=GREY, linestyle=(0, (5, 2)))
        for column, look in looks.items():
            places = [rows.index(name) + (0.18 if column == "own" else -0.18) for name in table.rule]
            axis.scatter(table[column], places, s=34, linewidths=0, **look)
        for place, name in enumerate(rows):
            lost = (table[table.rule == name].outcome == "diverged").sum()
            if lost:
                axis.text(1.0, place, f" {lost} diverged", va="center")
        axis.set_yticks(range(len(rows)), rows)
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.set_xlabel("λ_max / (2/η)")
        canvas.legend(loc="outside upper left", ncols=2, frameon=False)
        return table

    means = table.groupby("rule", sort=False)[["sharpness", "own"]].mean()
    alt = "λ_max over 2/η, of the loss and of the own objective: " + "; ".join(
        f"{name} {row.sharpness:.2f}" + (f" and {row.own:.2f}" if np.isfinite(row.own) else "")
        for name, row in means.iterrows()
    )
    caption = (
        "Medians over the last half of training, a dot per seed. At 1 an objective is at the edge of gradient descent. "
        "SAM and what has no law in the mean have no own objective."
    )
    return drawing(draw, (6.8, 0.42 * len(rows) + 1.2), "own_edges", alt, caption, runs)
