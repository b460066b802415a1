"""How points end, what is repeated, and what they leave behind: nothing."""

import errno
import functools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import filelock
import psutil
import pytest

from samlib.files import atomic_write
from samlib.sweeps import planning as sweep
from samlib.sweeps import report as sweep_report
from samlib.sweeps.executing import execute
from samlib.sweeps.points import execute_point
from samlib.sweeps.processes import MARK

from .conftest import notebook, samlib, until


def test_points_end_as_they_do_and_only_those_without_a_result_are_repeated(trivial, tmp_path):
    out = tmp_path / "out"
    command = (trivial, "--grid", "do=finish,raise,die", "--set", "rate=3", "--out", out, "--jobs", "3", "--retries", 1)
    result = samlib(*command)
    assert result.exit_code == 1, result.output
    planned = sweep.load(out)
    finish, raised, died = map(planned.status, planned.points)
    assert (finish.outcome, finish.values) == ("finished", {"square": 9.0})
    assert (raised.outcome, raised.attempts) == ("failed", 1)
    assert "ValueError: as told" in raised.error
    assert (died.outcome, died.attempts) == ("killed", 2)
    assert not (out / planned.points[2].id / "executed.ipynb").exists()
    assert "3 points: 1 finished, 1 failed, 1 killed" in result.stdout
    assert "ValueError: as told" in result.stdout
    assert "executes these 2 again" in result.stdout

    partial = samlib("report", out)
    assert partial.exit_code == 1
    assert "2 of 3 points have no result (1 failed, 1 killed:" in partial.stderr

    (tmp_path / "mended").touch()
    executed = out / planned.points[0].id / "executed.ipynb"
    before = executed.stat().st_mtime_ns
    # A folder that looks done but has no valid status is not done.
    folder = out / planned.points[1].id
    (folder / "executed.ipynb").write_text("{}", encoding="utf-8")
    (folder / "status.json").write_text('{"outcome": "fini', encoding="utf-8")
    assert [p.id for p in planned.left()] == [p.id for p in planned.points[1:]]
    result = samlib(*command)
    assert result.exit_code == 0, result.output
    assert "1 of 3 points are done already" in result.stderr
    assert executed.stat().st_mtime_ns == before
    frame = sweep_report.table(out)
    assert list(frame.outcome) == ["finished"] * 3
    assert list(frame.square) == [9.0] * 3


def test_a_point_that_takes_too_long_is_given_up(trivial, tmp_path):
    result = samlib(trivial, "--grid", "do=hang", "--out", tmp_path / "out", "--timeout", "1s")
    assert result.exit_code == 1
    assert re.search(r"timed out after \d+ s", result.stdout)
    assert sweep.load(tmp_path / "out").status(sweep.load(tmp_path / "out").points[0]).outcome == "timed out"


def test_termination_ends_the_sweep_and_what_it_started(trivial, tmp_path):
    import psutil

    command = [sys.executable, "-m", "samlib.cli", "sweep", trivial, "--grid", "do=hang", "--out", tmp_path / "out"]
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, encoding="utf-8")
    until(lambda: list(tmp_path.glob("out/*/progress.jsonl")))
    started = until(lambda: psutil.Process(process.pid).children(recursive=True))
    process.send_signal(signal.SIGTERM)
    _, messages = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted; the same command continues" in messages
    assert not psutil.wait_procs(started, timeout=60)[1]
    assert not list(tmp_path.glob("out/*/status.json"))


@pytest.mark.parametrize("when", ["sweep.json", "params.json", "status.json"])
def test_a_full_disk_loses_nothing(when, trivial, tmp_path, monkeypatch):
    def full(path, content):
        if path.name == when:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        atomic_write(path, content)

    command = (trivial, "--grid", "rate=1,2", "--out", tmp_path / "out")
    if when == "status.json":  # without a kernel, which has been seen to work above
        done = type("Done", (), {"outcome": "finished", "seconds": 1.0, "error": ""})
        monkeypatch.setattr("samlib.sweeps.points.execute", lambda *_, **__: done)
    for module in ("planning", "points"):
        monkeypatch.setattr(f"samlib.sweeps.{module}.atomic_write", full)
    result = samlib(*command)
    assert result.exit_code == 1, result.output
    assert "No space left on device" in result.stderr
    assert "the same command continues" in result.stderr
    assert not list(tmp_path.glob("out/*/status.json"))


def test_a_point_that_another_process_executes_is_left_to_it(trivial, tmp_path):
    planned = sweep.plan(trivial, tmp_path / "out", grid={"rate": [1, 2]})
    planned.write()
    folder = planned.out / planned.points[0].id
    folder.mkdir()
    with filelock.FileLock(folder / "lock"):
        stop = threading.Event()
        results = []

        def attempt(**how):
            results.append(execute_point(planned, planned.points[0], stop=stop, **how))

        for how in ({}, {"wait": True}):
            thread = threading.Thread(target=attempt, kwargs=how)
            thread.start()
            if how:
                stop.set()
            thread.join(60)
    assert results == [None, None]


def test_a_missing_working_folder_fails_the_point_with_a_reason(trivial, tmp_path):
    planned = sweep.plan(trivial, tmp_path / "out", grid={"rate": [1]})
    planned.write()
    moved = sweep.Sweep(planned.notebook, planned.digest, planned.out, tmp_path / "gone", False, planned.points)
    status = execute_point(moved, planned.points[0])
    assert (status.outcome, "start the sweep in a folder all nodes see" in status.error) == ("failed", True)


