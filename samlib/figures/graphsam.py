"""The pictures of the chapter on GraphSAM, from its recorded runs and toys."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from ..claims.graphsam_readings import ages, differences, method, of_cycles, of_edges, of_quality, period
from ..edges import sam_edge
from ..optim import EPSILON
from ..runs import Run
from .shapes import SHOWN, panels
from .style import COLOURS, FOREGROUND, Figure, drawing, key, plain_log

__all__ = ["by_age", "costs", "directions", "edges", "oscillations", "quality", "title"]

AGES = {"0": (0, 0), "1": (1, 1), "2–3": (2, 3), "4–7": (4, 7), "8–15": (8, 15), "16 or more": (16, np.inf)}
BETAS = {0.99: COLOURS["sam_grad_alignment"], 0.0: COLOURS["grad_alignment"]}
SAM_EDGE = "#b08968"
SETS = {"esol": "ESOL", "bbbp": "BBBP", "mnist": "MNIST"}


def by_age(runs: Iterable[Run]) -> pd.DataFrame:
    """Of each mini-batch run, the mean cosine and the share of steps uphill, by the age of the direction."""
    rows = []
    for run in of_quality(runs):
        if "uphill" not in run.config.path or run.outcome != "finished":
            continue
        steps = ages(run)
        for place, (name, (low, high)) in enumerate(AGES.items()):
            part = steps[steps.age.between(low, high)]
            numbers = float(part.uphill_cosine.mean()), float((part.uphill > 0).mean()), len(part)
            rows.append((run.config.molecules, run.config.cache_beta, run.config.split, place, name, *numbers, run.id))
    columns = ["set", "beta", "split", "place", "age", "cosine", "share", "steps", "run_id"]
    return pd.DataFrame(rows, columns=columns)


def directions(runs: Iterable[Run]) -> Figure:
    """Where the cached perturbation points: its cosine with the gradient, by its age; a panel per set of molecules."""
    frame = by_age(runs)

    def panel(name: str) -> Callable[[Axes], None]:
        def draw(axis: Axes) -> None:
            axis.axhline(0, color=FOREGROUND, linewidth=0.8)
            for beta, colour in BETAS.items():
                part = frame[(frame.set == name) & (frame.beta == beta)].groupby("place").cosine
                if len(part):
                    middle = part.median()
                    axis.plot(middle.index, middle, "o-", color=colour, markersize=4)
                    axis.fill_between(middle.index, part.min(), part.max(), color=colour, alpha=0.25, linewidth=0)
            axis.set(ylim=(-1.05, 1.05), xlabel="steps since the last true gradient", ylabel="cos with the gradient")
            axis.set_xticks(range(len(AGES)), [a.replace(" or more", "+") for a in AGES])
            axis.text(0.01, 0.01, "downhill", transform=axis.transAxes, va="bottom")
            axis.text(0.99, 0.99, "uphill", transform=axis.transAxes, va="top", ha="right")

        return draw

    old = frame[frame.place >= 3].assign(total=lambda rows: rows.cosine * rows.steps)
    old = old.groupby(["set", "beta"], sort=False)[["total", "steps"]].sum().reset_index()
    means = zip(old.set.tolist(), old.beta.tolist(), (old.total / old.steps).tolist(), strict=True)
    words = "; ".join(f"{SETS[name]} with β = {beta:g}: {cosine:+.2f}" for name, beta, cosine in means)
    alt = f"Cosine of the cached perturbation with the gradient by age. Mean from four steps on: {words}"
    caption = (
        "Cosine of the perturbation with the gradient of the step's mini-batch, at the weights themselves. Lines are "
        "medians over splits, bands their range; the first epoch is left out. Mean of all from four steps on: "
        + words
        + "."
    )
    behind = [run for run in of_quality(runs) if run.id in set(frame.run_id)]
    return panels(
        {SETS[name]: panel(name) for name in dict.fromkeys(frame.set)},
        name="directions",
        alt=alt,
        caption=caption,
        data=frame,
        runs=behind,
        key={f"β = {beta:g}" + (" (published)" if beta else ""): colour for beta, colour in BETAS.items()},
    )


def edges(runs: Iterable[Run], experiment: str = "mnist") -> Figure:
    """The operator norm through full-batch training, with the rule's own edge, the SAM edge and 2/η."""
    shown = of_edges(runs, experiment)
    order = dict.fromkeys(method(run) for run in shown)
    frames = []
    for run in shown:
        columns = ["step", "operator_norm", "edge", "gd_edge", "edge_ratio", "grad_norm"]
        frame = run.measurements.reindex(columns=columns)
        if run.config.rho:
            norms = frame.grad_norm.to_numpy() + EPSILON
            frame["sam_edge"] = sam_edge(norms, run.config.learning_rate, run.config.rho)
        frames.append(frame.assign(method=method(run), seed=run.config.seed, run_id=run.id))
    data = pd.concat(frames, ignore_index=True)
    colours = {"operator_norm": COLOURS["operator_norm"], "edge": COLOURS["edge"], "sam_edge": SAM_EDGE}
    lines = {"gd_edge": (0, (5, 2)), "sam_edge": (0, (1, 1.5))}

    def panel(name: str) -> Callable[[Axes], None]:
        def draw(axis: Axes) -> None:
            part = data[data.method == name]
            for quantity, colour in {"gd_edge": COLOURS["gd_edge"], **colours}.items():
                if quantity not in part or (quantity == "edge" and name == "base"):
                    continue
                by_step = part[np.isfinite(part[quantity])].groupby("step")[quantity]
                middle = by_step.median()
                axis.plot(middle.index, middle, color=colour, linestyle=lines.get(quantity, "-"))
                axis.fill_between(middle.index, by_step.min(), by_step.max(), color=colour, alpha=0.2, linewidth=0)
            axis.set(yscale="log", xlabel="step", ylabel="curvature")
            plain_log(axis)

        return draw

    lost = [run for run in shown if run.outcome == "diverged"]
    note = f" {len(lost)} of {len(shown)} runs diverged." if lost else ""
    if any(run.provenance["standin"] for run in shown):
        note += " <strong>Stand-in data: not a result.</strong>"
    config = shown[0].config
    seeds = len({run.config.seed for run in shown})
    bands = f"Lines are medians over {seeds} seeds, bands their range. " if seeds > 1 else ""
    where = f"{SETS.get(getattr(config, 'molecules', experiment), experiment)}, full batch"
    return panels(
        {title(name): panel(name) for name in order},
        name=f"cached_edges_{experiment}",
        alt=f"Line charts of the operator norm, the edge of the rule, the SAM edge and 2/η: {where}, by rule",
        caption=f"{where}, η = {config.learning_rate:g}, ρ = {max(r.config.rho for r in shown):g}. "
        f"{bands}For SAM the two edges are one.{note}",
        data=data,
        runs=shown,
        key={
            "operator norm ‖H‖": COLOURS["operator_norm"],
            "edge of the rule": COLOURS["edge"],
            "SAM edge": SAM_EDGE,
            "2/η": COLOURS["gd_edge"],
        },
        size=(2.6, 2.2),
    )


