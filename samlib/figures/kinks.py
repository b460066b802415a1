"""Pictures of the page on kinks: what differences of gradients read against their length, and readings of an edge."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes

from ..experiments import title
from ..observables.curvature import STEPS
from ..runs import Run
from .shapes import panels
from .style import COLOURS, FOREGROUND, Figure

__all__ = ["against_length", "readings"]


def against_length(runs: Sequence[Run]) -> Figure:
    """‖∇ℓ(w + sv) − ∇ℓ(w − sv)‖/2s over ‖Hv‖ against s: a panel per experiment, a line per measurement."""
    frames = []
    for run in runs:
        rows = run.measurements
        for s in STEPS:
            ratio = rows[f"difference_{s:g}"] / rows.operator_norm
            place = {"experiment": run.config.experiment, "length": s}
            frames.append(pd.DataFrame({**place, "step": rows.step, "ratio": ratio}))
    data = pd.concat(frames, ignore_index=True)

    def panel(name: str) -> Callable[[Axes], None]:
        def draw(axis: Axes) -> None:
            part = data[data.experiment == name]
            last = part.step.max()
            for step in part.step.unique():
                one = part[part.step == step]
                axis.plot(one.length, one.ratio, color=colormaps["cividis"](0.85 * step / last))
            axis.axhline(1, color=FOREGROUND, linewidth=0.8, linestyle=(0, (4, 3)))
            axis.axvline(1e-3, color=COLOURS["gd_edge"], linewidth=0.8, linestyle=(0, (1, 2)))
            axis.set(xlabel="length s of the difference", ylabel="read / ‖Hv‖", xscale="log", yscale="log")

        return draw

    names = [run.config.experiment for run in runs]
    short = data[data.length == min(STEPS)]
    medians = {name: short[short.experiment == name].ratio.median() for name in names}
    said = ", ".join(f"{title(name)} {value:.2f}" for name, value in medians.items())
    return panels(
        {title(name): panel(name) for name in names},
        name="kinks_against_length",
        alt=f"Line charts: what differences of gradients read over the exact ‖Hv‖; medians at the shortest: {said}",
        caption="What a difference of gradients of length s reads along the principal eigenvector, over the exact "
        "‖Hv‖; a line per measurement, dark at the start of training and light at its end. Dotted: the paper's length.",
        data=data,
        runs=list(runs),
        log=True,
    )


def readings(runs: Sequence[Run]) -> Figure:
    """The edge ratio through training by the exact Hessian, by the reference's rule, early stopped or not, and of
    Gauss–Newton.
    """
    readings = {
        "exact": ("operator_norm", COLOURS["operator_norm"]),
        "as the paper's code": ("reference_norm", COLOURS["edge"]),
        "the same, until it settles": ("converged_norm", COLOURS["sam_grad_alignment"]),
        "Gauss–Newton": ("gauss_newton_norm", COLOURS["loss"]),
    }
    frames = []
    for run in runs:
        rows = run.measurements
        ratios = {label: rows[column] / rows.edge for label, (column, _) in readings.items()}
        frames.append(pd.DataFrame({"experiment": run.config.experiment, "step": rows.step, **ratios}))
    data = pd.concat(frames, ignore_index=True)

    def panel(name: str) -> Callable[[Axes], None]:
        def draw(axis: Axes) -> None:
            part = data[data.experiment == name]
            for label, (_, colour) in readings.items():
                axis.plot(part.step, part[label], color=colour)
            axis.axhline(1, color=FOREGROUND, linewidth=0.8, linestyle=(0, (4, 3)))
            axis.set(xlabel="step", ylabel="norm / SAM edge", yscale="log")

        return draw

    names = [run.config.experiment for run in runs]
    exact, early, settled = (data[label] for label in list(readings)[:3])
    over = pd.DataFrame({"early": early / exact, "settled": settled / exact}).groupby(data.experiment)
    said = "; ".join(
        f"{title(name)} {part.early.median():.3f}, and {part.settled.median():.3f} for the {part.settled.count()} of "
        f"{len(part)} that settle"
        for name, part in over
    )
    return panels(
        {title(name): panel(name) for name in names},
        name="kinks_readings",
        alt="Line charts of the norm over the SAM edge, measured exactly, by finite differences, and of Gauss–Newton",
        caption="Norms over the SAM edge along the same run: of the exact Hessian; as the paper's code reads it, which "
        "stops once the norm changes by a thousandth; where that iteration ends if it goes on, where it settles within "
        "100 differences; and of the Gauss–Newton matrix, which kinks touch less. Medians of the second and third over "
        f"the exact norm: {said}.",
        data=data,
        runs=list(runs),
        share_x=False,
        key={label: colour for label, (_, colour) in readings.items()},
        log=True,
    )
