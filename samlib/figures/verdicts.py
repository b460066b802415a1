"""Verdicts as a list that one sees at a glance: a row per claim, and all that is behind it in a fold."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import numpy as np
from IPython.display import HTML

from ..claims import CHAPTERS, PARTLY, REPRODUCED, Verdict, recorded
from ..experiments import title
from ..runs import Run
from .shapes import SHOWN, forest
from .style import Figure

__all__ = ["chapter", "claims", "fold", "judge", "outcome", "said"]

WIDTH, HEIGHT = 110, 16  # of the strip that shows a share, in pixels


def outcome(verdict: Verdict) -> str:
    """The verdict as HTML: a shape, which alone has a colour, and a word."""
    shape, colour = SHOWN[verdict.outcome]
    return f'<b aria-hidden="true" style="color:{colour}">{shape}</b> {verdict.outcome}'


def said(verdict: Verdict) -> str:
    """The verdict within a sentence, in Markdown: a shape, a word, and how many units support the claim."""
    shape, _ = SHOWN[verdict.outcome]
    counts = f" ({verdict.supporting} of {verdict.total})" if verdict.total else ""
    return f"{shape} **{verdict.outcome}**{counts}"


def judge(
    verdict: Verdict, label: Callable[[Any], str] | None = None, *, log: bool = False, runs: Sequence[Run] = ()
) -> Figure | HTML:
    """A claim with its verdict: the forest plot of its units, or that it is not recorded yet.

    Args:
        verdict: with or without units.
        label, log: as for :func:`samlib.figures.forest`.
        runs: those behind it are told, if it is among them.
    """
    if not verdict.total:
        return HTML(f"<p><strong>{html.escape(verdict.claim.text)}</strong> Not recorded yet.</p>")
    behind = set(" ".join(verdict.details.run_id).split())
    return replace(forest(verdict, label, log), runs=tuple(run for run in runs if run.id in behind))


def claims(results: Sequence[Verdict], name: str, note: str = "") -> HTML:
    """A row per claim: its text, and for each experiment the verdict, the share of units that support it, the
    statistic; behind it the forest plots and all numbers.

    Args:
        results: verdicts, those on the same claim one after the other.
        name: of the group; the link to a claim is ``#<name>-<key>``.
        note: on all of them.
    """
    rows = "".join(_fold(list(group), name) for _, group in groupby(results, key=lambda verdict: verdict.claim.key))
    marks = "".join(
        f'<text x="{WIDTH * share}" y="12" font-size="12" text-anchor="middle" fill="currentColor">{share:.0%}</text>'
        for share in (PARTLY, REPRODUCED)
    )
    where = "<span></span>" if any(map(_where, results)) else ""
    head = (
        f"<div class='samlib-claims-head'><b>{html.escape(note)}</b><span class='samlib-standing' aria-hidden='true'>"
        f"{where}<span></span>{_strip(marks)}<span>support it</span><span>statistic [95 %]</span></span></div>"
    )
    return HTML(f'<div class="samlib-claims full-width{" samlib-by-place" * bool(where)}">{head}{rows}</div>')


def chapter(results: Sequence[Verdict]) -> HTML:
    """The claims of a chapter, as :func:`claims`; while not all of its runs are recorded, it says that they are
    provisional."""
    name = results[0].experiment
    done, planned = recorded(name)
    note = f"Provisional: {done} of {planned} runs are recorded." if done < planned else ""
    return claims(results, name, note)


def fold(title: str, lines: Sequence[str]) -> HTML:
    """A list behind its title."""
    listed = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return HTML(f'<details class="samlib-fold"><summary>{html.escape(title)}</summary><ul>{listed}</ul></details>')


def _fold(verdicts: list[Verdict], name: str) -> str:
    claim = verdicts[0].claim
    standings = "".join(_standing(verdict) for verdict in verdicts)
    facts = {
        "Made in": claim.original,
        "Unit": claim.unit,
        "Statistic": claim.statistic,
        "Wanted": claim.threshold,
        "Expected after trials": claim.expected,
    }
    listed = "".join(f"<dt>{word}</dt><dd>{html.escape(text)}</dd>" for word, text in facts.items() if text)
    link = f"{name}-{claim.key}"
    return (
        f'<details class="samlib-fold"><summary><h3 id="{link}">{html.escape(claim.text)}</h3>{standings}</summary>'
        f"<dl>{listed}</dl>{''.join(_evidence(verdict) for verdict in verdicts)}"
        f'<p><a href="#{link}">Link to this claim</a></p></details>'
    )


def _standing(verdict: Verdict) -> str:
    """One line: where, the verdict, the share as a picture and in numbers, the statistic."""
    share = verdict.supporting / verdict.total if verdict.total else np.nan
    shape, colour = SHOWN[verdict.outcome]
    bar = counts = numbers = ""
    if verdict.total:
        bar = (
            f'<path d="M0 8H{WIDTH * share:.1f}" stroke="{colour}" stroke-width="5"/>'
            f'<circle cx="{WIDTH * share:.1f}" cy="8" r="4" stroke="{colour}" stroke-width="2" '
            f'fill="{colour if shape == "●" else "none"}"/>'
        )
        counts = f"{verdict.supporting} of {verdict.total}"
        numbers = f"{verdict.value:.3g} [{verdict.low:.3g}, {verdict.high:.3g}]".replace("-", "−")
    lines = "".join(
        f'<path d="M{WIDTH * at} 0V16" stroke="currentColor" stroke-opacity="0.5"/>' for at in (PARTLY, REPRODUCED)
    )
    ground = f'<path d="M0 8H{WIDTH}" stroke="currentColor" stroke-opacity="0.25"/>'
    where = f"<span>{_where(verdict)}</span>" if _where(verdict) else ""
    return (
        f'<span class="samlib-standing">{where}<span>{outcome(verdict)}</span>'
        f"{_strip(ground + lines + bar)}<span>{counts}</span><span>{numbers}</span></span>"
    )


def _strip(inner: str) -> str:
    return (
        f'<svg aria-hidden="true" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" overflow="visible">'
        f"{inner}</svg>"
    )


def _where(verdict: Verdict) -> str:
    """The experiment; of a chapter nothing, its claims stand under its name."""
    if verdict.experiment in CHAPTERS:
        return ""
    return title(verdict.experiment) + ("" if verdict.leading else f", {verdict.profile}")


def _evidence(verdict: Verdict) -> str:
    where = f"{_where(verdict)}, profile {verdict.profile}" if _where(verdict) else ""
    head = f"<h4>{where}</h4>" if where else ""
    if not verdict.total:
        return f"{head}<p>Not recorded.</p>"
    numbers = verdict.details.drop(columns="run_id").to_html(index=False, border=0, float_format="{:.3f}".format)
    ids = ", ".join(f"<code>{i}</code>" for i in verdict.details.run_id if i)
    table = (
        f'<div class="samlib-numbers" tabindex="0" role="region" aria-label="All numbers">{numbers}<p>{ids}</p></div>'
    )
    behind = f"<details><summary>All numbers, and run ids</summary>{table}</details>"
    return f"{head}{forest(verdict)._repr_html_()}{behind}"
