"""Kill ``samlib run`` at random moments, again and again, and compare what comes out with an undisturbed run.

    python benchmarks/run_drill.py               # 100 kills over rules and bases, some minutes
    python benchmarks/run_drill.py --kills 12 --steps 300 --fork        # what the tests run, in seconds

Fails unless every measurement is the undisturbed one's, bit for bit, every run continued from its last checkpoint, none
was trained again after it was done, and nothing is left in the store but the finished run.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
from sweep_drill import check_journals, until

from samlib import RunConfig, RunStore, train, trajectory
from samlib.cli import app
from samlib.journal import PROGRESS, Journal

TARGET = Path(__file__).parent / "results" / "run_drill.json"
BASES: dict[str, dict[str, Any]] = {"sgd": {"momentum": 0.9}, "adam": {}}
RATES = {"sgd": 0.05, "adam": 0.003}
KEPT = {"config.json", "measurements.parquet", "status.json"}


class Forked:
    """``samlib run`` in a copy of this process, which has imported everything: that takes longer than the training."""

    def __init__(self, words: list[str], env: dict[str, str], log: Any) -> None:
        self.process = multiprocessing.get_context("fork").Process(target=self._run, args=(words, env, log.fileno()))
        self.process.start()

    def _run(self, words: list[str], env: dict[str, str], log: int) -> None:
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.update(env)
        trajectory.CHECKPOINT_SECONDS = float(env["SAMLIB_CHECKPOINT_SECONDS"])
        app(words)

    def poll(self) -> int | None:
        return self.process.exitcode

    def kill(self) -> None:
        self.process.kill()

    def wait(self) -> int | None:
        self.process.join()
        return self.process.exitcode


class Drill:
    """One run that is being killed."""

    def __init__(self, settings: dict[str, Any], folder: Path, randomness: random.Random, fork: bool) -> None:
        self.config = RunConfig(**settings)
        self.random, self.fork = randomness, fork
        self.store, self.log = RunStore(folder / "store"), folder / "log.txt"
        self.journal = Journal(folder / "journal.jsonl")
        self.step, self.kills = -1, Counter[str]()
        folder.mkdir(parents=True)
        given = {name: value for name, value in settings.items() if name != "experiment"}
        self.words = ["run", settings["experiment"], "--store", str(self.store.path)]
        self.words += [word for name, value in given.items() for word in ("--set", f"{name}={value}")]
        self.env = {PROGRESS: str(self.journal.path), "SAMLIB_CHECKPOINT_SECONDS": "0.05"}

    def start(self) -> Any:
        with self.log.open("ab") as log:
            if self.fork:
                return Forked(self.words, self.env, log)
            command, env = [sys.executable, "-m", "samlib.cli", *self.words], {**os.environ, **self.env}
            return subprocess.Popen(command, env=env, stdout=log, stderr=log)

    def reached(self) -> int:
        """The furthest step that was measured."""
        self.step = max([self.step, *(e["step"] for e in self.journal.read() if e["event"] == "step")])
        return self.step

    def kill(self, moment: int | None) -> None:
        """Start the run and kill it: soon after a step, or somewhere on its way there, imports and loading included."""
        process = self.start()
        if moment is None:
            time.sleep(self.random.uniform(0, 0.3 if self.fork else 3))  # the moment is random, nothing waits for it
        else:
            until(lambda: process.poll() is not None or self.reached() >= moment, f"step {moment}")
            time.sleep(self.random.uniform(0, 0.05))
        process.kill()
        ended = process.wait()
        self.kills["too late" if ended == 0 else "on the way" if moment is None else "in training"] += 1
        assert ended in (0, -9), self.log.read_text(encoding="utf-8")

    def finish(self) -> None:
        """Let it come to its end."""
        assert self.start().wait() == 0, self.log.read_text(encoding="utf-8")

    def compare(self) -> None:
        """The run is the undisturbed one, and nothing else is left."""
        undisturbed = train(self.config)
        run = self.store.load(undisturbed.id)
        assert run is not None
        rows = [r.measurements.drop(columns="seconds") for r in (run, undisturbed)]
        pd.testing.assert_frame_equal(*rows, check_exact=True)
        assert {path.name for path in self.store.folder(run.id).iterdir()} == KEPT
        assert "damaged" not in self.log.read_text(encoding="utf-8")


def moments(count: int, steps: int, randomness: random.Random) -> list[int | None]:
    """When to kill: at random steps, at the very end, where the run is being saved, and every fifth on the way."""
    early = count // 5
    chosen: list[int | None] = [*sorted(randomness.sample(range(1, steps), count - early - 1)), steps]
    for _ in range(early):
        chosen.insert(randomness.randrange(len(chosen)), None)
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--rules", default="sam,usam")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fork", action="store_true", help="start runs from a process that has imported everything")
    parser.add_argument("--write", action="store_true", help=f"write {TARGET.relative_to(Path(__file__).parents[1])}")
    options = parser.parse_args()

    folder, randomness = Path(tempfile.mkdtemp(prefix="drill")), random.Random(options.seed)
    small = {"experiment": "mnist", "rho": 0.1, "data": "standin", "examples": 100, "width": 16, "depth": 3}
    small |= {"steps": options.steps, "measure_every": 10}
    kinds = [(rule, base) for rule in options.rules.split(",") for base in BASES]
    if options.fork:  # what a run imports on its way
        importlib.import_module("torch._dynamo")
        RunConfig(**small, learning_rate=0.1).load_dataset()
    drills: dict[str, Drill] = {}
    for i, (rule, base) in enumerate(kinds):
        settings = {**small, "rule": rule, "base": base, "learning_rate": RATES[base], **BASES[base]}
        drill = drills[f"{rule} {base}"] = Drill(settings, folder / f"{rule}-{base}", randomness, options.fork)
        count = options.kills // len(kinds) + (i < options.kills % len(kinds))
        for moment in moments(count, options.steps, randomness):
            drill.kill(moment)
        drill.finish()
    result: dict[str, Any] = {}
    for name, drill in drills.items():  # last: who has trained can no longer be forked
        drill.compare()
        result[name] = {"kills": dict(drill.kills), **check_journals([drill.journal.path])}
        print(f"{name}: {result[name]}", flush=True)
    if options.write:
        TARGET.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
