"""What a sweep shows while it runs, and how long it will take."""

import sys

import pytest

from samlib.files import atomic_write
from samlib.journal import append
from samlib.sweeps import planning as sweep
from samlib.sweeps import progress
from samlib.sweeps.points import Status
from samlib.sweeps.progress import Reporter

from .conftest import notebook


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


def test_an_estimate_comes_from_executed_points(trivial, tmp_path):
    planned = sweep.plan(trivial, tmp_path / "out", grid={"rate": [1, 2, 3]})
    assert progress.estimate(planned) is None
    folder = planned.out / planned.points[0].id
    atomic_write(folder / "status.json", b'{"outcome": "finished", "seconds": 10}')
    (folder / "executed.ipynb").touch()
    assert progress.estimate(planned, 2) == (10.0, "from 1 executed points")
    assert [progress.duration(s) for s in (5, 300, 7200)] == ["5 s", "5 min", "2.0 h"]


def test_a_list_in_a_label_is_no_markup(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    path = notebook(tmp_path / "n.ipynb", "units: list = []")
    planned = sweep.plan(path, tmp_path / "out", grid={"units": ["['/x', b]", "[bold]"]})
    reporter = Reporter(planned)
    for point in planned.points:
        (planned.out / point.id).mkdir(parents=True)
        append(planned.out / point.id / "progress.jsonl", "attempt", number=1)
    with reporter.shown():
        reporter.update()
    assert "['bold']" in capsys.readouterr().err


def test_a_failed_point_with_brackets_is_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "200")
    planned = sweep.plan(notebook(tmp_path / "n.ipynb", 'a: str = ""'), tmp_path / "out", grid={"a": ["[/b]", "x"]})
    reporter = Reporter(planned)
    with reporter.shown():
        reporter.complete(planned.points[0], Status("failed", error="ValueError", seconds=2))
    assert "[/b]" in capsys.readouterr().err
