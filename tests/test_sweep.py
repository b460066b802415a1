"""Sweeps: what is refused before a kernel starts, how points end, what a kill leaves behind, and the report."""

import errno
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import filelock
import nbformat
import pandas as pd
import pytest
from typer.testing import CliRunner

from samlib import train
from samlib.cli import app
from samlib.files import atomic_write
from samlib.journal import PROGRESS, Journal, append, note, record
from samlib.sweeps import engines as sweep_run
from samlib.sweeps import planning as sweep
from samlib.sweeps import progress
from samlib.sweeps import report as sweep_report
from samlib.sweeps.executing import execute
from samlib.sweeps.notebooks import NotebookError, Parameter, content_hash, parameters
from samlib.sweeps.points import Status, execute_point
from samlib.sweeps.progress import Reporter

from .conftest import ROOT, small_config

RUN = ROOT / "notebooks" / "run.ipynb"
DRILL = ROOT / "benchmarks" / "sweep_drill.py"
has_ray = importlib.util.find_spec("ray") is not None


def notebook(path, *cells, tags=("parameters",)):
    cells = [nbformat.v4.new_code_cell(cell) for cell in cells]
    cells[0].metadata.tags = list(tags)
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), path)
    return path


@pytest.fixture
def trivial(tmp_path):
    """A notebook that starts fast and ends as it is told, unless a file says that the fault is mended."""
    return notebook(
        tmp_path / "trivial.ipynb",
        'rate: float = 0.1\ndo: str = "finish"  # or raise, die, hang',
        "import os, time\n"
        "if not os.path.exists('mended'):\n"
        "    if do == 'raise': raise ValueError('as told')\n"
        "    if do == 'die': os.kill(os.getpid(), 9)\n"
        "    while do == 'hang': time.sleep(1)\n"
        "from samlib.journal import record\n"
        "record(square=rate**2)",
    )


def samlib(*arguments):
    return CliRunner().invoke(app, ["sweep", *map(str, arguments)])


def until(condition):
    deadline = time.monotonic() + 120
    while not (value := condition()):
        assert time.monotonic() < deadline, "gave up waiting"
        time.sleep(0.02)
    return value


def test_parameters_are_read_with_their_types(tmp_path):
    path = notebook(
        tmp_path / "n.ipynb",
        "a: float = 1 / 3\nb = 3\nc: float | None = 0.5\nd: list[float] = [1]\ne: Optional[int] = None\nf = 'x'\n"
        "g: Literal['a', 'b'] = 'a'\nh = None\ni: dict = {}\nj = True\nk: int",
    )
    found = parameters(path)
    kinds = {name: (p.kind, p.optional) for name, p in found.items()}
    assert kinds == {
        **{"a": ("float", False), "b": ("number", False), "c": ("float", True), "d": ("list", False)},
        **{"e": ("int", True), "f": ("str", False), "g": ("str", False), "h": ("", True), "i": ("dict", False)},
        **{"j": ("bool", False), "k": ("int", False)},
    }
    assert [name for name, p in found.items() if p.required] == ["k"]


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        ("float", "1e-3", 0.001),
        ("float", 2, 2.0),
        ("int", "1e3", 1000),
        ("int", "12345678901234567890", 12345678901234567890),
        ("number", "3", 3),
        ("number", 0.5, 0.5),
        ("bool", "False", False),
        ("str", "real", "real"),
        ("list", "[0.1, 1e-3]", [0.1, 0.001]),
        ("dict", {"a": ["1e2"]}, {"a": [100.0]}),
        ("", "1e-3", 0.001),
        ("", "word", "word"),
    ],
)
def test_values_become_what_they_mean(kind, value, expected):
    converted = Parameter("x", kind, False, None, False).convert(value)
    assert converted == expected
    assert type(converted) is type(expected)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        *(("float", "x"), ("float", True), ("float", None), ("int", 0.5), ("int", "nan"), ("bool", 2)),
        *(("bool", "maybe"), ("str", 1), ("list", "1"), ("list", "[1"), ("dict", [1]), ("number", "x")),
    ],
)
def test_values_of_the_wrong_type_are_named(kind, value):
    with pytest.raises(ValueError, match=r"^x must be .*, got "):
        Parameter("x", kind, False, None, False).convert(value)


def test_none_is_for_optional_parameters():
    assert Parameter("x", "int", True, None, False).convert("None") is None
    with pytest.raises(ValueError, match="a whole number or None, got 'x'"):
        Parameter("x", "int", True, None, False).convert("x")


