"""Pictures of the stochastic edge: from what is read off the recorded runs, one row each, and from toy problems.

The tables of runs are those of :func:`samlib.claims.stochastic_runs.ends`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes

from ..runs import Run
from .shapes import SHOWN, panels
from .style import COLOURS, FOREGROUND, Figure, plain_log

__all__ = ["quadratic", "rates", "sam", "settling", "sharpening", "thresholds"]

KERNEL, TRACE = "#7b5fc0", "#6f8f2f"
DASHED = (0, (4, 3))


def settling(table: pd.DataFrame, runs: Sequence[Run]) -> Figure:
    """What is at 1 when training ends, for each batch size: ηλ/2, K or ηλ_gen/2."""
    shown = {
        "edge of gradient descent, ηλ/2": ("edge_ratio", COLOURS["operator_norm"]),
        "kernel norm, K": ("kernel", KERNEL),
        "stochastic edge, ηλ_gen/2": ("sgd_edge_ratio", COLOURS["edge"]),
    }

    def draw(column: str, colour: str) -> Any:
        def on(axis: Axes) -> None:
            start, end = (table[table[n].between(0, np.inf, "neither")] for n in (f"first_{column}", column))
            axis.scatter(start.batch_size, start[f"first_{column}"], s=22, facecolors="none", edgecolors=colour)
            axis.scatter(end.batch_size, end[column], s=22, c=colour, linewidths=0)
            median = end.groupby("batch_size")[column].median()
            axis.plot(median.index, median, color=colour)
            _at_one(axis)
            _batch_axis(axis, table)
            axis.set_yscale("log")
            plain_log(axis)

        return on

    names = ["run_id", "batch_size", "seed", "trained"]
    columns = [f"{start}{column}" for column, _ in shown.values() for start in ("first_", "")]
    ends = table[table.batch_size.between(2, 4)].groupby("batch_size")[["edge_ratio", "sgd_edge_ratio"]].median()
    words = "; ".join(f"B = {b}: {r.edge_ratio:.2f} and {r.sgd_edge_ratio:.2f}" for b, r in ends.iterrows())
    return panels(
        {title: draw(*what) for title, what in shown.items()},
        name="settling",
        alt="Three quantities against the batch size at the start and at the end of training; the ratios ηλ/2 and "
        f"ηλ_gen/2 end at {words}",
        caption="Open circles: initial weights. Full circles: after 3,000 steps, one per seed; the line is their "
        "median. The dashed line is 1, where each of the three would put the edge. The full batch has no noise and no "
        "K.",
        data=table[[*names, *columns]],
        runs=_of(table, runs),
    )


def sharpening(table: pd.DataFrame, runs: Sequence[Run]) -> Figure:
    """λ and trace against the batch size, over those of the full batch: one panel per learning rate."""
    series = {
        "sharpness": ("λ at the end", COLOURS["operator_norm"], "-"),
        "trace": ("trace at the end", TRACE, "-"),
        "matched_sharpness": ("λ at equal loss (dashed)", COLOURS["operator_norm"], DASHED),
    }
    learnt = table[table.trained]
    whole = learnt[learnt.batch_size == learnt.examples].set_index(["learning_rate", "seed"])
    relative = learnt.join(whole[list(series)], on=["learning_rate", "seed"], rsuffix="_of_full")
    for name in series:
        relative[name] /= relative[f"{name}_of_full"]

    def draw(rate: float) -> Any:
        def on(axis: Axes) -> None:
            part = relative[relative.learning_rate == rate]
            for name, (_, colour, dash) in series.items():
                _band(axis, part, "batch_size", name, colour, dash)
            _batch_axis(axis, table)
            axis.set(ylabel="over the full batch's", ylim=(0, None))

        return on

    ratios = {rate: relative[relative.learning_rate == rate].sharpness.min() for rate in _down(relative.learning_rate)}
    words = "; ".join(f"η = {rate:g}: down to {value:.2f}" for rate, value in ratios.items())
    return panels(
        {f"η = {rate:g}": draw(rate) for rate in ratios},
        name="sharpening",
        alt=f"Sharpness and trace of the tangent kernel against the batch size, over those of the full batch. {words}",
        caption="λ and trace of the tangent kernel, over those of the full batch of the same seed. Lines are medians "
        "over seeds, bands their range; runs that did not learn are left out. Dashed: where the training loss first is "
        "0.012.",
        data=relative[["run_id", "learning_rate", "batch_size", "seed", *series]],
        runs=_of(table, runs),
        key={label: colour for label, colour, dash in series.values() if dash == "-"},
    )


def rates(table: pd.DataFrame, runs: Sequence[Run]) -> Figure:
    """The share of seeds that learn, against three numbers that are known before training."""
    shown = {"nominal": "K_tr at the initial weights", "learning_rate": "η", "first_edge_ratio": "ηλ/2 at the start"}
    sizes, tones = sorted(set(table.batch_size)), _tones(table.batch_size)
    cells = table.groupby(["batch_size", "nominal"], as_index=False).agg(
        learnt=("trained", "mean"), seeds=("trained", "size"), **{n: (n, "median") for n in [*shown][1:]}
    )

    def draw(column: str) -> Any:
        def on(axis: Axes) -> None:
            for place, size in enumerate(sizes):
                part = cells[cells.batch_size == size]
                # A little apart, where curves of several batch sizes would hide each other.
                height = part.learnt + 0.015 * (place - len(sizes) / 2)
                axis.plot(part[column], height, "o-", color=tones[size], markersize=4)
            axis.set(xscale="log", ylabel="share of seeds that learn", ylim=(-0.08, 1.08))
            axis.xaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_major_formatter(mpl.ticker.StrMethodFormatter("{x:g}"))
            axis.xaxis.set_minor_formatter(mpl.ticker.NullFormatter())

        return on

    return panels(
        {f"against {name}": draw(column) for column, name in shown.items()},
        name="rates",
        alt="Share of seeds that learn against the initial K_tr, the learning rate and the initial ηλ/2, a curve for "
        f"each batch size from {sizes[0]} to {sizes[-1]}",
        caption="A curve per batch size. Where the curves fall together, the number on the axis foretells success.",
        data=cells,
        runs=_of(table, runs),
        key={f"B = {size}": tones[size] for size in sizes},
        share_x=False,
    )


def sam(pairs: pd.DataFrame, control: pd.DataFrame, runs: Sequence[Run]) -> Figure:
    """What SAM lowers, and what it does not show: K, trace and φηλ_gen/2 against ρ, beside a linear regression.

    Args:
        pairs: rows with ``run_id``, ``rho``, ``batch_size``, ``seed``, ``trained``; ``kernel`` and ``trace``, over
            those of ρ = 0; and ``ratio`` φηλ_gen/2.
        control: of :func:`samlib.toys.sam_noise.sam_on_regression`.
        runs: behind the pairs.
    """
    tones, learnt = _tones(pairs.batch_size), pairs[pairs.trained]
    control = control.rename(columns={"edge_ratio": "ratio"})
    shown = {
        "K over that of ρ = 0": (learnt, "kernel"),
        "trace over that of ρ = 0": (learnt, "trace"),
        "φηλ_gen/2, network": (learnt[learnt.rho > 0], "ratio"),
        "φηλ_gen/2, linear regression": (control, "ratio"),
    }

    def draw(rows: pd.DataFrame, column: str) -> Any:
        def on(axis: Axes) -> None:
            for size, tone in tones.items():
                _band(axis, rows[(rows.batch_size == size) & rows[column].notna()], "rho", column, tone, "o-")
            axis.set(xlabel="ρ", ylim=(0, None))
            _at_one(axis)

        return on

    most = learnt[learnt.rho == learnt.rho.max()]
    return panels(
        {title: draw(*what) for title, what in shown.items()},
        name="sam",
        alt="Kernel norm and trace with SAM over those without, and φηλ_gen/2 of the network and of a linear "
        f"regression, against ρ. At the largest ρ the trace is {most.trace.median():.2f} of that without SAM; "
        f"φηλ_gen/2 of the regression is {control.ratio.median():.2f}",
        caption="Medians over seeds, bands their range; runs that did not learn are left out. The last panel is the "
        "control: there the curvature is fixed, and the ratio is near 1 all the same.",
        data=pairs,
        runs=_of(pairs, runs),
        key={f"B = {size}": tone for size, tone in tones.items()},
        share_y=False,
    )


def thresholds(table: pd.DataFrame) -> Figure:
    """Linear regressions: the exact threshold over those of the kernel norm and of its trace form."""
    rows = table[table.outputs == 1].copy()
    rows["kernel"], rows["trace"] = rows.exact_rate / rows.kernel_rate, rows.exact_rate / rows.trace_rate
    tones = _tones(rows.examples)

    def draw(decay: float) -> Any:
        def on(axis: Axes) -> None:
            for size, tone in tones.items():
                part = rows[(rows.decay == decay) & (rows.examples == size)]
                _band(axis, part, "batch_size", "kernel", tone)
                axis.plot(part.groupby("batch_size").trace.median(), color=tone, linestyle=DASHED)
            _at_one(axis)
            _batch_axis(axis, rows)
            axis.set(ylabel="η* over the estimate", ylim=(0, 1.1))

        return on

    names = {0.0: "white", 0.5: "scales i^−½", 1.0: "scales i⁻¹"}
    return panels(
        {names.get(decay, f"i^−{decay:g}"): draw(decay) for decay in sorted(set(rows.decay))},
        name="thresholds",
        alt="Exact threshold of the learning rate over that of K = 1, against the batch size, for three spectra: from "
        f"{rows.kernel.min():.2f} to {rows.kernel.max():.2f}",
        caption="Largest stable learning rate η* over the one at which K = 1 (lines), and over that of the trace form "
        "or 2/λ, whichever is less (dashed). At 1 the estimate is exact; below, it promises too much.",
        data=rows,
        key={f"N = {size}": tone for size, tone in tones.items()},
    )


def quadratic(table: pd.DataFrame) -> Figure:
    """Quadratic models: which runs learn, by K_tr and ηλ/2 where the full batch ends."""
    rows = table[(table.fraction > 0) & (table.kernel_trace > 0)]

    def draw(decay: float) -> Any:
        def on(axis: Axes) -> None:
            part = rows[rows.decay == decay]
            for learnt, word in ((1, "reproduced"), (0, "not reproduced")):
                some = part[part.trained == learnt]
                axis.scatter(
                    some.full_edge_ratio,
                    some.kernel_trace,
                    s=14,
                    c=SHOWN[word][1],
                    alpha=0.6,
                    marker="o" if learnt else "x",
                )
            _at_one(axis)
            axis.set(xlabel="ηλ/2 of the full batch", ylabel="K_tr", yscale="log")
            plain_log(axis)

        return on

    return panels(
        {f"scales i^−{decay:g}" if decay else "white": draw(decay) for decay in sorted(set(rows.decay))},
        name="quadratic",
        alt="Runs of the quadratic model by K_tr and ηλ/2 where the full batch ends, those that learn and those that "
        f"fail; the largest K_tr of one that learns is {rows[rows.trained == 1].kernel_trace.max():.2f}",
        caption="One mark per run: a dot learns, a cross fails.",
        data=rows,
        key={"● learns": SHOWN["reproduced"][1], "× fails": SHOWN["not reproduced"][1]},
    )


def _of(table: pd.DataFrame, runs: Sequence[Run]) -> list[Run]:
    chosen = set(table.run_id)
    return [run for run in runs if run.id in chosen]


def _down(values: pd.Series) -> list[float]:
    return sorted(set(values), reverse=True)


def _tones(sizes: pd.Series) -> dict[int, str]:
    """A tone for each size, darker for larger ones; readable on light and dark."""
    kinds = sorted(set(sizes))
    return dict(zip(kinds, map(mpl.colors.to_hex, sns.color_palette("flare", len(kinds))), strict=True))


def _band(axis: Axes, rows: pd.DataFrame, x: str, y: str, colour: str, dash: Any = "-") -> None:
    """Median over seeds as a line, their range as a band."""
    group = rows[rows[y].notna()].groupby(x)[y]
    median, marked = group.median(), dash == "o-"
    style: Any = {"marker": "o", "markersize": 4} if marked else {"linestyle": dash}
    axis.plot(median.index, median, color=colour, **style)
    axis.fill_between(median.index, group.min(), group.max(), color=colour, alpha=0.2, linewidth=0)


def _at_one(axis: Axes) -> None:
    axis.axhline(1, color=FOREGROUND, linewidth=0.8, linestyle=DASHED)


def _batch_axis(axis: Axes, table: pd.DataFrame) -> None:
    ticks = np.array(sorted(set(table.batch_size)))
    apart = ticks[np.concatenate([[True], np.diff(np.log2(ticks)) > 0.5])] if len(ticks) < 7 else ticks[::2]
    axis.set_xscale("log", base=2)
    axis.set_xticks(apart, [f"{tick:g}" for tick in apart])
    axis.xaxis.set_minor_locator(mpl.ticker.NullLocator())
    axis.set_xlabel("batch size B")
