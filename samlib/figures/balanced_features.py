"""Balanced features: pictures of recorded runs, compared with plain SGD at equal training loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from ..claims.balanced_features import interval_of
from ..claims.balanced_runs import LEVELS, at_level, cell, pairs
from ..runs import Run
from .shapes import panels
from .style import COLOURS, FOREGROUND, Figure, drawing, plain_log
from .words import mean_in_words

__all__ = ["Kind", "at_equal_loss", "edges", "gini_changes", "lorenz", "paired_table", "split", "through_the_loss"]

PROBES = {"object": COLOURS["sam_grad_alignment"], "digit": COLOURS["grad_alignment"]}
PLACES = {"at w": COLOURS["gd_edge"], "at the perturbed point": COLOURS["edge"]}


class Kind(NamedTuple):
    """Runs of one network, radius and rule, and the training loss at which they are compared with plain SGD."""

    network: str
    rho: float
    level: float
    rule: str = "sam"
    layers: tuple[str, ...] | None = None

    def found(self, runs: Sequence[Run], level: float | None = None) -> list[Any]:
        more = {} if self.layers is None else {"layers": self.layers}
        return pairs(runs, self.network, self.rho, level or self.level, self.rule, **more)

    @property
    def part(self) -> str:
        """The part of SAM's gradient that is followed."""
        if self.layers:
            return {"last": "last layer perturbed", "body": "body perturbed"}[self.layers[0]]
        return {"sam": "SAM", "weights_sam": "weights only", "jacobian_sam": "Jacobian only"}[self.rule]


SAM_RUNS = (
    *(Kind("CNN with BatchNorm", rho, 0.01) for rho in (0.1, 0.3, 0.6)),
    *(Kind("MLP", rho, 0.1) for rho in (0.1, 0.3)),
    Kind("MLP with BatchNorm", 0.3, 0.01),
)
PARTS = tuple(
    Kind(network, 0.3, level, rule, layers)
    for network, level in (("CNN with BatchNorm", 0.01), ("MLP", 0.1))
    for rule, layers in (
        ("sam", None),
        ("weights_sam", None),
        ("jacobian_sam", None),
        ("layer_sam", ("last",)),
        ("layer_sam", ("body",)),
    )
)


def by_seed(runs: Sequence[Run], kinds: Sequence[Kind], level: float | None = None) -> pd.DataFrame:
    """One row per pair and probe: the difference of its error to plain SGD's, in points; NaN if one did not arrive."""
    rows = []
    for kind in kinds:
        for pair in kind.found(runs, level):
            for probe in PROBES:
                place = {"network": kind.network, "rho": kind.rho, "part": kind.part, "loss": level or kind.level}
                value = 100 * pair.difference(f"probe_{probe}")
                about = {"seed": pair.run.config.seed, "run_id": pair.run.id, "plain_run_id": pair.plain.id}
                rows.append({**place, "probe": probe, **about, "difference": value, "steps": pair.cost})
    columns = ["network", "rho", "part", "loss", "probe", "seed", "run_id", "plain_run_id", "difference", "steps"]
    return pd.DataFrame(rows, columns=columns)


def paired_table(runs: Sequence[Run], kinds: Sequence[Kind] = SAM_RUNS) -> pd.DataFrame:
    """Mean differences ± standard errors in points, how many are lower, the steps, and the runs that never arrived."""
    rows = []
    for _, group in by_seed(runs, kinds).groupby(["network", "rho", "part", "loss"], sort=False):
        first = group.iloc[0]
        row = {
            "network": first.network,
            "ρ": f"{first.rho:g}",
            "rule": first.part,
            "at loss": f"{first.loss:g}",
        }
        for probe in PROBES:
            values = group[group.probe == probe].difference.dropna().to_numpy(float)
            row[probe] = mean_in_words(values, "+.1f", error=".1f")
            row[f"{probe} better"] = f"{int((values < 0).sum())} of {len(values)}"
        one = group[group.probe == "object"]
        row["steps ÷ SGD's"] = f"{one.steps.mean():.1f}"
        rows.append(row | {"not arrived": int(one.difference.isna().sum())})
    return pd.DataFrame(rows)


def at_equal_loss(runs: Sequence[Run]) -> Figure:
    """The claim in one picture: by network and ρ the paired differences of both probes, with their intervals."""
    frame = by_seed(runs, SAM_RUNS)
    frame["row"] = [f"{n}, ρ = {rho:g}" for n, rho in zip(frame.network, frame.rho, strict=True)]
    caption = (
        "Error of a linear probe of the features, SAM's minus plain SGD's, both where their training loss first passes "
        "the same value (0.01 for the networks with BatchNorm, 0.1 for the MLP without). Left of the line SAM's "
        "features are better. Dots are seeds, diamonds means with 95 % intervals."
    )
    return _strips(runs, frame, "at_equal_loss", "Paired differences of probe errors between SAM and SGD", caption)