def test_outputs_do_not_change_the_hash(trivial, tmp_path):
    content = nbformat.read(trivial, as_version=4)
    content.cells[1].execution_count = 7
    nbformat.write(content, tmp_path / "run.ipynb")
    assert content_hash(trivial) == content_hash(tmp_path / "run.ipynb")
    content.cells[1].source += "\n1"
    nbformat.write(content, tmp_path / "run.ipynb")
    assert content_hash(trivial) != content_hash(tmp_path / "run.ipynb")


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["--grid", "rhoo=1,2"], ["rhoo is not a parameter of the notebook; there are experiment, learning_rate, rho"]),
        (["--grid", "rho=0.1,x"], ["rho must be a number, got 'x'"]),
        (["--grid", "rho=0,1", "--set", "steps=1.5"], ["steps must be a whole number or None, got '1.5'"]),
        (["--grid", "rho="], ["--grid takes NAME=VALUE, got 'rho='"]),
        (["--grid", "rho=0.1,1e-1"], ["the point rho=0.1 occurs twice"]),
        (["--grid", "rho=0,0.1", "--set", "rho=1"], ["rho is given twice"]),
        (["--set", "rho=1"], ["there is nothing to sweep"]),
        (
            ["--grid", "rho=-1,0", "--set", "data=x"],
            ["rho must be greater than or equal to 0, got -1.0", "data must be"],
        ),
        (["--grid", "a=1", "--grid", "b=1", "--grid", "rho=x"], ["a is not", "b is not", "rho must be"]),
        (["--grid", "rho=0,1", "--timeout", "soon"], ["--timeout takes a positive time"]),
        (["--grid", "rho=0,1", "--config", "nowhere.yaml"], ["--config nowhere.yaml is not a readable YAML file"]),
    ],
)
def test_a_bad_request_names_all_its_problems_and_writes_nothing(arguments, messages, tmp_path):
    result = samlib(RUN, *arguments, "--out", tmp_path / "out")
    assert result.exit_code == 2, result.output
    assert all(message in result.stderr for message in messages), result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("grid: {rho: []}", "grid of rho is empty"),
        ("points: []", "the list of points is empty"),
        ("grid: [", "is not a readable YAML file"),
        ("\x00", "is not a readable YAML file"),
        ("", "must hold some of set, grid, ranges, points"),
        ("grids: {rho: [1]}", "grids is unknown; there are set, grid, ranges, points"),
        ("grid: {rho: 1}", "grid of rho must be a list, got 1"),
        ("points: {rho: 1}", "points must be a list"),
        ("points: [1]", "a point must be names with values, got 1"),
        ("ranges: {rho: {linspace: [0, 1]}}", "range of rho must be one of linspace, logspace, geomspace"),
        ("ranges: {rho: {logspace: [0, 1, 2.5]}}", "range of rho must be"),
        ("{grid: {rho: [1]}, ranges: {rho: {linspace: [0, 1, 2]}}}", "rho stands in both grid and ranges"),
        ("points: [{rho: 0}, {rho: 0.0}]", "the point rho=0.0 occurs twice"),
    ],
)
def test_a_bad_configuration_file_is_explained(content, message, tmp_path):
    (tmp_path / "sweep.yaml").write_text(content, encoding="utf-8")
    result = samlib(RUN, "--config", tmp_path / "sweep.yaml", "--out", tmp_path / "out")
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_ranges_points_and_grids_combine(tmp_path):
    (tmp_path / "sweep.yaml").write_text(
        "set: {steps: 1e2, data: standin}\n"
        "grid: {seed: [0, 1]}\n"
        "ranges: {tolerance: {logspace: [-3, -1, 3]}}\n"
        "points: [{learning_rate: 1e-1, rho: 0}, {learning_rate: 0.3, rho: 0.1}]\n",
        encoding="utf-8",
    )
    request = sweep.read_config(tmp_path / "sweep.yaml")
    assert request["grid"].pop("tolerance") == pytest.approx([0.001, 0.01, 0.1])
    request["grid"]["eigenvalues"] = [1, 2, 3]
    planned = sweep.plan(RUN, tmp_path / "out", **request)
    assert len(planned.points) == 12
    assert planned.points[0].params == {
        **{"steps": 100, "data": "standin", "learning_rate": 0.1, "rho": 0.0, "seed": 0, "eigenvalues": 1}
    }
    assert planned.swept == ["learning_rate", "rho", "seed", "eigenvalues"]