def title(name: str) -> str:
    """What a panel is called."""
    return {"base": "gradient descent", "β = 0": "β = 0, k = 200"}.get(name, name)


def oscillations(runs: Iterable[Run], steps: int = 60) -> Figure:
    """The weights along the principal eigenvector in the last steps, with the predicted period marked."""
    shown = [run for run in of_cycles(runs) if run.outcome == "finished"]
    first = min(run.config.seed for run in shown)
    chosen = [run for run in shown if run.config.seed == first]
    found = {run.id: period(run) for run in shown}
    frames = []
    for run in shown:
        assert run.path is not None
        rows = run.path.iloc[-steps:][["step", "projection"]]
        frame = rows.assign(projection=rows.projection - rows.projection.mean(), method=method(run))
        frame["period"], frame["predicted"] = found[run.id]
        frames.append(frame.assign(seed=run.config.seed, run_id=run.id))
    data = pd.concat(frames, ignore_index=True)

    def panel(run: Run) -> Callable[[Axes], None]:
        def draw(axis: Axes) -> None:
            part = data[data.run_id == run.id]
            end = part.step.max()
            marks = np.arange(end, end - steps, -found[run.id][1])
            for place in marks if len(marks) < steps / 3 else []:
                axis.axvline(place, color=COLOURS["edge"], linewidth=0.8, alpha=0.7)
            axis.plot(part.step, part.projection, color=COLOURS["operator_norm"], linewidth=1.2)
            axis.set(xlabel="step", ylabel="w along v₁")

        return draw

    words = "; ".join(f"{title(method(run))}: {found[run.id][0]:.2f} ({found[run.id][1]:.2f})" for run in chosen)
    return panels(
        {title(method(run)): panel(run) for run in chosen},
        name="oscillations",
        alt=f"Weights along the principal eigenvector in the last {steps} steps; period and predicted period: {words}",
        caption=f"Weights along the principal eigenvector v₁, seed {first}. Vertical lines are one predicted period "
        f"apart. Period in steps, predicted in brackets: {words}.",
        data=data,
        runs=shown,
        size=(2.6, 1.9),
        share_y=False,
    )


