"""A sweep: one notebook, many points. Planned and validated before a kernel starts; each point a folder on disk.

On disk: ``<out>/sweep.json`` (the plan), ``<out>/notebook.ipynb`` (the copy that is executed), ``<out>/runs`` (the run
store) and ``<out>/<point>/{params.json, executed.ipynb, status.json, progress.jsonl, log.txt}``. ``status.json`` is
written last: a point without one is not done, whatever else its folder holds.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import filelock

from ..files import as_path, as_text, atomic_write
from .configuration import SweepError
from .notebooks import NotebookError, Parameter, content_hash, kernel_of, parameters
from .points import COLUMNS, Point, Status, has_result, status_of

__all__ = ["Sweep", "SweepError", "load", "plan"]

_VERSION = 1


@dataclass(frozen=True)
class Sweep:
    """A validated plan.

    Attributes:
        notebook: the notebook.
        digest: hash of its cells.
        out: the sweep's folder.
        cwd: the kernels' working folder.
        store: whether each point gets ``store=<out>/runs``.
        points: what to execute.
        kernel: the kernel that was asked for; None for the notebook's own.
    """

    notebook: Path
    digest: str
    out: Path
    cwd: Path
    store: bool
    points: tuple[Point, ...]
    kernel: str | None = None

    @functools.cached_property
    def swept(self) -> list[str]:
        """The names that differ between points."""
        names = dict.fromkeys(name for point in self.points for name in point.params)
        return [n for n in names if len({json.dumps(p.params.get(n)) for p in self.points}) > 1]

    def label(self, point: Point) -> str:
        """A point in a line: what distinguishes it from the others."""
        shown = self.swept or list(point.params)
        return " ".join(f"{name}={point.params[name]}" for name in shown if name in point.params)

    def status(self, point: Point) -> Status | None:
        """How a point ended, or None if it did not yet."""
        return status_of(self.out / point.id)

    def left(self) -> list[Point]:
        """The points without a result."""
        return [p for p in self.points if not has_result(self.out / p.id)]

    def write(self) -> None:
        """Create the sweep's folder, or check that it holds this very sweep.

        Raises:
            SweepError: if the folder holds another sweep or something else.
        """
        if not (self.out / "sweep.json").exists():
            self._create()
        there = load(self.out)
        if there.digest != self.digest:
            difference = f"of another notebook, or of another version of {there.notebook.name} or of an experiment"
        elif {p.id for p in there.points} != {p.id for p in self.points}:
            difference = f"of {len(there.points)} other points"
        elif there.kernel != self.kernel:
            difference = f"with {there.kernel or 'the kernel that the notebook names'} as its kernel"
        else:
            return
        raise SweepError(f"--out {self.out} holds a sweep {difference}; give another folder")

    def _create(self) -> None:
        if self.out.is_symlink() and not self.out.exists():
            raise SweepError(f"--out {self.out} is a link that leads nowhere; give a folder")
        if self.out.exists() and not self.out.is_dir():
            raise SweepError(f"--out {self.out} is a file; give a folder")
        # What a sweep killed while it was being created may have left does not count, nor does what is hidden.
        there = [f.name for f in self.out.iterdir()] if self.out.exists() else []
        strangers = [
            name for name in there if name != "notebook.ipynb" and not name.endswith(".part") and name[0] != "."
        ]
        if strangers and not (self.out / "sweep.json").exists():
            raise SweepError(f"--out {self.out} holds other files ({strangers[0]}); give a new or an empty folder")
        plan = asdict(self) | {"version": _VERSION, "notebook": as_text(self.notebook), "cwd": as_text(self.cwd)}
        plan.pop("out")  # the folder may move
        self.out.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(self.out / ".lock"):  # the same sweep may be started several times at once
            if not (self.out / "sweep.json").exists():
                atomic_write(self.out / "notebook.ipynb", self.notebook.read_bytes())
                atomic_write(self.out / "sweep.json", json.dumps(plan, indent=1).encode())


def plan(
    notebook: str | os.PathLike[str],
    out: str | os.PathLike[str],
    settings: Mapping[str, Any] | None = None,
    grid: Mapping[str, Sequence[Any]] | None = None,
    points: Sequence[Mapping[str, Any]] | None = None,
    kernel: str | None = None,
) -> Sweep:
    """Validate a sweep; nothing is written and no kernel starts.

    Args:
        notebook: a papermill notebook.
        out: the sweep's folder.
        settings: parameters that all points share.
        grid: values of the parameters to combine.
        points: an explicit list of points; with a grid, each is combined with every point of the grid.
        kernel: the Jupyter kernel to execute it with; by default the one that the notebook names.

    Raises:
        SweepError: with all problems at once.
    """
    notebook, out = Path(notebook), Path(out)
    try:
        known, digest = parameters(notebook), content_hash(notebook)
        kernel_of(notebook, kernel)
    except NotebookError as error:
        raise SweepError(str(error)) from None
    if known == {}:
        raise SweepError(f"{notebook} has no parameters; give the tag 'parameters' to the cell that sets them")
    settings, grid, points = settings or {}, grid or {}, points if points is not None else [{}]
    grid = {name: _listed(values) for name, values in grid.items()}
    problems = [
        f"grid of {name} must be a list of values, got {values!r}"
        for name, values in grid.items()
        if not isinstance(values, list)
    ]
    problems += [f"each point must be parameters by name, got {p!r}" for p in points if not isinstance(p, Mapping)]
    if problems:
        raise SweepError(*problems)
    problems = [f"grid of {name} is empty; give at least one value" for name, values in grid.items() if not values]
    if not points:
        problems.append("the list of points is empty; give at least one point")
    if not grid and not any(points):
        problems.append("there is nothing to sweep; give --grid NAME=V1,V2,… or points in a configuration file")
    listed = {name for point in points for name in point}
    twice = (settings.keys() & grid.keys()) | (settings.keys() & listed) | (grid.keys() & listed)
    problems += [f"{n} is given twice; let it stand in one of settings, grid and points" for n in sorted(twice)]

    problems += [
        f"{name} is a column that the table of every sweep has; give the parameter another name in the notebook"
        for name in COLUMNS
        if name in {*settings, *grid, *listed}
    ]
    # Each value is converted once, before the product repeats it.
    shared = _convert(settings, known, problems)
    axes = [[_convert({name: value}, known, problems) for value in values] for name, values in grid.items()]
    rows = [_convert(point, known, problems) for point in points]
    if problems:
        raise SweepError(*dict.fromkeys(problems))

    combined = [
        functools.reduce(dict.__or__, combination, shared | row)
        for row in rows
        for combination in itertools.product(*axes)
    ]
    problems += _missing(combined, known)
    if known and {"experiment", "learning_rate", "rho"} <= known.keys():
        wrong, sources = _runs(combined, known)
        problems += wrong
        if sources:  # a reader's own experiments are part of what is swept, as the notebook is
            digest = hashlib.sha256(json.dumps([digest, *sources]).encode()).hexdigest()
    made = [Point(_identity(digest, params), params) for params in combined]
    problems += _repeated(made)
    if problems:
        raise SweepError(*problems)
    # A parameter of that name that takes no text means something else.
    text = known is not None and "store" in known and known["store"].kind.takes("text")
    own_store = text and not any("store" in p for p in combined)
    return Sweep(notebook.absolute(), digest, out.absolute(), Path.cwd(), own_store, tuple(made), kernel)


def _listed(values: Any) -> Any:
    """Values as a list, if they are several; else as they are."""
    if hasattr(values, "tolist"):
        return values.tolist()
    several = isinstance(values, Iterable) and not isinstance(values, str | bytes | Mapping)
    return list(values) if several else values


def _convert(params: Mapping[str, Any], known: dict[str, Parameter] | None, problems: list[str]) -> dict[str, Any]:
    """Parameters as the notebook's types; what is wrong with them is added to the problems."""
    values = {}
    for name, value in params.items():
        if known is not None and name not in known:
            problems.append(f"{name} is not a parameter of the notebook; there are {', '.join(known)}")
            continue
        parameter = known[name] if known is not None else Parameter(name)
        try:
            values[name] = parameter.convert(value)
        except ValueError as error:
            problems.append(str(error))
    return values


