"""Planning: what is refused before a kernel starts, and the folder of a sweep."""

import multiprocessing
import subprocess
import sys

import numpy as np
import pytest

from samlib.sweeps import planning as sweep
from samlib.sweeps.points import COLUMNS

from ..test_own_experiment import TASK
from .conftest import RUN, notebook, samlib


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


def test_planning_needs_no_torch():
    code = "import sys, samlib.cli, samlib.sweeps.planning, samlib.sweeps.engines; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_help_names_both_commands():
    result = samlib("--help")
    assert (result.exit_code, "run" in result.output, "report" in result.output) == (0, True, True)


@pytest.mark.parametrize("name", COLUMNS)
def test_a_parameter_with_the_name_of_a_column_is_refused(name, tmp_path):
    path = notebook(tmp_path / "n.ipynb", f"{name} = 1\na = 1")
    for request in (["--grid", f"{name}=1,2"], ["--set", f"{name}=1", "--grid", "a=1"]):
        result = samlib(path, *request, "--out", tmp_path / "out")
        assert (result.exit_code, f"{name} is a column that the table" in result.stderr) == (2, True), result.output
    assert samlib(path, "--grid", "a=1", "--out", tmp_path / "out", "--dry-run").exit_code == 0  # not in the table


def test_what_is_given_beside_and_in_settings_is_refused(tmp_path):
    result = samlib(RUN, "--grid", "rho=0,1", "--set", "settings={rho: 0.5}", "--out", tmp_path / "out")
    assert (result.exit_code, "rho is given twice, by itself and in settings" in result.stderr) == (2, True)


def _write_all(path, outs, started, results):
    plans = [sweep.plan(path, out, grid={"a": [1, 2]}) for out in outs]
    started.wait()
    for planned in plans:
        try:
            planned.write()
            # What a fast process does next, while a slow one still looks at the folder.
            (planned.out / planned.points[0].id).mkdir(exist_ok=True)
            results.put("")
        except Exception as error:
            results.put(repr(error))


def test_the_same_sweep_started_several_times_at_once_is_never_refused(tmp_path):
    path = notebook(tmp_path / "n.ipynb", "a: float = 1.0")
    outs = [tmp_path / f"out-{i}" for i in range(100)]
    context = multiprocessing.get_context("fork")
    started, results = context.Barrier(4), context.Queue()
    processes = [context.Process(target=_write_all, args=(path, outs, started, results)) for _ in range(4)]
    for process in processes:
        process.start()
    seen = [results.get(timeout=120) for _ in range(400)]
    for process in processes:
        process.join()
    assert set(seen) == {""}
    assert all(len(sweep.load(out).points) == 2 for out in outs)


def test_a_half_created_folder_is_completed(tmp_path):
    planned = sweep.plan(notebook(tmp_path / "n.ipynb", "a = 1"), tmp_path / "out", grid={"a": [1]})
    (tmp_path / "out").mkdir()
    for left in (".lock", "notebook.ipynb", "sweep.json.0123456789ab.part", ".DS_Store"):
        (tmp_path / "out" / left).touch()
    planned.write()
    assert sweep.load(tmp_path / "out").points == planned.points


def test_links_are_followed_and_one_that_leads_nowhere_is_named(tmp_path):
    path = notebook(tmp_path / "n.ipynb", "a = 1")
    (tmp_path / "disk").mkdir()
    for name, target in (("link.ipynb", "n.ipynb"), ("out", "disk"), ("nowhere", "gone")):
        (tmp_path / name).symlink_to(tmp_path / target)
    sweep.plan(tmp_path / "link.ipynb", tmp_path / "out", grid={"a": [1]}).write()
    sweep.plan(path, tmp_path / "disk", grid={"a": [1]}).write()  # the same
    assert (tmp_path / "disk" / "notebook.ipynb").is_file()
    result = samlib(path, "--grid", "a=1", "--out", tmp_path / "nowhere")
    assert (result.exit_code, "is a link that leads nowhere" in result.stderr) == (2, True), result.output


@pytest.mark.parametrize(
    ("store", "own"),
    [
        ("store = 'runs'", True),
        ("store: str", False),
        ("store = 5", False),
        ("store: list = []", False),
        ("b = 1", False),
    ],
)
def test_only_a_store_that_takes_text_and_is_not_given_is_the_run_store(store, own, tmp_path):
    path = notebook(tmp_path / "n.ipynb", f"a = 1\n{store}")
    given = {"store": "x"} if store == "store: str" else None
    assert sweep.plan(path, tmp_path / "out", given, grid={"a": [1]}).store is own


def test_a_damaged_plan_is_named(tmp_path):
    for content in ('{"version": 1}', '{"version": 1, "points": [{}], "notebook": "n", "cwd": "."}', "[]", "null"):
        (tmp_path / "sweep.json").write_text(content, encoding="utf-8")
        with pytest.raises(sweep.SweepError, match=r"cannot be read|another version"):
            sweep.load(tmp_path)


def test_an_own_experiment_is_part_of_what_is_swept(tmp_path):
    own = tmp_path / "my_task.py"
    own.write_text(TASK, encoding="utf-8")

    def planned():
        settings = {"experiment": str(own), "rho": 0.1, "learning_rate": 0.1}
        return sweep.plan(RUN, tmp_path / "out", settings, grid={"seed": [0, 1]})

    first = planned()
    first.write()
    planned().write()
    own.write_text(TASK.replace("Tanh", "ReLU"), encoding="utf-8")
    edited = planned()
    assert {p.id for p in edited.points}.isdisjoint(p.id for p in first.points)
    with pytest.raises(sweep.SweepError, match="or of an experiment"):
        edited.write()


def test_what_a_notebook_gives_already_cannot_stand_in_settings(tmp_path):
    with pytest.raises(sweep.SweepError, match="rule is given twice, by itself and in settings"):
        sweep.plan(RUN, tmp_path / "out", {"settings": {"rule": "usam"}}, grid={"seed": [0, 1]})


@pytest.mark.parametrize(
    ("kind", "values", "expected"),
    [
        ("float", np.linspace(0, 1, 3), [0.0, 0.5, 1.0]),
        ("int", [np.int64(2**53 + 1)], [2**53 + 1]),
        ("bool", [np.True_, np.False_], [True, False]),
        ("int", (i for i in range(2)), [0, 1]),
        ("float", "abc", None),
        ("float", 3, None),
        ("float", [np.True_], None),
    ],
)
def test_grids_from_python(tmp_path, kind, values, expected):
    path = notebook(tmp_path / "n.ipynb", f"a: {kind} = 1")
    if expected is None:
        with pytest.raises(sweep.SweepError, match=r"a must be"):
            sweep.plan(path, tmp_path / "out", grid={"a": values})
        return
    found = [p.params["a"] for p in sweep.plan(path, tmp_path / "out", grid={"a": values}).points]
    assert found == expected
    assert [type(value) for value in found] == [type(value) for value in expected]


def test_points_are_parameters_by_name(tmp_path):
    with pytest.raises(sweep.SweepError, match="each point must be parameters by name, got 'a=1'"):
        sweep.plan(notebook(tmp_path / "n.ipynb", "a = 1"), tmp_path / "out", points=["a=1"])
