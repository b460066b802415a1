"""Pictures of the page of edges: every rule against its own edge, and against the edge of gradient descent."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from ..runs import Run
from .shapes import panels
from .style import COLOURS, FOREGROUND, Figure

__all__ = ["constant", "ratios"]

_OF = {
    "edge": ("own edge", COLOURS["operator_norm"], "‖H‖ / own edge"),
    "gd_edge": ("2/η", COLOURS["gd_edge"], "λ η / 2"),
}


def ratios(runs: Mapping[tuple[str, int], Run], where: str, of: str = "edge") -> Figure:
    """The sharpness over an edge through training: a panel per rule, a line per seed, one scale for all.

    Args:
        runs: by rule and seed.
        where: the experiment, in words.
        of: "edge", each rule's own, or "gd_edge", the same 2/η for all.
    """
    edge, colour, label = _OF[of]
    rows = []
    for (rule, seed), run in runs.items():
        frame = run.measurements
        ratio = frame.edge_ratio if of == "edge" else frame.eigenvalue_1 / frame.gd_edge
        rows.append(pd.DataFrame({"rule": rule, "seed": seed, "step": frame.step, "ratio": ratio}))
    data = pd.concat(rows, ignore_index=True)
    shown = data[np.isfinite(data.ratio) & (data.ratio > 0)]

    def panel(rule: str) -> Callable[[Axes], None]:
        def draw(axis: Axes) -> None:
            for _, part in shown[shown.rule == rule].groupby("seed"):
                axis.plot(part.step, part.ratio, color=colour, alpha=0.8)
            axis.axhline(1, color=FOREGROUND, linewidth=0.8, linestyle=(0, (4, 3)))
            lost = [run for (name, _), run in runs.items() if name == rule and run.outcome == "diverged"]
            if lost:
                steps = ", ".join(f"{run.last.step:.0f}" for run in lost)
                said = f"{len(lost)} diverged (step {steps})"
                axis.text(0.97, 0.95, said, transform=axis.transAxes, ha="right", va="top")
            axis.set(xlabel="step", ylabel=label, yscale="log")

        return draw

    names = list(dict.fromkeys(rule for rule, _ in runs))
    late = shown[shown.step >= shown.step.max() / 2].groupby("rule", sort=False).ratio.median()
    medians = ", ".join(f"{rule} {value:.2f}" for rule, value in late.items())
    alt = f"Line charts of the sharpness over {edge} during training on {where}; medians of the last half: {medians}"
    caption = (
        "Every rule against <em>its own</em> edge: at 1 it trains at the edge of stability."
        if of == "edge"
        else "The same runs, λ against the 2/η of plain gradient descent."
    )
    name = f"which_edge_{'own' if of == 'edge' else 'plain'}_{'_'.join(where.lower().split())}"
    return panels(
        {rule: panel(rule) for rule in names},
        name=name,
        alt=alt,
        caption=f"{caption} {where}; a line per seed.",
        data=data,
        runs=list(runs.values()),
        size=(2.7, 2.2),
        log=True,
    )


def constant(runs: Mapping[tuple[str, int], Run], edges: Mapping[str, float]) -> Figure:
    """λ itself, and ‖g‖, of rules whose edge does not hang on ‖g‖: a panel per rule.

    Args:
        runs: by rule and seed.
        edges: of each rule.
    """
    frames = [
        run.measurements[["step", "eigenvalue_1", "grad_norm"]].assign(rule=rule, seed=seed)
        for (rule, seed), run in runs.items()
    ]
    data = pd.concat(frames, ignore_index=True)

    def panel(rule: str) -> Callable[[Axes], None]:
        def draw(axis: Axes) -> None:
            for _, part in data[data.rule == rule].groupby("seed"):
                axis.plot(part.step, part.eigenvalue_1, color=COLOURS["operator_norm"])
                axis.plot(part.step, part.grad_norm, color=COLOURS["grad_alignment"], alpha=0.7)
            axis.axhline(edges[rule], color=COLOURS["edge"], linestyle=(0, (5, 2)))
            axis.set(xlabel="step", ylabel="λ, ‖g‖", yscale="log")

        return draw

    return panels(
        {rule: panel(rule) for rule in edges},
        name="which_edge_constant",
        alt="Line charts of λ, of the constant edge of unnormalised SAM, and of the gradient's norm during training",
        caption="Unnormalised SAM: λ beside its edge, which is the same whatever ‖g‖ does. A line per seed.",
        data=data,
        runs=list(runs.values()),
        key={"λ": COLOURS["operator_norm"], "its edge": COLOURS["edge"], "‖g‖": COLOURS["grad_alignment"]},
        log=True,
    )
