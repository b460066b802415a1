"""Balanced features: pictures of the toy problems, and of the images."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from ..datasets.base import Probed
from .shapes import panels
from .style import COLOURS, Figure, drawing

__all__ = ["counterexample", "diagonal", "dominoes", "part_table", "uniformity"]

METHODS = {0.0: COLOURS["gd_edge"], 1.0: COLOURS["edge"]}


def diagonal(frame: pd.DataFrame) -> Figure:
    """The diagonal net: the hard feature's share of the margin along the path, flow and steps, for each ρ."""
    rhos = sorted(set(frame.rho))
    strength = dict(zip(rhos, np.linspace(0.4, 1, len(rhos)), strict=True))

    def draw(canvas: Canvas) -> pd.DataFrame:
        axis = canvas.subplots()
        for rho in rhos:
            colour = COLOURS["edge"] if rho else COLOURS["gd_edge"]
            flow, steps = (frame[(frame.rho == rho) & (frame.kind == kind)] for kind in ("flow", "steps"))
            axis.plot(flow.margin, 100 * flow.share, color=colour, alpha=strength[rho] if rho else 1)
            axis.plot(steps.margin, 100 * steps.share, ".", color=colour, alpha=strength[rho] if rho else 1)
            name = f"SAM, ρ = {rho:g}" if rho else "GD"
            end = (flow.margin.iloc[-1], 100 * flow.share.iloc[-1])
            axis.annotate(name, end, (5, 0), textcoords="offset points", color=colour, va="center")
        axis.set(xlabel="margin (training goes to the right)", ylabel="hard feature's share, %", yscale="log")
        axis.set_yticks([3, 5, 10, 20, 30], ["3", "5", "10", "20", "30"])
        axis.yaxis.set_minor_locator(_none())
        axis.set_xlim(0, 4.8)
        return frame

    alt = "The hard feature's share of the margin falls along the paths of GD and SAM, the less the larger ρ"
    caption = (
        "The diagonal net: share of the margin that the hard feature carries, as training goes on. Lines are the flow, "
        "dots are steps of η = 0.01. At equal margin the loss is equal, too."
    )
    return drawing(draw, (6.2, 3.0), "diagonal", alt, caption)


def _none() -> Any:
    from matplotlib.ticker import NullLocator

    return NullLocator()


def part_table(frame: pd.DataFrame) -> pd.DataFrame:
    """The hard feature's share at the tabled loss in %: a row per ρ, a column for the flow and each part's steps."""
    names = {
        ("flow", "sam"): "flow",
        ("steps", "sam"): "steps",
        ("steps", "weights"): "weights only",
        ("steps", "jacobian"): "Jacobian only",
        ("steps", "one layer"): "one layer perturbed",
    }
    kept = frame[[pair in names for pair in zip(frame.kind, frame.part, strict=True)]]
    column = [names[pair] for pair in zip(kept.kind, kept.part, strict=True)]
    wide = kept.assign(column=column, value=100 * kept.share).pivot(index="rho", columns="column", values="value")
    return wide[list(names.values())].rename_axis(index="ρ", columns=None)


def counterexample(frame: pd.DataFrame) -> Figure:
    """The linear counterexample: what is learnt of the hard feature, and how uniform the weights are, by loss."""

    def ratio(axis: Axes) -> None:
        for rho, colour in METHODS.items():
            part = frame[frame.rho == rho]
            axis.plot(part.loss, part.ratio, color=colour)
        axis.set(ylabel="θ hard / θ easy")

    def uniform(axis: Axes) -> None:
        for rho, colour in METHODS.items():
            part = frame[frame.rho == rho]
            axis.plot(part.loss, part.gini, color=colour)
            axis.plot(part.loss, part.perturbed_gini, color=colour, linestyle=(0, (4, 2)))
        axis.set(ylabel="Gini of the weights")

    def with_loss(draw: Any, axis: Axes) -> None:
        draw(axis)
        axis.set(xscale="log", xlabel="training loss", xlim=(0.65, 0.075))
        axis.set_xticks([0.5, 0.3, 0.2, 0.1], ["0.5", "0.3", "0.2", "0.1"])
        axis.xaxis.set_minor_locator(_none())

    return panels(
        {"what is learnt": partial(with_loss, ratio), "the examples' weights": partial(with_loss, uniform)},
        name="counterexample",
        alt="In the linear model SAM has learnt less of the hard feature than GD at every loss, and its weights are "
        "less uniform at w, though below a loss of a half more uniform at the perturbed point of either method",
        caption="Two groups in a linear model, ρ = 1. Right: solid at w, dashed at the perturbed point.",
        data=frame,
        key={"GD": METHODS[0.0], "SAM": METHODS[1.0]},
        share_y=False,
    )


def uniformity(frame: pd.DataFrame) -> Figure:
    """The Gini of two weights at the perturbed point against ρ: it falls for a shared direction, rises for none."""
    colours = {"shared direction": COLOURS["loss"], "orthogonal": COLOURS["operator_norm"]}

    def draw(canvas: Canvas) -> pd.DataFrame:
        axis = canvas.subplots()
        for kind, colour in colours.items():
            part = frame[frame.kind == kind]
            axis.plot(part.rho, part.gini, color=colour)
            middle = (part.rho.iloc[len(part) // 2], part.gini.iloc[len(part) // 2])
            axis.annotate(kind, middle, (0, 8), textcoords="offset points", color=colour, weight="bold")
        axis.set(xlabel="ρ", ylabel="Gini of the weights")
        return frame

    alt = "With ρ the Gini coefficient of two weights falls if the examples share a direction, and rises if they do not"
    caption = (
        "Gini coefficient of the weights of two examples with margins 1 and 3 at the perturbed point, linear model."
    )
    return drawing(draw, (5.0, 2.5), "uniformity", alt, caption)


def dominoes(data: Probed, names: Sequence[str], count: int = 10) -> Figure:
    """One training image of each class, and under it a probe image of the same object under an independent digit."""
    labels = data.train_targets.argmax(1)
    which = [int((labels == k).nonzero()[0]) for k in range(min(count, len(names)))]
    train, probe = (x[which].permute(0, 2, 3, 1).numpy() for x in (data.train_inputs, data.probes.train.inputs))
    digits = data.probes.train.labels["digit"][which].tolist()

    def draw(canvas: Canvas) -> pd.DataFrame:
        axes = canvas.subplots(2, len(which), squeeze=False)
        for row, images in zip(axes, (train, probe), strict=True):
            for axis, image in zip(row, images, strict=True):
                low, high = image.min(), image.max()
                axis.imshow((image - low) / (high - low), interpolation="nearest")
                axis.set_xticks([])
                axis.set_yticks([])
                axis.grid(False)
        for axis, index in zip(axes[0], which, strict=True):
            axis.set_title(names[int(labels[index])], rotation=45, ha="left", va="bottom", x=0.1)
        axes[0][0].set_ylabel("training")
        axes[1][0].set_ylabel("probes")
        classes = [names[int(labels[i])] for i in which]
        return pd.DataFrame({"object": classes, "digit": range(len(which)), "probe_digit": digits})

    told = ", ".join(f"{names[k]} under {digit}" for k, digit in enumerate(digits))
    alt = f"Images of digits above objects: in training the k-th class under digit k, for the probes {told}"
    caption = (
        "Above: one training image of each class, the object under its digit. Below: the same objects for the probes, "
        "under digits that say nothing about them and that training has not seen."
    )
    return drawing(draw, (7.2, 3.2), "dominoes", alt, caption)