def _missing(points: Sequence[Mapping[str, Any]], known: dict[str, Parameter] | None) -> list[str]:
    required = {p.name for p in (known or {}).values() if p.required}
    names = sorted({name for point in points for name in required - point.keys()})
    return [f"{name} has no default in the notebook; give it with --set {name}=…" for name in names]


def _repeated(points: Sequence[Point]) -> list[str]:
    seen: set[str] = set()
    twice = [p for p in points if p.id in seen or seen.add(p.id)]  # type: ignore[func-returns-value]
    shown = [" ".join(f"{k}={v}" for k, v in p.params.items()) for p in twice]
    return [f"the point {text} occurs twice; let each occur once" for text in dict.fromkeys(shown)]


def _runs(points: Sequence[Mapping[str, Any]], known: dict[str, Parameter]) -> tuple[list[str], list[str]]:
    """The notebook trains a run: what is wrong with the runs' configurations, each problem once; and the hashes of
    readers' own experiments."""
    from pydantic import ValidationError

    from ..config import RunConfig, explain, of_notebook

    defaults = {name: parameter.default for name, parameter in known.items()}
    problems: dict[str, None] = {}
    sources = set()
    for point in points:
        twice = [name for name in point.get("settings") or {} if name in point or defaults.get(name) is not None]
        problems |= dict.fromkeys(f"{name} is given twice, by itself and in settings; give it once" for name in twice)
        try:
            sources.add(RunConfig(**of_notebook({**defaults, **point})).source)
        except ValidationError as error:
            problems |= dict.fromkeys(explain(error))
    return list(problems), sorted(filter(None, sources))


def _identity(digest: str, params: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps([digest, params], sort_keys=True).encode()).hexdigest()[:16]


def load(out: str | os.PathLike[str]) -> Sweep:
    """The sweep of a folder.

    Raises:
        SweepError: if the folder holds none, or one that another version wrote.
    """
    out = Path(out).absolute()
    try:
        content = json.loads((out / "sweep.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SweepError(f"{out} holds no sweep (no sweep.json); give the folder of a sweep") from None
    except (OSError, ValueError) as error:
        raise SweepError(f"{out / 'sweep.json'} cannot be read ({error})") from None
    if not isinstance(content, dict) or content.pop("version", None) != _VERSION:
        raise SweepError(f"{out} was written by another version of samlib; sweep into a new folder")
    try:
        points = tuple(Point(**point) for point in content.pop("points"))
        notebook, cwd = as_path(content.pop("notebook")), as_path(content.pop("cwd"))
        return Sweep(notebook=notebook, out=out, cwd=cwd, points=points, **content)
    except (KeyError, TypeError) as error:
        raise SweepError(f"{out / 'sweep.json'} cannot be read ({error})") from None
