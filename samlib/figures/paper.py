"""The paper's figures, from recorded runs."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from IPython.display import HTML
from matplotlib.axes import Axes

from ..experiments import find, title
from ..runs import Run
from ..selection import changed, edge_of, grouped, leading, ordered, tidy
from .shapes import panels
from .style import COLOURS, FOREGROUND, LABELS, Figure
from .words import mean_in_words

__all__ = [
    "alignments",
    "banner",
    "beside",
    "edge_ratios",
    "eigenvalues",
    "evaluation",
    "final_table",
    "losses",
    "norms_and_edges",
]


def beside(runs: Sequence[Run]) -> list[Figure]:
    """What is published beside the leading grid: one figure for each group of runs of another profile or size."""
    groups: dict[tuple[str, ...], list[Run]] = {}
    shown = (leading(runs),)
    for run in runs:
        place = (run.config.profile, *changed(run))
        if place != shown and run.config.eigenvalues == 1:
            groups.setdefault(place, []).append(run)
    return [norms_and_edges(groups[place]) for place in sorted(groups)]


def banner(*groups: Sequence[Run]) -> HTML:
    """A warning for the top of a page if any run used stand-in data; nothing otherwise."""
    names = sorted({run.provenance["dataset"] for runs in groups for run in runs if run.provenance["standin"]})
    text = "".join(
        '<div class="admonition warning"><p class="admonition-title">Stand-in data</p>'
        f"<p>The real data set could not be had, so the live runs below used the {html.escape(name)}. "
        "They show that the code works and do not count as results.</p></div>"
        for name in names
    )
    return HTML(text)


def norms_and_edges(runs: Sequence[Run], gd: bool = True) -> Figure:
    """Operator norm with the SAM edge, and with 2/η if ``gd``: figures (a) and (b) of the paper."""
    quantities = ["operator_norm", "edge", *(["gd_edge"] if gd else [])]
    shown = list(runs) if gd else [run for run in runs if run.config.sharpness_aware]
    names = f"operator norm of the Hessian, the {edge_of(runs)}" + (" and the GD edge 2/η" if gd else "")
    return _panels(
        shown,
        quantities,
        name="norms_and_edges" if gd else "norms_and_sam_edge",
        ylabel="curvature",
        log=True,
        alt=f"Line charts of {names} during training",
        caption="Operator norm and edges through training. "
        + ("At ρ = 0 the two edges coincide." if gd else "The same without 2/η, each panel on its own scale."),
        share_y=gd,
    )


def alignments(runs: Sequence[Run]) -> Figure:
    """|cos| of the gradient and of the SAM gradient with the principal eigenvector: figure (c) of the paper."""
    return _panels(
        [run for run in runs if run.config.sharpness_aware],
        ["grad_alignment", "sam_grad_alignment"],
        name="alignments",
        ylabel="|cos| with eigenvector",
        log=False,
        alt="Line charts of the alignment of the gradient and of the SAM gradient with the principal eigenvector",
        caption="Alignment with the principal eigenvector. The SAM gradient is the one at the perturbed point.",
        share_y=True,
    )


def losses(runs: Sequence[Run]) -> Figure:
    """Training loss: figure (d) of the paper."""
    return _panels(
        list(runs),
        ["loss"],
        name="losses",
        ylabel="training loss",
        log=True,
        alt="Line charts of the training loss",
        caption="Training loss.",
        share_y=True,
    )


def eigenvalues(runs: Sequence[Run]) -> Figure:
    """The leading eigenvalues recorded for each run, with its edge."""
    count = max(run.config.eigenvalues for run in runs)
    names = [f"eigenvalue_{i + 1}" for i in range(count)]
    palette = sns.light_palette(COLOURS["operator_norm"], count + 1, reverse=True)[:count]
    colours = dict(zip(names, map(mpl.colors.to_hex, palette), strict=True))
    digits = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")
    return _panels(
        list(runs),
        [*names, "edge"],
        name="eigenvalues",
        ylabel="curvature",
        log=True,
        alt=f"Line charts of the leading eigenvalues ({count}) and the edge",
        caption=f"Leading eigenvalues of the Hessian ({count} recorded), and the edge.",
        share_y=False,
        colours=colours,
        labels={name: "λ" + str(i + 1).translate(digits) for i, name in enumerate(names)},
    )


def edge_ratios(runs: Sequence[Run]) -> Figure:
    """``edge_ratio`` through training for a whole grid: one panel per learning rate, one line per ρ."""
    shown = ordered(runs)
    rates = sorted({run.config.learning_rate for run in shown})
    rhos = sorted({run.config.rho for run in shown})
    tones = {0.0: COLOURS["gd_edge"]} | {
        rho: mpl.colors.to_hex(c)
        for rho, c in zip([r for r in rhos if r], sns.color_palette("flare", sum(r > 0 for r in rhos)), strict=True)
    }
    data = tidy(shown, "edge_ratio")

    def panel(rate: float) -> Callable[[Axes], None]:
        def draw(axis: Axes) -> None:
            for rho in rhos:
                _band(axis, data[(data.learning_rate == rate) & (data.rho == rho)], "edge_ratio", tones[rho])
            axis.axhline(1, color=FOREGROUND, linewidth=0.8, linestyle=(0, (4, 3)))
            axis.set(xlabel="step", ylabel=LABELS["edge_ratio"], yscale="log")

        return draw

    caption = "Operator norm divided by the edge of its rule. At 1, training is at the edge of stability."
    return panels(
        {f"η = {rate:g}": panel(rate) for rate in rates},
        name="edge_ratios",
        alt="Line charts of the operator norm divided by the edge during training, for every run of the grid. "
        + _where(shown),
        caption=caption + _bands_note(shown),
        data=data,
        runs=shown,
        key={f"ρ = {rho:g}" + (" (GD)" if rho == 0 else ""): tones[rho] for rho in rhos},
        log=True,
    )


def evaluation(runs: Sequence[Run]) -> Figure:
    """Mini-batch runs: the ratio of operator norm and edge on the current mini-batch and on a larger fixed batch."""
    return _panels(
        list(runs),
        ["edge_ratio", "eval_edge_ratio"],
        name="evaluation",
        ylabel="‖H‖ / edge",
        log=True,
        alt="Line charts of the ratio of operator norm and edge on the current mini-batch and on a larger, fixed batch",
        caption="Ratio of operator norm and edge, each of one loss: that of the current mini-batch, and that of a "
        "fixed batch four times as large.",
        share_y=True,
        colours={"edge_ratio": COLOURS["operator_norm"], "eval_edge_ratio": COLOURS["loss"]},
        labels={"edge_ratio": "current mini-batch", "eval_edge_ratio": "larger fixed batch"},
    )


def final_table(runs: Sequence[Run]) -> pd.DataFrame:
    """Final loss, sharpness and test metric per (η, ρ): mean over seeds ± half the range."""
    rows = []
    for (rate, rho), group in grouped(runs):
        row: dict[str, object] = {"η": f"{rate:g}", "ρ": f"{rho:g}", "seeds": len(group)}
        finished = [run for run in group if run.outcome == "finished"]
        row["diverged"] = len(group) - len(finished)
        columns = {
            "loss": "training loss",
            "operator_norm": "‖H‖",
            "edge_ratio": "‖H‖ / edge",
            "test_metric": find(group[0].config.experiment).metric_name,
        }
        for column, label in columns.items():
            row[label] = mean_in_words([run.last[column] for run in finished])
        rows.append(row)
    return pd.DataFrame(rows)


def _panels(
    runs: list[Run],
    quantities: list[str],
    *,
    name: str,
    ylabel: str,
    log: bool,
    alt: str,
    caption: str,
    share_y: bool,
    colours: dict[str, str] | None = None,
    labels: dict[str, str] | None = None,
) -> Figure:
    """One panel per (η, ρ)."""
    if not runs:
        raise ValueError("no runs to draw: the grid has no run of the kind this figure shows")
    shown = ordered(runs)
    colours, labels = {**COLOURS, **(colours or {})}, {**LABELS, "edge": edge_of(runs), **(labels or {})}
    data = tidy(shown, *quantities)

    def panel(rate: float, rho: float, group: list[Run]) -> Callable[[Axes], None]:
        def draw(axis: Axes) -> None:
            part = data[(data.learning_rate == rate) & (data.rho == rho)]
            for quantity in quantities:
                _band(axis, part, quantity, colours[quantity])
            diverged = [run for run in group if run.outcome == "diverged"]
            if diverged:
                steps = ", ".join(f"{run.last.step:.0f}" for run in diverged)
                note = f"{len(diverged)} of {len(group)} diverged\n(step {steps})"
                axis.text(0.97, 0.95, note, transform=axis.transAxes, ha="right", va="top")
            axis.set(xlabel="step", ylabel=ylabel)
            if log:
                axis.set_yscale("log")
            else:
                axis.set_ylim(0, 1)

        return draw

    return panels(
        {f"η = {rate:g}, ρ = {rho:g}": panel(rate, rho, group) for (rate, rho), group in grouped(shown)},
        name=name,
        alt=f"{alt}. {_where(shown)}",
        caption=caption + _bands_note(shown),
        data=data,
        runs=shown,
        key={labels[quantity]: colours[quantity] for quantity in quantities},
        share_y=share_y,
        log=log,
    )


def _band(axis: Axes, data: pd.DataFrame, quantity: str, colour: str) -> None:
    """Median over seeds as a line, their range as a band."""
    by_step = data[np.isfinite(data[quantity])].groupby("step")[quantity]
    median = by_step.median()
    axis.plot(median.index, median, color=colour, linestyle=(0, (5, 2)) if quantity == "gd_edge" else "-")
    axis.fill_between(median.index, by_step.min(), by_step.max(), color=colour, alpha=0.25, linewidth=0)


def _where(runs: Sequence[Run]) -> str:
    rates, rhos = (
        ", ".join(f"{v:g}" for v in sorted({getattr(r.config, n) for r in runs})) for n in ("learning_rate", "rho")
    )
    return f"{title(runs[0].config.experiment)}, learning rates {rates}; rhos {rhos}"


def _bands_note(runs: Sequence[Run]) -> str:
    scales = sorted({" with ".join(filter(None, [run.config.profile, ", ".join(changed(run))])) for run in runs})
    profile = f" Profile: {'; '.join(scales)}."
    if any(run.provenance["standin"] for run in runs):
        profile += " <strong>Stand-in data: not a result.</strong>"
    seeds = len({run.config.seed for run in runs})
    return (f" Lines are medians over {seeds} seeds, bands their range." if seeds > 1 else "") + profile
