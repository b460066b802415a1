"""Runs as durable objects: configuration, measurements, status and checkpoint on disk, found by the run's id."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import filelock
import pandas as pd
import torch
from pydantic import ValidationError

from .config import RunConfig
from .files import PROJECT, atomic_write
from .settings import explain

__all__ = [
    "Run",
    "RunStore",
    "StoreError",
    "atomic_write",
    "load_published",
    "publish",
    "published_path",
    "published_runs",
]

Outcome = Literal["finished", "diverged"]


class StoreError(Exception):
    """A store or a published file that cannot be used; the message says why."""


@dataclass(frozen=True)
class Run:
    """A completed run.

    Attributes:
        id: :meth:`RunConfig.identity` of configuration and data.
        config: what was asked for.
        measurements: one row per measured step, see :func:`samlib.observables.edge` for the columns.
        outcome: "finished", or "diverged" at the step of the last row, where all but the loss is NaN.
        provenance: versions, device, threads, data set and fingerprint, seconds, gradients and products computed.
        path: what was read at every step, one row per step, or None if nothing was.
    """

    id: str
    config: RunConfig
    measurements: pd.DataFrame
    outcome: Outcome
    provenance: dict[str, Any]
    path: pd.DataFrame | None = None

    @property
    def record(self) -> int:
        """The version of the record: what an older one differs in says the page of deviations."""
        return self.provenance.get("record", 1)

    @property
    def last(self) -> pd.Series:
        """The last measurement."""
        return self.measurements.iloc[-1]

    def __str__(self) -> str:
        config, last = self.config, self.last
        line = f"{config.experiment} η={config.learning_rate:g} ρ={config.rho:g} seed {config.seed}"
        if self.outcome == "diverged":
            return f"{self.id}  diverged at step {last.step:.0f}  {line}"
        names = ("loss", "operator_norm", "edge", "edge_ratio", "test_metric")
        shown = [f"{name.replace('_', ' ')} {last[name]:.4g}" for name in names if name in last]
        return f"{self.id}  finished  {line}: " + ", ".join(shown)


class RunStore:
    """A folder of runs, ``<store>/<run id>/{config.json, measurements.parquet, status.json, checkpoint.pt}``.

    Every file is written under a temporary name and renamed, ``status.json`` last: a run with a status is complete.

    Args:
        path: the folder; created when first written to.

    Raises:
        StoreError: if the path is a file or cannot be created. A store that cannot be written can be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if not os.fspath(path):
            raise StoreError("store '' is not a folder; give its path")
        self.path = Path(path)
        try:
            if self.path.is_dir():  # that it cannot be written matters when something is to be
                return
            if self.path.exists() or self.path.is_symlink():
                raise StoreError(f"store {self.path} is a file; give a folder")
            existing = next(p for p in self.path.absolute().parents if p.exists())
            probe = existing / f".samlib-{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise self._unwritable(error) from None

    def _unwritable(self, error: OSError) -> StoreError:
        return StoreError(f"store {self.path} is not writable ({error.strerror}); give another folder")

    def folder(self, run_id: str) -> Path:
        return self.path / run_id

    @contextmanager
    def lock(self, run_id: str) -> Iterator[None]:
        """Hold a run for this process; another process that asks for it waits. A killed process lets go.

        Raises:
            StoreError: if the store cannot be written.
        """
        locks = self.path / ".locks"
        lock = filelock.FileLock(locks / run_id)
        try:
            locks.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except filelock.Timeout:
            warnings.warn(f"another process is training run {run_id}; waiting for it", stacklevel=3)
            lock.acquire()
        except OSError as error:
            raise self._unwritable(error) from None
        try:
            if self.folder(run_id).exists() and not os.access(self.folder(run_id), os.W_OK):
                raise self._unwritable(PermissionError(errno.EACCES, os.strerror(errno.EACCES)))
            for part in self.folder(run_id).glob("*.part"):  # what a killed process was writing
                part.unlink(missing_ok=True)
            yield
        finally:
            lock.release()

    def load(self, run_id: str) -> Run | None:
        """A completed run, or None. A damaged record is set aside under another name, with a warning."""
        folder = self.folder(run_id)
        if not (folder / "status.json").exists():
            return None
        try:
            status = json.loads((folder / "status.json").read_text(encoding="utf-8"))
            content = (folder / "measurements.parquet").read_bytes()
            config = stored_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))
            path = (folder / "path.parquet").read_bytes() if status.get("path") else b""
            if _checksum(content + path, status["outcome"], status["provenance"]) != status["sha256"]:
                raise ValueError("measurements.parquet, path.parquet or status.json does not match the checksum")
            if config.identity(status["provenance"]["fingerprint"], status["provenance"].get("record", 1)) != run_id:
                raise ValueError("config.json does not belong to this run")
            measurements = _with_edge(pd.read_parquet(io.BytesIO(content)))
            steps = pd.read_parquet(io.BytesIO(path)) if path else None
            return Run(run_id, config, measurements, status["outcome"], status["provenance"], steps)
        except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
            reason = "; ".join(explain(error)) if isinstance(error, ValidationError) else error
            warnings.warn(f"record of run {run_id} is damaged ({reason}); {self._set_aside(folder)}", stacklevel=2)
            return None

    def save(self, run: Run) -> None:
        """Store a completed run and drop its checkpoint."""
        folder = self.folder(run.id)
        content = _parquet(run.measurements)
        path = _parquet(run.path) if run.path is not None else b""
        status = {
            "outcome": run.outcome,
            "step": int(run.last.step),
            "sha256": _checksum(content + path, run.outcome, run.provenance),
            "provenance": run.provenance,
            **({"path": True} if path else {}),
        }
        atomic_write(folder / "config.json", json.dumps(run.config.model_dump(mode="json"), indent=1).encode())
        atomic_write(folder / "measurements.parquet", content)
        if path:
            atomic_write(folder / "path.parquet", path)
        atomic_write(folder / "status.json", json.dumps(status, indent=1).encode())
        (folder / "checkpoint.pt").unlink(missing_ok=True)

    def adopt(self, runs: Iterable[Run]) -> None:
        """Take over completed runs, published ones say, so that they are not trained again."""
        for run in runs:
            if self.load(run.id) is None:
                with self.lock(run.id):
                    if self.load(run.id) is None:
                        self.save(run)

    def save_checkpoint(self, run_id: str, state: dict[str, Any]) -> None:
        """Store what is needed to continue a run: tensors and plain Python values."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        # torch.load does not notice a flipped bit, so the file starts with its checksum.
        content = buffer.getvalue()
        atomic_write(self.folder(run_id) / "checkpoint.pt", hashlib.sha256(content).digest() + content)

    def load_checkpoint(self, run_id: str, device: str) -> dict[str, Any] | None:
        """The state to continue from, or None. A damaged checkpoint is set aside, with a warning."""
        path = self.folder(run_id) / "checkpoint.pt"
        if not path.exists():
            return None
        stored = path.read_bytes()
        checksum, content = stored[:32], stored[32:]
        if hashlib.sha256(content).digest() == checksum:
            return torch.load(io.BytesIO(content), map_location=device, weights_only=True)
        warnings.warn(f"checkpoint of run {run_id} is damaged; {self._set_aside(path)}, starting anew", stacklevel=2)
        return None

    def _set_aside(self, path: Path) -> str:
        number = 1
        while (aside := path.with_name(f"{path.name}.damaged-{number}")).exists():
            number += 1
        try:
            with suppress(FileNotFoundError):  # another process was faster
                path.rename(aside)
        except OSError as error:
            return f"left where it is ({error.strerror})"
        return f"set aside as {aside}"


def stored_config(settings: dict[str, Any]) -> RunConfig:
    """The configuration of a record. A reader's own experiment may have changed since, or be elsewhere."""
    if settings.get("source"):
        return RunConfig.model_validate(settings, context={"stored": True})
    return RunConfig(**settings)