def test_the_command_line_overrides_the_configuration_file(tmp_path):
    (tmp_path / "sweep.yaml").write_text(
        "set: {steps: 5, data: standin, width: 16}\ngrid: {rho: [0, 1]}\n", encoding="utf-8"
    )
    result = samlib(
        *(RUN, "--config", tmp_path / "sweep.yaml", "--grid", "rho=0.5", "--set", "steps=7", "--set", "examples=50"),
        *("--out", tmp_path / "out", "--dry-run"),
    )
    assert result.exit_code == 0, result.output
    assert "data=standin width=16 steps=7 examples=50 rho=0.5" in result.stdout
    assert "1 points, 1 of them without a result; about " in result.stdout
    assert not (tmp_path / "out").exists()


def test_what_is_not_a_usable_notebook_is_refused(tmp_path):
    (tmp_path / "n.ipynb").write_text("{", encoding="utf-8")
    for path, message in [
        (tmp_path / "none.ipynb", "cannot be read"),
        (tmp_path / "n.ipynb", "is not a notebook"),
        (notebook(tmp_path / "untagged.ipynb", "a = 1", tags=()), "has no parameters"),
        (notebook(tmp_path / "magic.ipynb", "%time"), "not plain Python"),
    ]:
        result = samlib(path, "--grid", "a=1,2", "--out", tmp_path / "out")
        assert (result.exit_code, message in result.stderr) == (2, True), result.output
    with pytest.raises(NotebookError):
        content_hash(tmp_path / "n.ipynb")


def test_a_parameter_without_default_must_be_given(tmp_path):
    path = notebook(tmp_path / "n.ipynb", "a: float\nb: int = 1")
    with pytest.raises(sweep.SweepError, match="a has no default in the notebook; give it with --set a="):
        sweep.plan(path, tmp_path / "out", grid={"b": [1, 2]})


def test_parameters_of_another_language_are_passed_on(tmp_path):
    path = notebook(tmp_path / "n.ipynb", "a <- 1")
    content = nbformat.read(path, as_version=4)
    content.metadata.kernelspec.language = "R"
    nbformat.write(content, path)
    planned = sweep.plan(path, tmp_path / "out", grid={"a": ["1", "1e-2"]})
    assert [p.params for p in planned.points] == [{"a": 1}, {"a": 0.01}]


def test_a_folder_with_something_else_in_it_is_refused(trivial, tmp_path):
    out = tmp_path / "out"
    planned = sweep.plan(trivial, out, grid={"rate": [1, 2]})
    planned.write()
    planned.write()  # the same again
    before = (out / "sweep.json").read_bytes()
    assert sweep.load(out).points == planned.points
    other = notebook(tmp_path / "other.ipynb", "rate = 1")
    (tmp_path / "file").touch()
    for command, message in [
        ((trivial, "--grid", "rate=1,3", "--out", out), "holds a sweep of 2 other points; give another folder"),
        ((other, "--grid", "rate=1,2", "--out", out), "holds a sweep of another notebook"),
        ((trivial, "--grid", "rate=1,2", "--out", tmp_path), "holds other files"),
        ((trivial, "--grid", "rate=1,2", "--out", tmp_path / "file"), "is a file"),
    ]:
        result = samlib(*command)
        assert (result.exit_code, message in result.stderr) == (2, True), result.output
    assert (out / "sweep.json").read_bytes() == before


def test_a_folder_that_is_no_sweep_has_no_report(tmp_path):
    result = samlib("report", tmp_path)
    assert (result.exit_code, "holds no sweep" in result.stderr) == (2, True)
    (tmp_path / "sweep.json").write_text('{"version": 0}', encoding="utf-8")
    assert "another version of samlib" in samlib("report", tmp_path).stderr
    (tmp_path / "sweep.json").write_text("{", encoding="utf-8")
    assert "cannot be read" in samlib("report", tmp_path).stderr


def test_ray_that_is_missing_or_does_not_answer_is_reported(trivial, tmp_path, monkeypatch):
    command = (trivial, "--grid", "rate=1,2", "--out", tmp_path / "out")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    if has_ray:
        for given, message in [(address, "nothing answers there"), ("cluster", "--ray takes auto, HOST:PORT")]:
            result = samlib(*command, "--ray", given)
            assert (result.exit_code, message in result.stderr) == (2, True), result.output
    monkeypatch.setitem(sys.modules, "ray", None)
    result = samlib("--ray", *command)
    assert (result.exit_code, 'pip install "samlib[ray]"' in result.stderr) == (2, True), result.output
    assert not (tmp_path / "out").exists()


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
    assert "timed out after 1 s" in result.stdout
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


