"""What is to be seen in some runs, in sentences whose numbers are computed from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import sem

from ..claims import fall_at_the_edge, last_half
from ..experiments import find
from ..runs import Run
from ..selection import edge_of, grouped

__all__ = ["alignments_in_words", "losses_in_words", "mean_in_words", "norms_in_words", "ratios_in_words"]


def norms_in_words(runs: Sequence[Run]) -> str:
    """How far the norm falls with its edge, how far below 2/η; and where gradient descent ends."""
    sharpness_aware, plain = _finished(runs, True), _finished(runs, False)
    words = []
    if sharpness_aware:
        start = [run.last.operator_norm / run.measurements.operator_norm.iloc[0] for run in sharpness_aware]
        plain_edge = [run.last.operator_norm / run.last.gd_edge for run in sharpness_aware]
        words.append(
            f"In the {len(sharpness_aware)} runs with ρ > 0 the norm ends at {_range(start)} times its first value, "
            f"and at {_range(plain_edge)} times 2/η."
        )
    if plain:
        ends = _each(plain, lambda run: run.last.operator_norm / run.last.gd_edge)
        places = ", ".join(f"{ratio:.2f} for η = {rate:g}" for (rate, _), ratio in ends)
        words.append(f"With ρ = 0 it ends at these multiples of 2/η: {places}.")
    return " ".join(words)


def ratios_in_words(runs: Sequence[Run]) -> str:
    """Where the ratio of norm and edge lies in the last half of training; and how λ falls at the edge."""
    sharpness_aware = _finished(runs, True)
    if not sharpness_aware:
        return ""
    halves = [last_half(run).edge_ratio for run in sharpness_aware]
    middles = [half.median() for half in halves]
    lows, highs = zip(*((half.min(), half.max()) for half in halves), strict=True)
    return (
        f"In the last half of training with ρ > 0 the norm is {np.median(middles):.2f} times the "
        f"{edge_of(sharpness_aware)} in the median over runs, {_range(middles)} times in each of them; single "
        f"measurements lie between {min(lows):.2f} and {max(highs):.2f}."
    ) + _falls(sharpness_aware, _finished(runs, False))


def _falls(sharpness_aware: Sequence[Run], plain: Sequence[Run]) -> str:
    """By how much λ falls from where a run is first near its edge, beside the same without SAM."""
    with_sam, without = (
        [found["fall"] for run in group if (found := fall_at_the_edge(run))] for group in (sharpness_aware, plain)
    )
    if not with_sam:
        return ""
    control = f"; without SAM, at 2/η, by {np.median(without):.2f}" if without else ""
    return (
        f" Once there, λ falls by a factor of {np.median(with_sam):.2f} in the median to the end of training{control}."
    )


def alignments_in_words(runs: Sequence[Run]) -> str:
    """How the two gradients align, each in the median of the last half of training."""
    sharpness_aware = _finished(runs, True)
    if not sharpness_aware:
        return ""
    halves = [last_half(run) for run in sharpness_aware]
    at, perturbed = (
        np.array([half[name].median() for half in halves]) for name in ("grad_alignment", "sam_grad_alignment")
    )
    return (
        f"In the last half of training the gradient at the perturbed point has |cos| = {np.median(perturbed):.2f} in "
        f"the median over runs, the gradient itself {np.median(at):.2f}; the former is the larger in "
        f"{(perturbed > at).sum()} of {len(halves)} runs."
    )


def losses_in_words(runs: Sequence[Run]) -> str:
    """Training loss and test metric at the end, of the largest radius against none, at each learning rate."""
    finished = [run for run in runs if run.outcome == "finished"]
    radii = sorted({run.config.rho for run in finished})
    if len(radii) < 2 or radii[0] > 0:
        return ""
    metric = find(finished[0].config.experiment).metric_name
    loss = dict(_each(finished, lambda run: run.last["loss"]))
    test = dict(_each(finished, lambda run: run.last["test_metric"]))
    words = [
        f"for η = {rate:g} the loss ends at {loss[rate, radii[-1]]:.2g} against {loss[rate, 0.0]:.2g}, the {metric} at "
        f"{test[rate, radii[-1]]:.3g} against {test[rate, 0.0]:.3g}"
        for rate in sorted({rate for rate, _ in loss})
        if {(rate, 0.0), (rate, radii[-1])} <= loss.keys()
    ]
    return f"With ρ = {radii[-1]:g} against ρ = 0, means over seeds: {'; '.join(words)}." if words else ""


def mean_in_words(values: ArrayLike, shown: str = ".4g", error: str | None = None) -> str:
    """The mean of values (n,) ± half their range, or ± its standard error where that has a format of its own."""
    values = np.asarray(values, float)
    if not len(values):
        return "–"
    spread = f"{sem(values):{error}}" if error else f"{np.ptp(values) / 2:.2g}"
    return f"{values.mean():{shown}}" + (f"\u00a0±\u00a0{spread}" if len(values) > 1 else "")


def _finished(runs: Iterable[Run], sharpness_aware: bool) -> list[Run]:
    return [run for run in runs if run.outcome == "finished" and run.config.sharpness_aware == sharpness_aware]


def _each(runs: Sequence[Run], value: Callable[[Run], float]) -> list[tuple[tuple[float, float], float]]:
    """A value for each (η, ρ), in the mean over seeds."""
    return [(place, float(np.mean([value(run) for run in group]))) for place, group in grouped(runs)]


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"