def quality(runs: Iterable[Run], intervals: pd.DataFrame) -> Figure:
    """Test errors minus those of the base on the same split.

    Args:
        runs: the chapter's.
        intervals: columns set, method, mean, low, high: the paired 95 % intervals.
    """
    frame = differences(runs)
    rows = list(dict.fromkeys(zip(frame.set.tolist(), frame.method.tolist(), strict=True)))

    def draw(canvas: Canvas) -> pd.DataFrame:
        axes = canvas.subplots(1, len({s for s, _ in rows}), squeeze=False)[0]
        for axis, name in zip(axes, dict.fromkeys(s for s, _ in rows), strict=True):
            names = [m for s, m in rows if s == name]
            axis.axvline(0, color=FOREGROUND, linewidth=0.8)
            for place, rule in enumerate(names):
                part = frame[(frame.set == name) & (frame.method == rule)]
                axis.scatter(part.difference, [place] * len(part), color=COLOURS["test_metric"], s=30, alpha=0.7)
                own = intervals[(intervals.set == name) & (intervals.method == rule)]
                for mean, low, high in own[["mean", "low", "high"]].to_numpy(float):
                    if np.isfinite([low, high]).all():
                        axis.plot([low, high], [place + 0.25] * 2, color=FOREGROUND, linewidth=2)
                    axis.plot([mean], [place + 0.25], "D", color=FOREGROUND, markersize=5)
            error = "RMSE" if name == "esol" else "1 − AUC"
            axis.set(title=SETS[name], xlabel=f"{error} minus Adam's", ylim=(len(names) - 0.4, -0.6))
            axis.set_yticks(range(len(names)), names)
        return frame

    words = ", ".join(f"{SETS[s]} {frame[frame.set == s].split.nunique()}" for s in dict.fromkeys(s for s, _ in rows))
    alt = "Differences of the test error to Adam's on the same scaffold split, by method; " + "; ".join(
        f"{SETS[name]}, {rule}: {mean:+.3f} [{low:+.3f}, {high:+.3f}]"
        for name, rule, mean, low, high in intervals[["set", "method", "mean", "low", "high"]].to_numpy().tolist()
    )
    caption = (
        f"Test error minus that of Adam on the same split and from the same weights: left is better. Scaffold splits: "
        f"{words}. The diamond is the mean, the line its paired 95 % interval; there is none for a single split."
    )
    return drawing(draw, (7, 2.4), "quality", alt, caption, [r for r in of_quality(runs) if r.outcome == "finished"])


def costs(table: pd.DataFrame) -> Figure:
    """Processor time of a step over the base's, beside the gradients that it takes."""
    names: Sequence[str] = list(dict.fromkeys(table.rule))
    colours = {"processor time": COLOURS["operator_norm"], "gradients": COLOURS["edge"]}

    def draw(canvas: Canvas) -> pd.DataFrame:
        axis = canvas.subplots()
        for place, name in enumerate(names):
            part = table[table.rule == name]
            axis.plot(part.cpu_ratio, [place] * len(part), "o", color=colours["processor time"], alpha=0.6)
            axis.plot(part.gradients.iloc[0], place, "|", color=colours["gradients"], markersize=16, markeredgewidth=2)
        axis.axvspan(0, 1.25, color=SHOWN["reproduced"][1], alpha=0.1, linewidth=0)
        axis.set(xlim=(0.8, max(2.2, table.cpu_ratio.max() + 0.1)), xlabel="per step, over the base (Adam)")
        axis.set_yticks(range(len(names)), ["Adam" if n == "base" else n for n in names])
        axis.invert_yaxis()
        key(canvas, colours)
        return table

    middle = table.groupby("rule", sort=False).cpu_ratio.median()
    words = ", ".join(f"{'Adam' if n == 'base' else n} {value:.2f}" for n, value in middle.items())
    return drawing(
        draw,
        (7, 2.2),
        "costs",
        f"Processor time of a step over Adam's: {words}; beside it the number of gradients",
        f"ESOL, mini-batches of 32; all rules take turns step by step, each dot is one of {table.repeat.nunique()} "
        f"repeats. Median of the processor time: {words}. The band is what the claim allows the cache.",
    )