def test_a_notebook_without_kernel_name_is_executed_as_python(tmp_path):
    path = notebook(tmp_path / "n.ipynb", "a = 1", "assert a == 2")
    content = nbformat.read(path, as_version=4)
    content.metadata = {}
    nbformat.write(content, path)
    done = execute(path, tmp_path / "out.ipynb", {"a": 2}, tmp_path, tmp_path / "log.txt")
    assert done.outcome == "finished", done.error
    assert (tmp_path / "out.ipynb").exists()


def test_a_run_keeps_a_journal_where_it_is_asked_to(store, tmp_path, monkeypatch):
    monkeypatch.setenv(PROGRESS, str(tmp_path / "journal"))
    run = train(small_config(), store)
    train(small_config(), store)
    events = [e for e in Journal(tmp_path / "journal").read() if e["event"] != "checkpoint"]
    assert [e["event"] for e in events] == ["start", "step", "step", "step", "step", "done", "done"]
    assert all(e["run"] == run.id for e in events)
    assert events[4] == {
        **{"event": "step", "run": run.id, "step": 30, "steps": 30},
        **{"loss": run.last.loss, "edge_ratio": run.last.edge_ratio},
    }


def test_a_journal_survives_half_written_lines(tmp_path, monkeypatch):
    path = tmp_path / "journal"
    append(path, "old")
    journal, late = Journal(path), Journal(path, skip=True)
    with path.open("ab") as file:
        file.write(b'\n{"event": "cut sho')
    monkeypatch.setenv(PROGRESS, str(path))
    note("new", value=1)
    record(answer=42)
    events = [{"event": "new", "value": 1}, {"event": "record", "values": {"answer": 42}}]
    assert journal.read() == [{"event": "old"}, *events]
    assert late.read() == events
    assert journal.read() == []
    monkeypatch.delenv(PROGRESS)
    note("nowhere")
    assert journal.read() == []
    assert Journal(tmp_path / "none").read() == []


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_is_shown(terminal, trivial, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    monkeypatch.setenv("COLUMNS", "120")
    planned = sweep.plan(trivial, tmp_path / "out", grid={"rate": [1, 2]})
    one, two = planned.points
    reporter = Reporter(planned, every=-1)
    for point in planned.points:
        (planned.out / point.id).mkdir(parents=True)
        append(planned.out / point.id / "progress.jsonl", "attempt", number=1)
    with reporter.shown():
        reporter.update()
        append(planned.out / one.id / "progress.jsonl", "start", run="r", step=0, steps=100)
        append(
            *(planned.out / one.id / "progress.jsonl", "step"), run="r", step=25, steps=100, loss=0.5, edge_ratio=1.04
        )
        reporter.update()
        reporter.complete(two, Status("failed", error="ValueError", seconds=2))
        reporter.update()
        reporter.complete(one, Status("finished", seconds=2))
    shown = capsys.readouterr().err
    assert "rate=1.0" in shown
    assert "step 25/100, loss 0.5, edge ratio 1.040" in shown
    assert "failed" in shown
    assert "left" in shown


def test_gpus_and_cores_are_shared_out(monkeypatch):
    for visible, expected in [("0,1", ["0", "1"]), ("", []), ("-1", [])]:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert sweep_run.gpus() == expected
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    for name in sweep_run._THREADS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sweep_run, "cores", lambda: 8)
    engine = sweep_run.Local()
    assert engine.jobs == 2
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in engine._slots] == ["3", "5"]
    assert {slot["OMP_NUM_THREADS"] for slot in engine._slots} == {"4"}
    engine.close()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the user's own wish, which MKL's variable must not overrule
    engine = sweep_run.Local()
    assert {slot[name] for slot in engine._slots for name in sweep_run._THREADS} == {"1"}
    engine.close()


def test_an_estimate_comes_from_executed_points(trivial, tmp_path):
    planned = sweep.plan(trivial, tmp_path / "out", grid={"rate": [1, 2, 3]})
    assert progress.estimate(planned) is None
    folder = planned.out / planned.points[0].id
    atomic_write(folder / "status.json", b'{"outcome": "finished", "seconds": 10}')
    (folder / "executed.ipynb").touch()
    assert progress.estimate(planned, 2) == (10.0, "from 1 executed points")
    assert [progress.duration(s) for s in (5, 300, 7200)] == ["5 s", "5 min", "2.0 h"]


SMALL = ("--points=2", "--steps=600", "--width=16")