# A point that starts a process, one in a session of its own, one that its parent leaves alone, and a fork, and then
# ends as it is told; their ids stand in a file.
CHILDREN = """
import multiprocessing, os, signal, subprocess, sys, time
command = [sys.executable, "-c", "import time; time.sleep(600)"]
ids = [subprocess.Popen(command).pid, subprocess.Popen(command, start_new_session=True).pid]
ids.append(int(subprocess.check_output(["sh", "-c", "sleep 600 > /dev/null & echo $!"])))
forked = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
forked.start()
with open("ids.part", "w", encoding="utf-8") as file:
    file.write(" ".join(map(str, [*ids, forked.pid])))
os.rename("ids.part", "ids")
if end == "raise": raise ValueError("as told")
if end == "die": os.kill(os.getpid(), signal.SIGKILL)
if end == "die alone": os.kill(os.getppid(), signal.SIGKILL)
while True: time.sleep(1)
"""


@pytest.fixture
def children(tmp_path):
    """A notebook with children, and a function that says which of them are alive; they are ended after the test."""

    def alive():
        path = tmp_path / "ids"
        ids = path.read_text(encoding="utf-8").split() if path.exists() else []
        found = [psutil.Process(int(i)) for i in ids if psutil.pid_exists(int(i))]
        return [p for p in found if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]

    yield notebook(tmp_path / "children.ipynb", 'end: str = ""', CHILDREN), alive
    for process in alive():
        process.kill()


@pytest.mark.parametrize(
    ("end", "outcome"),
    [("raise", "failed"), ("die", "killed"), ("die alone", "killed"), ("hang", "timed out"), ("hang", "stopped")],
)
def test_what_a_point_started_ends_with_it(end, outcome, children, tmp_path, monkeypatch):
    path, alive = children
    stop, clock = threading.Event(), time.monotonic
    if outcome == "timed out":  # as soon as all of them run
        monkeypatch.setattr(
            "samlib.sweeps.executing.time.monotonic", lambda: clock() + 1e6 * (tmp_path / "ids").exists()
        )
    if outcome == "stopped":
        threading.Thread(target=lambda: until((tmp_path / "ids").exists) and stop.set()).start()
    stranger = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(600)"], env={**os.environ, MARK: str(tmp_path / "other.ipynb")}
    )
    arguments = (path, tmp_path / "out.ipynb", {"end": end}, tmp_path, tmp_path / "log.txt")
    done = execute(*arguments, timeout=1e5, stop=stop)
    assert done.outcome == outcome, done.error
    assert len((tmp_path / "ids").read_text(encoding="utf-8").split()) == 4
    assert alive() == []
    assert stranger.poll() is None
    stranger.kill()
    stranger.wait()


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_what_a_point_started_ends_with_the_sweep(by, children, tmp_path):
    path, alive = children
    command = [sys.executable, "-m", "samlib.cli", "sweep", path, "--grid", "end=hang", "--out", tmp_path / "out"]
    heard = functools.partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)  # also where the tests run under nohup
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.DEVNULL, preexec_fn=heard)
    until((tmp_path / "ids").exists)
    assert len(alive()) == 4
    process.send_signal(by)
    process.wait(60)
    until(lambda: alive() == [])


def test_what_an_attempt_left_is_ended_before_the_next(tmp_path):
    """The sweep and its helpers may be killed all at once, and then nobody is there to end the rest."""
    path = notebook(tmp_path / "n.ipynb", "a = 1")
    target = tmp_path / "out.ipynb"
    (tmp_path / "link").symlink_to(tmp_path)
    left = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(600)"], env={**os.environ, MARK: os.path.realpath(target)}
    )
    done = execute(path, tmp_path / "link" / "out.ipynb", {}, tmp_path, tmp_path / "log.txt")
    assert done.outcome == "finished", done.error
    left.wait(60)


def test_a_sweep_that_is_done_can_be_looked_at_where_nothing_can_be_written(tmp_path, monkeypatch):
    planned = sweep.plan(notebook(tmp_path / "n.ipynb", "a = 1"), tmp_path / "out", grid={"a": [1]})
    planned.write()
    folder = planned.out / planned.points[0].id
    atomic_write(folder / "status.json", b'{"outcome": "finished", "seconds": 1}')
    (folder / "executed.ipynb").touch()

    def forbidden(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", "somewhere")

    for name in ("touch", "mkdir", "write_bytes", "write_text"):
        monkeypatch.setattr(Path, name, forbidden)
    monkeypatch.setattr(filelock.FileLock, "acquire", forbidden)
    result = samlib(tmp_path / "n.ipynb", "--grid", "a=1", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert len(sweep_report.table(tmp_path / "out")) == 1
    result = samlib("report", tmp_path / "out")
    assert (result.exit_code, "cannot write the report" in result.stderr) == (1, True), result.output


def test_the_last_words_of_a_point_are_readable_in_any_locale(tmp_path, monkeypatch):
    for name, value in {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}.items():
        monkeypatch.setenv(name, value)
    path = notebook(tmp_path / "n.ipynb", "a = 1", "raise ValueError('η too large: 日本')")
    done = execute(path, tmp_path / "out.ipynb", {}, tmp_path, tmp_path / "log.txt")
    assert done.outcome == "failed"
    assert "η too large: 日本" in done.error