def _parquet(frame: pd.DataFrame) -> bytes:
    buffer = io.BytesIO()
    frame.to_parquet(buffer, index=False)
    return buffer.getvalue()


def _with_edge(rows: pd.DataFrame) -> pd.DataFrame:
    """Records from before there was more than one rule have the SAM edge alone."""
    return rows if "edge" in rows or "sam_edge" not in rows else rows.assign(edge=rows.sam_edge)


def _checksum(measurements: bytes, outcome: str, provenance: dict[str, Any]) -> str:
    about = json.dumps([outcome, provenance], sort_keys=True)
    return hashlib.sha256(measurements + about.encode()).hexdigest()


# Published runs: one Parquet file per experiment. Its rows are the measurements, with the run's id and grid position;
# configuration, outcome and provenance of each run stand as JSON in the file's metadata, under this key.
_RUNS_KEY = b"samlib.runs"


def published_path(experiment: str, folder: str | os.PathLike[str] | None = None) -> Path:
    """Where an experiment's published runs are: ``data/published/<experiment>.parquet`` of the project."""
    root = Path(folder) if folder else (PROJECT or Path()) / "data" / "published"
    return root / f"{experiment}.parquet"


def published_runs(experiment: str, folder: str | os.PathLike[str] | None = None) -> list[Run]:
    """An experiment's published runs; none if nothing is published yet."""
    path = published_path(experiment, folder)
    return load_published(path) if path.exists() else []


