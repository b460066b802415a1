"""What a step of the laboratory costs against another checkout of this project, such as an older commit.

    git worktree add /tmp/old 53aa32f          # the last commit before the laboratory
    python benchmarks/steps.py /tmp/old

Both train the same run, unmeasured but for its ends, in processes of their own that take turns, with one thread; the
processor time of a short run is subtracted from that of a long one, so that start-up, data and the measured ends do not
count.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

from common import record

LIMIT = 1.05
RUNS = {
    "mnist": {"learning_rate": 0.3, "rho": 0.1, "steps": (20, 100)},
    "mnist, GD": {"learning_rate": 0.3, "rho": 0.0, "steps": (20, 180)},
    "cifar10": {"learning_rate": 0.003, "rho": 0.1, "steps": (4, 44)},
    "shakespeare": {"learning_rate": 0.1, "rho": 0.1, "steps": (4, 124)},
}
CODE = """
import sys, time
import torch
from samlib import RunConfig, train
torch.set_num_threads(1)
name, learning_rate, rho, *steps = sys.argv[1:]
seconds = []
for count in map(int, steps):
    config = RunConfig(experiment=name.split(",")[0], device="cpu", learning_rate=float(learning_rate), rho=float(rho),
                       steps=count, measure_every=count)
    train(config)
    started = time.process_time()
    train(config)
    seconds.append(time.process_time() - started)
print((seconds[1] - seconds[0]) / (int(steps[1]) - int(steps[0])))
"""


def seconds_per_step(checkout: Path, name: str) -> float:
    setting = RUNS[name]
    short, long = setting["steps"]  # type: ignore[misc]
    command = [sys.executable, "-c", CODE, name, setting["learning_rate"], setting["rho"], short, long]
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    done = subprocess.run(
        [str(part) for part in command], env=environment, capture_output=True, encoding="utf-8", check=True
    )
    return float(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="a checkout to compare with")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    here = Path(__file__).resolve().parents[1]
    other = subprocess.run(
        ["git", "-C", str(options.other), "rev-parse", "--short=12", "HEAD"],
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    ratios = {}
    for name in RUNS:
        pairs = [(seconds_per_step(here, name), seconds_per_step(options.other, name)) for _ in range(options.repeats)]
        ratios[name] = {
            "milliseconds": 1e3 * statistics.median(ours for ours, _ in pairs),
            "ratio": statistics.median(ours / theirs for ours, theirs in pairs),
            "ratios": sorted(ours / theirs for ours, theirs in pairs),
        }
    record("steps", {"limits": {"ratio": LIMIT}, "against": other.stdout.strip(), "steps": ratios})


if __name__ == "__main__":
    main()
