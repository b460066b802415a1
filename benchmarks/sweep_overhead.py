"""What the sweep engine costs: time beyond the notebooks' own work, the gain of a second job, and 1,000 points.

    python benchmarks/sweep_overhead.py            # minutes, on an otherwise idle machine
    python benchmarks/sweep_overhead.py --points 2 --steps 50 --dry      # does it run at all

Engine time = wall time − the notebooks' cells (training, figures, imports) − kernel starts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client.manager import KernelManager

from samlib.journal import append
from samlib.sweeps import engines as sweep_run
from samlib.sweeps import planning as sweep
from samlib.sweeps import points, progress
from samlib.sweeps import report as sweep_report
from samlib.sweeps.executing import Execution
from samlib.sweeps.progress import Reporter

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "benchmarks" / "results" / "sweep_overhead.json"
# One thread per job in all measurements: the gain of a second job is then the engine's, not that of PyTorch's threads,
# which otherwise give a single job both cores.
os.environ["OMP_NUM_THREADS"] = "1"
LIMITS = {"engine_share": 0.05, "two_jobs": 0.6, "planning_seconds": 2.0, "report_seconds": 10.0}


def kernel_start(repeats: int = 5) -> float:
    """Median seconds to start a kernel, wait until it answers, and shut it down."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        manager = KernelManager()
        manager.start_kernel()
        client = manager.client()
        client.start_channels()
        client.wait_for_ready(timeout=120)
        client.stop_channels()
        manager.shutdown_kernel()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def digits(folder: Path, points: int, steps: int, jobs: int) -> tuple[float, float]:
    """Wall seconds of a sweep over the digits stand-in, and seconds of all cells in it."""
    rates = ",".join(str(round(0.1 + 0.05 * i, 2)) for i in range(points // 2))
    command = [sys.executable, "-m", "samlib.cli", "sweep", str(ROOT / "notebooks" / "run.ipynb")]
    command += ["--grid", f"learning_rate={rates}", "--grid", "rho=0,0.1", "--set", "data=standin"]
    command += ["--set", f"steps={steps}", "--out", str(folder), "--jobs", str(jobs)]
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    wall = time.perf_counter() - started
    cells = 0.0
    for path in folder.glob("*/executed.ipynb"):
        notebook = nbformat.read(path, as_version=4)
        cells += sum(c.metadata.papermill.duration or 0 for c in notebook.cells if c.cell_type == "code")
    return wall, cells


def thousand(folder: Path) -> dict[str, Any]:
    """Planning, the engine's loop and the report with 1,000 points, the execution itself left out."""
    folder.mkdir(parents=True)
    path = folder / "trivial.ipynb"
    cell = nbformat.v4.new_code_cell("x: float = 0.0\ny: float = 0.0", metadata={"tags": ["parameters"]})
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata=kernel), path)
    axes = {"x": [str(i) for i in range(40)], "y": [str(i) for i in range(25)]}
    options = [part for name, values in axes.items() for part in ("--grid", f"{name}={','.join(values)}")]
    command = [sys.executable, "-m", "samlib.cli", "sweep", str(path), "--out", str(folder / "out"), "--dry-run"]
    started = time.perf_counter()
    subprocess.run([*command, *options], check=True, capture_output=True)
    planning = time.perf_counter() - started

    def execute(source: Path, target: Path, values: dict[str, Any], *_: Any, **__: Any) -> Execution:
        append(target.with_name("progress.jsonl"), "record", values={"product": values["x"] * values["y"]})
        target.write_text("{}", encoding="utf-8")
        return Execution("finished", "", 1.0)

    real, points.execute = points.execute, execute  # type: ignore[assignment]
    try:
        planned = sweep.plan(path, folder / "out", grid=axes)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        started = time.perf_counter()
        reporter = Reporter(planned, show=lambda line: None)
        sweep_run.run(planned, sweep_run.Local(2), reporter=reporter)
        loop = time.perf_counter() - started
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    finally:
        points.execute = real
    started = time.perf_counter()
    frame = sweep_report.report(folder / "out")
    assert len(frame) == 1000
    return {
        "planning_seconds": planning,
        "loop_seconds": loop,
        "loop_memory_growth_mib": grown,
        "report_seconds": time.perf_counter() - started,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=12)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--dry", action="store_true", help="write nothing, hold to no limits")
    options = parser.parse_args()

    folder = Path(tempfile.mkdtemp(prefix="overhead"))
    start = kernel_start()
    wall_1, cells_1 = digits(folder / "one", options.points, options.steps, 1)
    wall_2, _ = digits(folder / "two", options.points, options.steps, 2)
    result = {
        "points": options.points,
        "steps": options.steps,
        "cores": progress.cores(),
        "threads_per_job": int(os.environ["OMP_NUM_THREADS"]),
        "load_before": os.getloadavg()[0],
        "machine": platform.machine(),
        "kernel_start_seconds": start,
        "one_job_seconds": wall_1,
        "cells_seconds": cells_1,
        "engine_share": (wall_1 - cells_1 - options.points * start) / wall_1,
        "two_jobs_seconds": wall_2,
        "two_jobs": wall_2 / wall_1,
        **thousand(folder / "thousand"),
        "limits": LIMITS,
    }
    shutil.rmtree(folder)
    result = {k: round(v, 3) if isinstance(v, float) else v for k, v in result.items()}
    print(json.dumps(result, indent=1))
    if not options.dry:
        TARGET.parent.mkdir(exist_ok=True)
        TARGET.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        missed = [name for name, limit in LIMITS.items() if result[name] > limit]
        raise SystemExit(f"over the limit: {', '.join(missed)}" if missed else 0)


if __name__ == "__main__":
    main()
