"""Kill a sweep at random moments, again and again, and compare what comes out with an undisturbed sweep.

    python benchmarks/sweep_drill.py                        # 12 points, 10 kills: sweep, kernel, Ray worker in turn
    python benchmarks/sweep_drill.py --ray-node             # two Ray nodes; the second is killed mid-way
    python benchmarks/sweep_drill.py --points 2 --kills 3 --steps 300 --light --no-ray      # what the tests run

Fails unless the tables agree value for value (seconds apart), every run continued from its last checkpoint, no run was
trained again after it was done, and no point counted as finished before its notebook was whole.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import psutil

from samlib.journal import Journal
from samlib.sweeps.planning import load
from samlib.sweeps.points import RESULTS
from samlib.sweeps.report import table

ROOT = Path(__file__).parents[1]
RESULTS_FILE = ROOT / "benchmarks" / "results" / "sweep_drill.json"
DEADLINE = 600.0


def until(condition: Callable[[], Any], what: str) -> Any:
    """Poll until something is true."""
    deadline = time.monotonic() + DEADLINE
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise SystemExit(f"gave up waiting for {what}")
        time.sleep(0.02)
    return value


def light_notebook(folder: Path) -> Path:
    """run.ipynb without its figures: kernels start faster."""
    notebook = nbformat.read(ROOT / "notebooks" / "run.ipynb", as_version=4)
    parameters = next(c for c in notebook.cells if "parameters" in c.metadata.get("tags", ()))
    code = """from samlib import RunConfig, RunStore, train
