"""The configuration file of a sweep."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from .kinds import load_yaml

__all__ = ["SweepError", "read_config"]

_RANGES = ("linspace", "logspace", "geomspace")  # as NumPy defines them


class SweepError(ValueError):
    """A request that cannot be carried out; one line per problem."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A YAML file with ``set``, ``grid``, ``ranges`` and ``points`` as the arguments of :func:`plan`.

    Ranges become part of the grid: ``ranges: {rho: {logspace: [-2, 0, 5]}}`` is NumPy's ``logspace(-2, 0, 5)``;
    likewise ``linspace`` and ``geomspace``.

    Raises:
        SweepError: if the file cannot be read or is not of this form.
    """
    path = Path(path)
    try:
        content = load_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise SweepError(f"--config {path} is not a readable YAML file: {reason}") from None
    form = {"set": dict, "grid": dict, "ranges": dict, "points": list}
    if not isinstance(content, dict) or not content:
        raise SweepError(f"--config {path} must hold some of {', '.join(form)}")
    problems = [f"--config {path}: {k} is unknown; there are {', '.join(form)}" for k in content.keys() - form.keys()]
    for name, kind in form.items():
        if name in content and not isinstance(content[name], kind):
            wanted = "a list" if kind is list else "names with values"
            problems.append(f"--config {path}: {name} must be {wanted}, got {content[name]!r}")
    if problems:
        raise SweepError(*problems)
    grid, points = {}, content.get("points")
    for name, values in content.get("grid", {}).items():
        if not isinstance(values, list):
            problems.append(f"--config {path}: grid of {name} must be a list, got {values!r}")
        grid[str(name)] = values
    for name, spec in content.get("ranges", {}).items():
        try:
            values = _range(spec)
        except (ValueError, TypeError):
            problems.append(
                f"--config {path}: range of {name} must be one of {', '.join(_RANGES)} with [start, stop, count], "
                f"got {spec!r}"
            )
            continue
        if name in grid:
            problems.append(f"--config {path}: {name} stands in both grid and ranges; let it stand in one")
        grid[str(name)] = values
    problems += [
        f"--config {path}: a point must be names with values, got {p!r}" for p in points or () if not _named(p)
    ]
    if problems:
        raise SweepError(*problems)
    return {"settings": content.get("set", {}), "grid": grid, "points": points}


def _named(point: Any) -> bool:
    return isinstance(point, dict) and bool(point) and all(isinstance(name, str) for name in point)


def _range(spec: Any) -> list[float]:
    import numpy as np

    [(kind, arguments)] = spec.items() if isinstance(spec, dict) else [(None, None)]
    if kind not in _RANGES or not isinstance(arguments, list):
        raise ValueError
    start, stop, count = arguments
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError
    return [float(v) for v in getattr(np, kind)(float(start), float(stop), count)]