def split(runs: Sequence[Run]) -> Figure:
    """The same for the parts of SAM's gradient, at ρ = 0.3."""
    frame = by_seed(runs, PARTS)
    frame["row"] = [f"{n}: {part}" for n, part in zip(frame.network, frame.part, strict=True)]
    caption = (
        "As before at ρ = 0.3, for steps with SAM's gradient, with the part of its weights or of its Jacobian alone, "
        "and with SAM's gradient where only some layers are perturbed."
    )
    return _strips(runs, frame, "split", "Paired differences of probe errors for parts of SAM's gradient", caption)


def _strips(runs: Sequence[Run], frame: pd.DataFrame, name: str, alt: str, caption: str) -> Figure:
    order = list(dict.fromkeys(frame.row))
    words = []

    def draw(canvas: Canvas) -> pd.DataFrame:
        axes = canvas.subplots(1, 2, sharey=True)
        for axis, (probe, colour) in zip(axes, PROBES.items(), strict=True):
            axis.axvline(0, color=FOREGROUND, linewidth=0.8)
            for place, row in enumerate(order):
                values = frame[(frame.row == row) & (frame.probe == probe)].difference.dropna().to_numpy()
                axis.scatter(values, [place] * len(values), color=colour, s=22, alpha=0.5, linewidths=0)
                mean, low, high = interval_of(values) if len(values) else (np.nan,) * 3
                if np.isfinite([low, high]).all():
                    axis.plot([low, high], [place, place], color=colour, linewidth=2.4)
                    axis.plot([mean], [place], "D", color=colour, markersize=6)
                    words.append(f"{probe}, {row}: {mean:+.1f} [{low:+.1f}, {high:+.1f}]")
            axis.set(title=f"{probe} (the {'harder' if probe == 'object' else 'easier'})", xlabel="points of error")
        axes[0].set_yticks(range(len(order)), order)
        axes[0].invert_yaxis()
        return frame

    behind = {*frame.run_id, *frame.plain_run_id}
    figure = drawing(draw, (7.4, 0.9 + 0.34 * len(order)), name, alt, caption, [r for r in runs if r.id in behind])
    # The numbers are known once it is drawn.
    told = f"{alt}. Mean and 95 % interval in points: {'; '.join(words)}"
    return Figure(figure.svg.replace(f'"{alt}"', f'"{told}"'), told, caption, figure.data, figure.runs, name)


def through_the_loss(runs: Sequence[Run]) -> Figure:
    """The paired differences at all levels of the training loss, one panel per network and ρ."""
    kinds = [kind for kind in SAM_RUNS if cell(runs, kind.network, kind.rho)]
    frame = pd.concat([by_seed(runs, kinds, level) for level in LEVELS], ignore_index=True)

    def draw(axis: Axes, kind: Kind) -> None:
        part = frame[(frame.network == kind.network) & (frame.rho == kind.rho)]
        axis.axhline(0, color=FOREGROUND, linewidth=0.8)
        for probe, colour in PROBES.items():
            values = part[part.probe == probe].dropna(subset="difference").groupby("loss").difference
            ends = pd.DataFrame([interval_of(v.to_numpy()) for _, v in values if len(v) > 1])
            losses = np.array([loss for loss, v in values if len(v) > 1])
            if len(ends):
                axis.plot(losses, ends[0], color=colour, marker=".")
                axis.fill_between(losses, ends[1], ends[2], color=colour, alpha=0.2, linewidth=0)
        _falling_loss(axis)
        axis.set_ylabel("points of error")

    return panels(
        {f"{kind.network}, ρ = {kind.rho:g}": partial(draw, kind=kind) for kind in kinds},
        name="through_the_loss",
        alt="Paired differences of probe errors between SAM and SGD against the training loss",
        caption="The same differences at all training losses: means, with 95 % intervals as bands.",
        data=frame,
        runs=[run for run in runs if run.id in {*frame.run_id, *frame.plain_run_id}],
        key=PROBES,
        share_y=True,
    )


def lorenz(runs: Sequence[Run], levels: Sequence[float] = (1.0, 0.1, 0.01)) -> Figure:
    """Lorenz curves of the examples' weights along plain SGD, at w and at the perturbed point, means over seeds."""
    shares = np.arange(11) / 10
    rows, draws = [], {}
    for network in ("CNN with BatchNorm", "MLP"):
        chosen = cell(runs, network, 0.0)
        for level in levels:
            found = [row for run in chosen.values() if (row := at_level(run, level)) is not None]
            if not found:
                continue
            title = f"{network}, loss {level:g}"
            curves = {}
            for place, prefix in zip(PLACES, ("", "perturbed_"), strict=True):
                deciles = np.mean([[row[f"{prefix}weights_decile_{i}"] for i in range(1, 10)] for row in found], axis=0)
                curves[place] = np.array([0.0, *deciles, 1.0])
                rows += [
                    {"network": network, "loss": level, "place": place, "share": s, "weight": v, "seeds": len(found)}
                    for s, v in zip(shares, curves[place], strict=True)
                ]
            draws[title] = partial(_draw_lorenz, shares=shares, curves=curves)
    return panels(
        draws,
        name="lorenz",
        alt="Lorenz curves of the examples' weights at w and at the perturbed point",
        caption="Share of all weight held by the lightest examples, along plain SGD (perturbed by ρ = 0.3), means over "
        "seeds. On the thin diagonal all examples weigh the same.",
        data=pd.DataFrame(rows),
        runs=[run for network in ("CNN with BatchNorm", "MLP") for run in cell(runs, network, 0.0).values()],
        key=PLACES,
        size=(2.5, 2.4),
    )