def drill(folder, *options):
    done = subprocess.run(
        [sys.executable, DRILL, "--light", "--folder", folder, *options],
        capture_output=True,
        encoding="utf-8",
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout[done.stdout.index("{") :])


@pytest.fixture(scope="module")
def drilled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drill")
    return folder, drill(folder, *SMALL, "--kills=2", "--no-ray")


def test_a_killed_sweep_ends_with_the_table_of_an_undisturbed_one(drilled):
    folder, result = drilled
    assert [kill["victim"] for kill in result["kills"]] == ["sweep", "kernel"]
    assert result["tables_equal"]
    assert result["trained_again"] == 0
    frame = sweep_report.table(folder / "disturbed")
    assert list(frame.outcome) == ["finished", "finished"]
    assert frame[["loss", "operator_norm", "edge_ratio", "edge_ratio_late", "test_metric"]].notna().all(axis=None)


def test_a_report_is_a_page_with_links(drilled):
    out = drilled[0] / "undisturbed"
    first = sweep.load(out).points[0].id
    (out / first / "status.json").rename(out / first / "status.aside")
    result = samlib("report", out)
    assert result.exit_code == 1
    assert f"1 of 2 points have no result (1 missing: {first})" in result.stderr
    result = samlib("report", out, "--allow-partial")
    assert result.exit_code == 0, result.output
    second = sweep.load(out).points[1].id
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count(f'href="{second}/executed.ipynb"') >= 4
    assert 'aria-label="Heatmap of edge ratio, median over the last half of training over rho' in page
    assert f'href="{first}' not in page
    table = pd.read_parquet(out / "table.parquet")
    written = pd.read_csv(out / "table.csv")
    pd.testing.assert_frame_equal(written[["point", "rho", "loss"]], table[["point", "rho", "loss"]], check_dtype=False)
    (out / first / "status.aside").rename(out / first / "status.json")


@pytest.mark.skipif(not has_ray, reason='Ray is not installed (pip install "samlib[ray]")')
def test_a_ray_node_that_dies_loses_nothing(drilled):
    result = drill(drilled[0], *SMALL, "--ray-node")
    assert [kill["victim"] for kill in result["kills"]] == ["Ray node"]
    assert result["tables_equal"]
    assert result["trained_again"] == 0


def test_a_heatmap_shows_numbers_divergence_and_gaps():
    frame = pd.DataFrame(
        {
            "point": list("abcde"),
            "learning_rate": [0.1, 0.1, 1.0, 1.0, 10.0],
            "rho": [0.0, 0.1, 0.0, 0.1, 0.0],
            "seed": [0, 0, 0, 0, 0],
            "outcome": ["finished", "finished", "finished", "diverged", "finished"],
            "run_id": list("abcde"),
            "loss": [1.0, 0.001, 0.5, float("nan"), 0.2],
            "edge_ratio": [0.9, 1.05, 1.0, float("nan"), 1.1],
            "accuracy": [0.1, 0.2, 0.3, 0.4, 0.5],
            "seconds": [1.0] * 5,
            "notebook": [f"{p}/executed.ipynb" for p in "abcd"] + [""],
        }
    )
    over = ["learning_rate", "rho", "seed"]
    pictures = sweep_report.heatmaps(frame, over)
    assert [p.name for p in pictures] == ["edge_ratio", "loss", "accuracy"]
    svg = pictures[0].svg
    assert ">diverged<" in svg
    assert ">–<" in svg
    assert svg.index(">0.1<") < svg.index(">1<") < svg.index(">10<")  # numbers in the order of numbers
    assert 'href="a/executed.ipynb"' in svg
    assert "Medians over seed." in pictures[0].caption
    assert "learning_rate" in sweep_report.heatmap(frame, "loss", ["learning_rate"]).svg
    assert "a/executed.ipynb" in sweep_report.links(frame, over).to_html()


def test_a_sweep_of_several_runs_per_point_lists_them(trivial, tmp_path):
    planned = sweep.plan(trivial, tmp_path / "out", grid={"rate": [1]})
    planned.write()
    folder = planned.out / planned.points[0].id
    atomic_write(folder / "status.json", b'{"outcome": "diverged", "runs": ["a", "b"]}')
    frame = sweep_report.table(planned.out)
    assert frame.run_id[0] == "a b"
    assert "loss" not in frame


def test_planning_needs_no_torch():
    code = "import sys, samlib.cli, samlib.sweeps.planning, samlib.sweeps.engines; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_help_names_both_commands():
    result = samlib("--help")
    assert (result.exit_code, "run" in result.output, "report" in result.output) == (0, True, True)
