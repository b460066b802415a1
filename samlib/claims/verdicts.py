"""All verdicts: of the paper's claims for each experiment, and of each chapter's; written down beside the runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from ..experiments import PROFILES, title
from ..files import atomic_write
from ..runs import published_path, published_runs
from ..selection import leading, standard
from .base import Evidence, Verdict, evaluate
from .chapters import CHAPTERS, published_toys
from .paper import CLAIMS

__all__ = ["agrees_with_record", "of_chapter", "of_experiment", "record", "recorded", "table", "verdicts"]


def verdicts(folder: Path | None = None) -> list[Verdict]:
    """All verdicts: on the paper's claims, claim by claim, then on the chapters' claims."""
    names = dict.fromkeys(name for claim in CLAIMS for name in claim.experiments)
    results = [verdict for name in names for verdict in of_experiment(name, folder)]
    results.sort(key=lambda verdict: CLAIMS.index(verdict.claim))
    return results + [verdict for name in CHAPTERS for verdict in of_chapter(name, folder)]


def of_experiment(name: str, folder: Path | None = None) -> list[Verdict]:
    """The verdicts on the paper's claims for an experiment: on each that of the leading profile, then those of the
    others that have runs on the claim."""
    published = published_runs(name, folder)
    leads = leading(published)
    results = []
    for claim in CLAIMS:
        if name not in claim.experiments:
            continue
        for profile in (leads, *(p for p in reversed(PROFILES) if p not in (leads, "quick"))):
            verdict = evaluate(claim, Evidence(standard(published, profile), {}), name, profile, profile == leads)
            if verdict.leading or verdict.total:
                results.append(verdict)
    return results


def of_chapter(name: str, folder: Path | None = None) -> list[Verdict]:
    """The verdicts on the claims of a chapter."""
    chapter = CHAPTERS[name]
    evidence = Evidence(published_runs(name, folder), published_toys(name, folder))
    return [evaluate(claim, evidence, name) for claim in chapter.claims]


def recorded(name: str, folder: Path | None = None) -> tuple[int, int]:
    """How many runs of a chapter are published, of those that it plans: till all are, its verdicts are provisional."""
    return len(published_runs(name, folder)), len(CHAPTERS[name].configs())


def _title(name: str) -> str:
    return CHAPTERS[name].title if name in CHAPTERS else title(name)


def table(results: Sequence[Verdict]) -> pd.DataFrame:
    """Verdicts as a table for a page or a terminal."""
    return pd.DataFrame(
        {
            "claim": [v.claim.text for v in results],
            "experiment": [_title(v.experiment) for v in results],
            "profile": [v.profile for v in results],
            "statistic": [f"{v.value:.3g} [{v.low:.3g}, {v.high:.3g}]" if v.total else "–" for v in results],
            "threshold": [v.claim.threshold for v in results],
            "supporting runs": [f"{v.supporting} of {v.total}" for v in results],
            "verdict": [v.outcome for v in results],
        }
    )


def record(results: Sequence[Verdict], folder: Path | None = None) -> None:
    """Write the verdicts down beside the published runs."""
    atomic_write(_record_path(folder), (json.dumps(_summary(results), indent=1) + "\n").encode())


def agrees_with_record(results: Sequence[Verdict], folder: Path | None = None) -> list[str]:
    """Differences between verdicts and those written down; empty if they agree."""
    path = _record_path(folder)
    recorded = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    computed = _summary(results)
    return [
        f"{name}: computed {computed.get(name)}, recorded {recorded.get(name)}"
        for name in sorted({*computed, *recorded})
        if computed.get(name) != recorded.get(name)
    ]


def _record_path(folder: Path | None) -> Path:
    return published_path("claims", folder).with_suffix(".json")


def _summary(results: Sequence[Verdict]) -> dict[str, str]:
    return {
        f"{v.claim.key}/{v.experiment}/{v.profile}": f"{v.outcome} ({v.supporting} of {v.total} {_units(v)})"
        for v in results
    }


def _units(verdict: Verdict) -> str:
    first, of, rest = verdict.claim.unit.partition(" of ")
    return f"{first}s{of}{rest}"
