"""Kill ``samlib run`` at random moments, again and again, and compare what comes out with an undisturbed run.

    python benchmarks/run_drill.py               # 100 kills over rules and bases, some minutes
    python benchmarks/run_drill.py --kills 12 --steps 400       # what the tests run

Fails unless every measurement is the undisturbed one's, bit for bit, every run continued from its last checkpoint, none
was trained again after it was done, and nothing is left in the store but the finished run.
"""

from __future__ import annotations

import argparse
import json
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

from samlib import RunConfig, RunStore, train
from samlib.journal import PROGRESS, Journal

TARGET = Path(__file__).parent / "results" / "run_drill.json"
BASES: dict[str, dict[str, Any]] = {"sgd": {"momentum": 0.9}, "adam": {}}
RATES = {"sgd": 0.05, "adam": 0.003}
KEPT = {"config.json", "measurements.parquet", "status.json"}


class Drill:
    """One run that is being killed."""

    def __init__(self, settings: dict[str, Any], folder: Path, randomness: random.Random) -> None:
        self.config = RunConfig(**settings)
        self.steps, self.random = self.config.steps, randomness
        self.store, self.log = RunStore(folder / "store"), folder / "log.txt"
        self.journal = Journal(folder / "journal.jsonl")
        self.step, self.kills = -1, Counter[str]()
        folder.mkdir(parents=True)
        given = {name: value for name, value in settings.items() if name != "experiment"}
        self.command = [
            sys.executable,
            "-m",
            "samlib.cli",
            "run",
            settings["experiment"],
            "--store",
            str(self.store.path),
        ]
        self.command += [word for name, value in given.items() for word in ("--set", f"{name}={value}")]
        self.env = {**os.environ, PROGRESS: str(self.journal.path), "SAMLIB_CHECKPOINT_SECONDS": "0.05"}

    def start(self) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            return subprocess.Popen(self.command, env=self.env, stdout=log, stderr=log)

    def reached(self) -> int:
        """The furthest step that was measured."""
        self.step = max([self.step, *(e["step"] for e in self.journal.read() if e["event"] == "step")])
        return self.step

    def kill(self, moment: int | None) -> None:
        """Start the run and kill it: soon after a step, or somewhere on its way there, imports and loading included."""
        process = self.start()
        if moment is None:
            time.sleep(self.random.uniform(0, 3))  # the moment is random, nothing waits for it
        else:
            until(lambda: process.poll() is not None or self.reached() >= moment, f"step {moment}")
            time.sleep(self.random.uniform(0, 0.05))
        process.kill()
        ended = process.wait()
        self.kills["too late" if ended == 0 else "on the way" if moment is None else "in training"] += 1
        assert ended in (0, -9), self.log.read_text(encoding="utf-8")

    def finish(self) -> None:
        """Let it come to its end, and compare."""
        assert self.start().wait() == 0, self.log.read_text(encoding="utf-8")
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
    parser.add_argument("--write", action="store_true", help=f"write {TARGET.relative_to(Path(__file__).parents[1])}")
    options = parser.parse_args()

    folder, randomness = Path(tempfile.mkdtemp(prefix="drill")), random.Random(options.seed)
    small = {"experiment": "mnist", "rho": 0.1, "data": "standin", "examples": 100, "width": 16, "depth": 3}
    small |= {"steps": options.steps, "measure_every": 10}
    kinds = [(rule, base) for rule in options.rules.split(",") for base in BASES]
    result: dict[str, Any] = {}
    for i, (rule, base) in enumerate(kinds):
        settings = {**small, "rule": rule, "base": base, "learning_rate": RATES[base], **BASES[base]}
        drill = Drill(settings, folder / f"{rule}-{base}", randomness)
        count = options.kills // len(kinds) + (i < options.kills % len(kinds))
        for moment in moments(count, options.steps, randomness):
            drill.kill(moment)
        drill.finish()
        result[f"{rule} {base}"] = {**drill.kills, **check_journals([drill.journal.path])}
        print(f"{rule} {base}: {result[f'{rule} {base}']}", flush=True)
    if options.write:
        TARGET.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