def _draw_lorenz(axis: Axes, shares: np.ndarray, curves: dict[str, np.ndarray]) -> None:
    axis.plot([0, 1], [0, 1], color=FOREGROUND, linewidth=0.6)
    for place, curve in curves.items():
        axis.plot(shares, curve, color=PLACES[place])
    axis.set(xlabel="share of examples", ylabel="share of weight", xlim=(0, 1), ylim=(0, 1))


def gini_changes(runs: Sequence[Run]) -> Figure:
    """The Gini coefficient at the perturbed point minus that at w, every measurement, by network and ρ."""
    rows: list[dict[str, Any]] = []
    draws: dict[str, Callable[[Axes], None]] = {}
    for network in ("CNN with BatchNorm", "MLP"):
        for rho in (0.0, 0.1, 0.3):
            found = [
                {"network": network, "rho": rho, "run_id": run.id, "seed": seed, "loss": level}
                | {"change": float(row.perturbed_weights_gini - row.weights_gini)}
                for seed, run in cell(runs, network, rho).items()
                for level in LEVELS
                if (row := at_level(run, level)) is not None
            ]
            if found:
                rows += found
                draws[f"{network}, ρ = {rho:g}" + " (SGD)" * (rho == 0)] = partial(_draw_changes, found=found)
    behind = {row["run_id"] for row in rows}
    return panels(
        draws,
        name="gini_changes",
        alt="Change of the weights' Gini coefficient from w to the perturbed point against the training loss",
        caption="Gini coefficient of the examples' weights at the perturbed point minus that at w, every measurement. "
        "Below the line the weights are more uniform there. SGD's points are perturbed by ρ = 0.3.",
        data=pd.DataFrame(rows),
        runs=[run for run in runs if run.id in behind],
        size=(2.9, 2.3),
    )


def _draw_changes(axis: Axes, found: list[dict[str, Any]]) -> None:
    axis.axhline(0, color=FOREGROUND, linewidth=0.8)
    axis.plot([r["loss"] for r in found], [r["change"] for r in found], "o", color=COLOURS["edge"], alpha=0.5, ms=4)
    _falling_loss(axis)
    axis.set_ylabel("change of Gini")


def _falling_loss(axis: Axes) -> None:
    axis.set(xscale="log", xlabel="training loss", xlim=(1.6, 0.006))
    axis.set_xticks([1, 0.1, 0.01], ["1", "0.1", "0.01"])


def edges(runs: Sequence[Run]) -> Figure:
    """Full-batch runs of the MLP: the ratio of operator norm and edge, and beside it the object's probe error."""
    shown = sorted((run for run in runs if "edge" in run.config.observables), key=lambda run: run.config.rho)
    tones = dict(zip([run.config.rho for run in shown], np.linspace(0.35, 1, max(len(shown), 1)), strict=True))
    columns = ["step", "loss", "edge_ratio", "operator_norm", "probe_object", "probe_digit"]
    frames = [run.measurements[columns].assign(run_id=run.id, rho=run.config.rho) for run in shown]
    frame = pd.concat(frames, ignore_index=True)

    def draw(axis: Axes, column: str, factor: float, label: str) -> None:
        for rho, alpha in tones.items():
            part = frame[(frame.rho == rho) & (frame.step > 0)]
            axis.plot(part.loss, factor * part[column], ".-", color=COLOURS["operator_norm"], alpha=alpha)
            axis.annotate(
                f"ρ = {rho:g}",
                (part.loss.iloc[-1], factor * part[column].iloc[-1]),
                (4, 0),
                textcoords="offset points",
                va="center",
            )
        _falling_loss(axis)
        axis.set_ylabel(label)
        if column == "edge_ratio":
            axis.axhline(1, color=FOREGROUND, linewidth=0.8, linestyle=(0, (4, 3)))
            axis.set_yscale("log")
            plain_log(axis)

    return panels(
        {
            "at the edge": partial(draw, column="edge_ratio", factor=1, label="‖H‖ / edge"),
            "object's probe error": partial(draw, column="probe_object", factor=100, label="% wrong"),
        },
        name="edges_beside_probes",
        alt="Ratio of operator norm and edge, and the object's probe error, against the training loss for several ρ",
        caption="Full-batch training of the MLP (η = 0.2), one seed: the operator norm over the edge of its rule, and "
        "the object's probe error beside it, as the loss falls.",
        data=frame,
        runs=shown,
        share_y=False,
    )