names = ("experiment", "learning_rate", "rho", "seed", "profile", "steps", "measure_every", "examples", "width", "data")
config = RunConfig(**{name: globals()[name] for name in names}, depth=3)
print(train(config, RunStore(store)))"""
    notebook.cells = [parameters, nbformat.v4.new_code_cell(code)]
    nbformat.write(notebook, folder / "light.ipynb")
    return folder / "light.ipynb"


class Cluster:
    """Two Ray nodes on this machine, with one core each."""

    def __init__(self, env: dict[str, str]) -> None:
        self.env = env | {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1", "RAY_DISABLE_IMPORT_WARNING": "1"}
        self.folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))  # short: it holds sockets
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        self.head = self._start("--head", f"--port={self.address.rpartition(':')[2]}", f"--temp-dir={self.folder}")
        until(self._answers, "the Ray head")
        self.second = self._start(f"--address={self.address}")
        until(lambda: any("raylet" in " ".join(_command(p)) for p in _family(self.second.pid)), "the second Ray node")

    def _start(self, *options: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1", "--num-gpus=0"]
        command += ["--node-ip-address=127.0.0.1", "--disable-usage-stats", "--object-store-memory=80000000", *options]
        if "--head" in options:
            command.append("--include-dashboard=false")
        return subprocess.Popen(command, env=self.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def _answers(self) -> bool:
        host, _, port = self.address.rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
        except OSError:
            return False
        return any("raylet" in " ".join(_command(p)) for p in _family(self.head.pid))

    def workers(self, of: subprocess.Popen[bytes] | None = None) -> list[psutil.Process]:
        """The processes that execute points."""
        nodes = [of] if of else [self.head, self.second]
        family = [p for node in nodes for p in _family(node.pid)]
        return [p for p in family if "ray::samlib sweep" in " ".join(_command(p))]

    def kill_second(self) -> None:
        _kill(*_family(self.second.pid))
        self.second.wait()

    def close(self) -> None:
        for node in (self.second, self.head):
            _kill(*_family(node.pid))
            node.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def _family(pid: int) -> list[psutil.Process]:
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _kill(*processes: psutil.Process) -> None:
    for process in processes:
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue


class Drill:
    """A sweep that is being killed."""

    def __init__(self, command: list[str], out: Path, env: dict[str, str], seed: int) -> None:
        self.command, self.out, self.env = command, out, env
        self.random = random.Random(seed)
        self.process: subprocess.Popen[bytes] | None = None
        self.kills: list[dict[str, Any]] = []
        self.journals: dict[str, Journal] = {}
        self.events = 0

    def start(self, *engine: str) -> None:
        command = [*self.command, "--out", str(self.out), *engine]
        self.process = subprocess.Popen(command, env=self.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def stop(self) -> None:
        """SIGKILL to the sweep; what it started must follow by itself."""
        if self.process is None:
            return
        family = _family(self.process.pid)
        self.process.kill()
        self.process.wait()
        until(lambda: not psutil.wait_procs(family, timeout=0.1)[1], "the end of what a killed sweep had started")

    def count(self) -> int:
        """Events in all journals so far."""
        for path in self.out.glob("*/progress.jsonl"):
            self.events += len(self.journals.setdefault(path.parent.name, Journal(path)).read())
        return self.events

    def moment(self, events: int) -> bool:
        """Wait for a random moment, a number of events from now; false if the sweep ended before."""
        goal = self.count() + events
        until(lambda: not self.alive() or self.count() >= goal, f"{events} events")
        time.sleep(self.random.uniform(0, 0.1))  # the moment is random, nothing waits for it
        return self.alive()

    def kill(self, victim: str, processes: Callable[[], list[psutil.Process]]) -> None:
        if victim == "sweep":
            self.stop()
        else:
            found = until(lambda: processes() or not self.alive(), f"a {victim}")
            if found is not True:
                _kill(self.random.choice(found))
        self.kills.append({"victim": victim, "events": self.count(), "finished": self.check_finished()})

    def kernels(self) -> list[psutil.Process]:
        assert self.process
        return [p for p in _family(self.process.pid) if "ipykernel_launcher" in " ".join(_command(p))]

    def check_finished(self) -> int:
        """The points that count as finished have a whole notebook and a readable run."""
        if not (self.out / "sweep.json").exists():
            return 0
        sweep = load(self.out)
        finished = [p for p in sweep.points if (s := sweep.status(p)) and s.outcome in RESULTS]
        for point in finished:
            notebook = nbformat.read(self.out / point.id / "executed.ipynb", as_version=4)
            papermill = [c.metadata.papermill for c in notebook.cells if c.cell_type == "code"]
            assert all(m.status == "completed" and not m.exception for m in papermill), point
        if finished:
            rows = table(self.out)
            assert rows[rows.outcome.isin(RESULTS)].loss.notna().all()
        return len(finished)


def check_journals(paths: Iterable[Path]) -> dict[str, int]:
    """No run was trained again after it was done, and each continued from its last checkpoint."""
    starts = resumed = repeated = 0
    for path in paths:
        checkpoints: dict[str, int] = {}
        done: set[str] = set()
        for event in Journal(path).read():
            run = event.get("run", "")
            if event["event"] == "start":
                starts += 1
                resumed += event["step"] > 0
                repeated += run in done or event["step"] < checkpoints.get(run, 0)
            elif event["event"] == "checkpoint":
                checkpoints[run] = event["step"]
            elif event["event"] == "done":
                done.add(run)
    assert not repeated, f"{repeated} of {starts} starts repeated what was done"
    return {"starts": starts, "resumed_from_checkpoint": resumed, "trained_again": repeated}


def compare(one: Path, other: Path) -> None:
    """The tables agree in every value but the seconds."""
    frames = [table(out).drop(columns="seconds") for out in (one, other)]
    pd.testing.assert_frame_equal(*frames, check_exact=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=12)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--light", action="store_true", help="a notebook without figures")
    parser.add_argument("--no-ray", action="store_true", help="kill the sweep and kernels only")
    parser.add_argument("--ray-node", action="store_true", help="kill the second of two Ray nodes, once")
    parser.add_argument("--folder", type=Path, help="where to work; by default a temporary folder")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS_FILE.relative_to(ROOT)}")
    options = parser.parse_args()

    folder = options.folder or Path(tempfile.mkdtemp(prefix="drill"))
    folder.mkdir(parents=True, exist_ok=True)
    env = {**os.environ, "SAMLIB_CHECKPOINT_SECONDS": "0.3"}
    notebook = light_notebook(folder) if options.light else ROOT / "notebooks" / "run.ipynb"
    rates = ",".join(str(round(0.1 + 0.05 * i, 2)) for i in range((options.points + 1) // 2))
    command = [sys.executable, "-m", "samlib.cli", "sweep", str(notebook)]
    command += ["--grid", f"learning_rate={rates}", "--grid", "rho=0,0.1" if options.points > 1 else "rho=0.1"]
    fixed = {"data": "standin", "examples": 300, "width": options.width, "steps": options.steps, "measure_every": 50}
    command += [part for name, value in fixed.items() for part in ("--set", f"{name}={value}")]
    local = ["--jobs", "2", "--retries", "5"]

    started = time.monotonic()
    fresh = not (folder / "undisturbed").exists()
    subprocess.run([*command, "--out", str(folder / "undisturbed"), *local], env=env, check=True)
    undisturbed = round(time.monotonic() - started, 1) if fresh else None
    expected = sum(len(Journal(p).read()) for p in (folder / "undisturbed").glob("*/progress.jsonl"))

    drill = Drill(command, folder / ("node-killed" if options.ray_node else "disturbed"), env, options.seed)
    cluster = Cluster(env) if options.ray_node or not options.no_ray else None
    started = time.monotonic()
    try:
        on_ray = ["--ray", cluster.address, "--retries", "5"] if cluster else local
        if options.ray_node:
            assert cluster
            drill.start(*on_ray)
            until(lambda: cluster.workers(cluster.second) or not drill.alive(), "a point on the second node")
            drill.moment(expected // 4)
            before = drill.check_finished()
            cluster.kill_second()
            drill.kills.append({"victim": "Ray node", "events": drill.count(), "finished": before})
        else:
            # All within the first part of an undisturbed sweep's events, so that there is something left to kill.
            moments = sorted(drill.random.sample(range(1, expected * 6 // 10), options.kills))
            gaps = [moments[0], *(b - a for a, b in itertools.pairwise(moments))]
            victims = ["sweep", "kernel"] + ([] if options.no_ray else ["Ray worker"])
            while len(drill.kills) < options.kills:
                victim = victims[len(drill.kills) % len(victims)]
                if victim == "Ray worker" or not drill.alive():
                    if drill.alive():
                        drill.stop()  # to change the engine
                    drill.start(*(on_ray if victim == "Ray worker" else local))
                if not drill.moment(gaps[len(drill.kills)]):
                    raise SystemExit("the sweep ended before all kills; give it more --steps or fewer --kills")
                drill.kill(victim, cluster.workers if cluster and victim == "Ray worker" else drill.kernels)
        if not drill.alive():
            drill.start(*(on_ray if options.ray_node else local))
        assert drill.process
        code = drill.process.wait()
        if code:  # a kernel killed more often than it is retried: the same command continues
            drill.start(*local)
            code = drill.process.wait()
    finally:
        drill.stop()
        if cluster:
            cluster.close()
    assert code == 0, f"the sweep ended with exit code {code}"
    drill.check_finished()
    compare(folder / "undisturbed", drill.out)
    result = {
        "points": options.points,
        "kills": drill.kills,
        "seconds_undisturbed": undisturbed,
        "seconds_disturbed": round(time.monotonic() - started, 1),
        **check_journals(drill.out.glob("*/progress.jsonl")),
        "tables_equal": True,
    }
    print(json.dumps(result, indent=1))
    if options.write:
        name = "sweep_drill_ray_node.json" if options.ray_node else "sweep_drill.json"
        RESULTS_FILE.parent.mkdir(exist_ok=True)
        (RESULTS_FILE.parent / name).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if not options.folder:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