def publish(runs: Iterable[Run], path: Path) -> list[Run]:
    """Merge runs into a published file, replacing those with the same id, and those of an older version of the
    record with the same configuration and data; return all that it now holds.

    Raises:
        StoreError: if a run used stand-in data.
    """
    runs = list(runs)
    for run in runs:
        if run.provenance["standin"]:
            raise StoreError(f"run {run.id} used {run.provenance['dataset']}; only runs on real data can be published")
    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{path}.lock"):
        return _merge(runs, path)


def _merge(runs: list[Run], path: Path) -> list[Run]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    merged = {run.id: run for run in (load_published(path) if path.exists() else [])} | {run.id: run for run in runs}
    by_age = sorted(merged.values(), key=lambda run: run.record)
    newest = {(run.config, run.provenance["fingerprint"]): run for run in by_age}
    ordered = sorted(
        newest.values(), key=lambda r: (r.config.profile, r.config.learning_rate, r.config.rho, r.config.seed, r.id)
    )
    grid = ("profile", "learning_rate", "rho", "seed")
    frames = [
        r.measurements.assign(run_id=r.id, **{name: getattr(r.config, name) for name in grid}).set_index(
            ["run_id", *grid]
        )
        for r in ordered
    ]
    about = {r.id: {"config": r.config.model_dump(), "outcome": r.outcome, "provenance": r.provenance} for r in ordered}
    table = pa.Table.from_pandas(pd.concat(frames).reset_index(), preserve_index=False)
    buffer = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({_RUNS_KEY: json.dumps(about).encode()}), buffer, compression="zstd")
    atomic_write(path, buffer.getvalue())
    steps = [run.path.assign(run_id=run.id) for run in ordered if run.path is not None]
    if steps:
        buffer = io.BytesIO()
        pd.concat(steps, ignore_index=True).to_parquet(buffer, index=False, compression="zstd")
        atomic_write(_paths_beside(path), buffer.getvalue())
    return ordered


def _paths_beside(published: Path) -> Path:
    """Where what was read at every step of published runs is kept."""
    return published.with_suffix(".paths.parquet")


def load_published(path: str | os.PathLike[str]) -> list[Run]:
    """The runs of a published file.

    Raises:
        StoreError: if the file is missing or is not a file of published runs.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
        about = json.loads((table.schema.metadata or {})[_RUNS_KEY])
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        raise StoreError(f"{path} is not a file of published runs ({error})") from None
    rows = dict(iter(table.to_pandas().groupby("run_id", sort=False)))
    beside = _paths_beside(Path(path))
    paths = dict(iter(pd.read_parquet(beside).groupby("run_id", sort=False))) if beside.exists() else {}
    runs = []
    for run_id, run in about.items():
        config = stored_config(run["config"])
        frame = rows[run_id].drop(columns=["run_id", "profile", "learning_rate", "rho", "seed"])
        frame = frame.dropna(axis=1, how="all").reset_index(drop=True)
        steps = paths[run_id].drop(columns="run_id").reset_index(drop=True) if run_id in paths else None
        runs.append(Run(run_id, config, _with_edge(frame), run["outcome"], run["provenance"], steps))
    return runs
