"""The first page's small multiples: for each experiment and related system a picture, the verdict, and the way in."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
import pandas as pd
from IPython.display import HTML
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from ..claims import CHAPTERS, Verdict
from ..claims.balanced_runs import LEVELS
from ..claims.stochastic_runs import ends
from ..claims.universal_tables import measures_table, own_columns
from ..experiments import title
from ..runs import Run, published_runs
from ..selection import tidy, typical
from .balanced_features import PROBES, Kind, by_seed
from .graphsam import AGES, BETAS, by_age
from .shapes import SHOWN, legend
from .stochastic_edge import KERNEL
from .story import story
from .style import COLOURS, FOREGROUND, STYLE, render
from .verdicts import outcome

__all__ = ["doors"]

SIZE = (2.5, 1.75)
SETTLED = {"K": ("kernel", KERNEL), "ηλ_gen/2": ("sgd_edge_ratio", COLOURS["edge"])}


class Door(NamedTuple):
    """A claim that stands for its page, and a picture of what it is about.

    Attributes:
        claim: its key.
        draw: draws some runs and says what is to be seen; nothing if none of them is of use.
        colours: of the curves, by name.
    """

    claim: str
    draw: Callable[[Axes, Sequence[Run]], str | None]
    colours: dict[str, str]


def doors(results: Sequence[Verdict], folder: Path | None = None) -> HTML:
    """A picture, a verdict and a link for each experiment and each related system.

    Args:
        results: all verdicts.
        folder: of the published runs.
    """
    shown = "".join(_door(name, results, published_runs(name, folder)) for name in DOORS)
    return HTML(f'<div class="samlib-doors full-width">{shown}</div>')


def _door(name: str, results: Sequence[Verdict], runs: Sequence[Run]) -> str:
    own = [verdict for verdict in results if verdict.experiment == name and verdict.leading]
    [main] = [verdict for verdict in own if verdict.claim.key == DOORS[name].claim]
    heading = CHAPTERS[name].title if name in CHAPTERS else title(name)
    counts: Counter[str] = Counter(verdict.outcome for verdict in own)
    tally = " · ".join(f"{SHOWN[word][0]} {counts[word]} {word}" for word in SHOWN if counts[word])
    place = f"claims.html#{name if name in CHAPTERS else 'paper'}-{main.claim.key}"
    with mpl.rc_context(STYLE):
        canvas = Canvas(figsize=SIZE, layout="constrained")
        seen = DOORS[name].draw(canvas.subplots(), runs)
        picture = render(canvas, f"{heading}: {seen}") if seen else "<p>No picture yet.</p>"
    scale = "" if name in CHAPTERS else f", profile {main.profile}"
    units = f" ({main.supporting} of {main.total}{scale})" if main.total else ""
    return (
        f'<section><h3><a href="../notebooks/{name}.html">{heading}</a></h3>{legend(DOORS[name].colours)}{picture}'
        f"<p>{html.escape(main.claim.text)} <strong>{outcome(main)}</strong>{units}</p>"
        f'<p>Of {len(own)} <a href="{place}">claims</a>: {tally}.</p></section>'
    )


def _story(axis: Axes, runs: Sequence[Run]) -> str | None:
    run = typical(runs)
    if not run:
        return None
    frame = tidy([run], "operator_norm", "edge", "gd_edge")
    story(axis, frame, 2 / 3, named=False)
    axis.set_ylabel("")
    last = run.last
    return (
        f"the operator norm ends at {last.operator_norm:.3g}, SAM's edge at {last.edge:.3g}; 2/η is {last.gd_edge:.3g}"
    )


def _settling(axis: Axes, runs: Sequence[Run]) -> str | None:
    table = ends(runs)
    table = table[(table.part == "settling") & (table.learning_rate == 1) & (table.batch_size >= 2)]
    seen = []
    for name, (column, colour) in SETTLED.items():
        known = table[table[column].between(0, np.inf, "neither")].groupby("batch_size")[column].median()
        axis.plot(known.index, known, "o-", color=colour, markersize=3.5)
        seen += [f"{name} ends at {value:.2f} for B = {size}" for size, value in known.head(2).items()]
    axis.axhline(1, color=FOREGROUND, linewidth=0.8, linestyle=(0, (4, 3)))
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(mpl.ticker.StrMethodFormatter("{x:g}"))
    axis.set_xlabel("batch size")
    return "; ".join(seen)


def _own_measures(axis: Axes, runs: Sequence[Run]) -> str | None:
    table, own = measures_table(runs), own_columns()
    if not len(table):
        return None
    shown = {rule: column for rule, column in own.items() if (table.rule == rule).any()}
    seen = []
    for place, (rule, column) in enumerate(shown.items()):
        values = table[table.rule == rule][column].dropna()
        axis.plot(values, [place] * len(values), "o", color=COLOURS["operator_norm"], markersize=4)
        seen.append(f"{rule} {values.mean():.2f}")
    axis.axvline(1, color=FOREGROUND, linewidth=0.8, linestyle=(0, (4, 3)))
    axis.set_yticks(range(len(shown)), list(shown))
    axis.set_ylim(len(shown) - 0.5, -0.5)
    return "own measure over that of gradient descent: " + ", ".join(seen) if shown else None


def _uphill(axis: Axes, runs: Sequence[Run]) -> str | None:
    frame = by_age(runs)
    frame = frame[frame.set == "esol"]
    seen = []
    for beta, colour in BETAS.items():
        cosine = frame[frame.beta == beta].groupby("place").cosine.median()
        axis.plot(cosine.index, cosine, "o-", color=colour, markersize=3.5)
        seen += [f"{cosine.iloc[-1]:+.2f} at the end with β = {beta:g}"] if len(cosine) else []
    axis.axhline(0, color=FOREGROUND, linewidth=0.8)
    axis.set(ylim=(-1.05, 1.05), xlabel="steps since a true gradient")
    axis.set_xticks(range(len(AGES)), [age.replace(" or more", "+") for age in AGES])
    return "cosine of the cached perturbation with the gradient, " + ", ".join(seen) if seen else None


def _balance(axis: Axes, runs: Sequence[Run]) -> str | None:
    kinds = [Kind("CNN with BatchNorm", 0.3, 0.01)]
    frame = pd.concat([by_seed(runs, kinds, level).assign(level=level) for level in LEVELS])
    if not len(frame):
        return None
    seen = []
    axis.axhline(0, color=FOREGROUND, linewidth=0.8)
    for probe, colour in PROBES.items():
        part = frame[frame.probe == probe].dropna(subset="difference")
        axis.plot(part.level, part.difference, "o", color=colour, markersize=2.5, alpha=0.6)
        means = part.groupby("level").difference.mean()
        axis.plot(means.index, means, color=colour)
        seen += [f"{probe} {means.iloc[0]:+.1f} at loss {means.index[0]:g}"] if len(means) else []
    axis.set_xscale("log")
    axis.invert_xaxis()
    axis.xaxis.set_major_formatter(mpl.ticker.StrMethodFormatter("{x:g}"))
    axis.set_xlabel("training loss")
    return "probe error of SAM minus that of SGD in points: " + ", ".join(seen) if seen else None


EDGES = {"‖H‖": COLOURS["operator_norm"], "SAM edge": COLOURS["edge"], "2/η": COLOURS["gd_edge"]}
DOORS = {
    "mnist": Door("sam", _story, EDGES),
    "cifar10": Door("sam", _story, EDGES),
    "shakespeare": Door("stochastic", _story, EDGES),
    "stochastic_edge": Door("settles", _settling, {name: colour for name, (_, colour) in SETTLED.items()}),
    "universal_sam": Door("own_measure", _own_measures, {"own measure / that of GD": COLOURS["operator_norm"]}),
    "graphsam": Door("uphill", _uphill, {f"cos, β = {beta:g}": colour for beta, colour in BETAS.items()}),
    "balanced_features": Door("harder", _balance, {f"{probe}, SAM − SGD": colour for probe, colour in PROBES.items()}),
}
