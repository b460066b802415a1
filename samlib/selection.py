"""Which of many runs belong together: those of the published grid, the typical one, those beside the grid."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from .config import RunConfig, default_of
from .rules import RULES
from .runs import Run

__all__ = [
    "changed",
    "command",
    "edge_of",
    "grouped",
    "leading",
    "ordered",
    "standard",
    "tidy",
    "typical",
    "with_spectrum",
]


def command(run: Run) -> str:
    """The command that reproduces a run."""
    config = run.config
    text = (
        f"samlib run {config.experiment} --profile {config.profile} --learning-rate {config.learning_rate!r} "
        f"--rho {config.rho!r} --seed {config.seed}"
    )
    return text + "".join(f" --set {setting}" for setting in changed(run))


def changed(run: Run) -> list[str]:
    """The settings of a run, as "name=value", that differ from those of its profile."""
    named = ("experiment", "profile", "learning_rate", "rho", "seed", "device", "data", "compiled")
    chosen = run.config.model_dump(exclude={"source"})
    usual = RunConfig.model_validate({name: chosen[name] for name in named}).model_dump()
    usual = {name: usual.get(name, default_of(run.config, name)) for name in chosen}
    return [f"{name}={_plain(value)}" for name, value in chosen.items() if value != usual[name]]


def _plain(value: Any) -> str:
    """A setting as the command line takes it."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def standard(runs: Sequence[Run], profile: str | None = None) -> list[Run]:
    """The runs of a profile, by default the leading one, with its own settings: those that make up the published grid.

    Of a setting recorded twice, the newer version of the record counts, then the device on which more was recorded.
    """
    profile = profile or leading(runs)
    chosen = [run for run in runs if run.config.profile == profile and not changed(run)]
    recorded = Counter(run.config.device for run in chosen)
    chosen.sort(key=lambda run: (run.record, recorded[run.config.device]))
    return ordered({(run.config.learning_rate, run.config.rho, run.config.seed): run for run in chosen}.values())


def leading(runs: Sequence[Run]) -> str:
    """The profile that speaks for an experiment: the paper's, once a whole grid of it is published; else "reduced"."""
    grid = {(run.config.learning_rate, run.config.rho) for run in standard(runs, "paper")}
    rates, rhos = ({point[axis] for point in grid} for axis in (0, 1))
    whole = len(rates) >= 3 and len(rhos) >= 4 and 0.0 in rhos and len(grid) == len(rates) * len(rhos)
    return "paper" if whole else "reduced"


def typical(runs: Sequence[Run]) -> Run | None:
    """The run that tells the story: SAM at η = 0.3 and ρ = 0.1, or the standard run nearest to that; None of none."""
    done = [run for run in standard(runs) if run.config.sharpness_aware and run.outcome == "finished"]
    distance = [(abs(r.config.learning_rate - 0.3), abs(r.config.rho - 0.1), r.config.seed) for r in done]
    return done[distance.index(min(distance))] if done else None


def with_spectrum(runs: Sequence[Run]) -> list[Run]:
    """The runs that recorded more than one eigenvalue."""
    return [run for run in runs if run.config.eigenvalues > 1]


def tidy(runs: Sequence[Run], *columns: str) -> pd.DataFrame:
    """Chosen columns of several runs in one table, with the run's id, learning rate, rho and seed on every row."""
    frames = [
        run.measurements.reindex(columns=["step", *columns]).assign(
            run_id=run.id, learning_rate=run.config.learning_rate, rho=run.config.rho, seed=run.config.seed
        )
        for run in runs
    ]
    return pd.concat(frames, ignore_index=True)


def ordered(runs: Iterable[Run]) -> list[Run]:
    return sorted(runs, key=lambda run: (run.config.learning_rate, run.config.rho, run.config.seed))


def edge_of(runs: Sequence[Run]) -> str:
    """What the edge of some runs is called."""
    rules = {RULES[run.config.rule].title for run in runs if run.config.sharpness_aware}
    return f"{rules.pop()} edge" if len(rules) == 1 else "SAM edge" if not rules else "edge of the rule"


def grouped(runs: Sequence[Run]) -> list[tuple[tuple[float, float], list[Run]]]:
    groups: dict[tuple[float, float], list[Run]] = {}
    for run in ordered(runs):
        groups.setdefault((run.config.learning_rate, run.config.rho), []).append(run)
    return list(groups.items())
