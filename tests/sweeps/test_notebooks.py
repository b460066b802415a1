"""What is read from a notebook before anything starts: parameters, their kinds, the kernel."""

import json
import sys

import nbformat
import pytest

from samlib.sweeps import planning as sweep
from samlib.sweeps.executing import execute
from samlib.sweeps.notebooks import NotebookError, content_hash, kernel_of, parameters

from .conftest import notebook, samlib

ALIASES = "from typing import Literal as L, TypeAlias\nNamed: TypeAlias = Literal['a']\n"


def test_parameters_are_read_with_their_types(tmp_path):
    path = notebook(
        tmp_path / "n.ipynb",
        "a: float = 1 / 3\nb = 3\nc: float | None = 0.5\nd: list[float] = [1]\ne: Optional[int] = None\nf = 'x'\n"
        "g: Literal['a', 'b'] = 'a'\nh = None\ni: dict = {}\nj = True\nk: int",
    )
    found = parameters(path)
    assert {name: str(p.kind) for name, p in found.items()} == {
        **{"a": "a number", "b": "a number", "c": "a number or None", "d": "a list, each entry a number"},
        **{"e": "a whole number or None", "f": "a text", "g": "'a' or 'b'", "i": "a dict", "j": "true or false"},
        **{"h": "a number, text, truth value, list or dict", "k": "a whole number"},
    }
    assert [name for name, p in found.items() if p.required] == ["k"]


def test_outputs_do_not_change_the_hash(trivial, tmp_path):
    content = nbformat.read(trivial, as_version=4)
    content.cells[1].execution_count = 7
    nbformat.write(content, tmp_path / "run.ipynb")
    assert content_hash(trivial) == content_hash(tmp_path / "run.ipynb")
    content.cells[1].source += "\n1"
    nbformat.write(content, tmp_path / "run.ipynb")
    assert content_hash(trivial) != content_hash(tmp_path / "run.ipynb")


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


def test_a_notebook_without_kernel_name_is_executed_as_python(tmp_path):
    path = notebook(tmp_path / "n.ipynb", "a = 1", "assert a == 2")
    content = nbformat.read(path, as_version=4)
    content.metadata = {}
    nbformat.write(content, path)
    done = execute(path, tmp_path / "out.ipynb", {"a": 2}, tmp_path, tmp_path / "log.txt")
    assert done.outcome == "finished", done.error
    assert (tmp_path / "out.ipynb").exists()


@pytest.mark.parametrize(
    ("annotation", "right", "wrong"),
    [
        ("Literal['relu', 'tanh']", ["relu"], ["sigmoid", "Relu"]),
        ("typing.Literal['a', 1, None]", ["a", "1", "None"], ["2", "b"]),
        ("'Literal[True, 0.1]'", ["true", "1e-1"], ["false", "0.2"]),
        ("Union[float, None]", ["0.1", "none"], ["abc", "true"]),
        ("t.Union['int', Literal['auto']]", ["3", "auto"], ["0.5", "autos"]),
        ("Optional[Literal['a']]", ["a", "None"], ["b"]),
        ("float | Literal['auto'] | None", ["0.1", "auto", "None"], ["automatic"]),
        ("Annotated[int, 'of layers']", ["3"], ["x"]),
        ("list[Literal['a', 'b']]", ["[a, b]", "[]"], ["[a, c]", "a"]),
        ("dict[str, float]", ["{a: 1e-3}"], ["{a: x}", "[1]"]),
        ("tuple[int, ...]", ["[1, 2]"], ["[1, x]"]),
        ("Sequence[int | None]", ["[1, null]"], ["[x]"]),
        ("Kind", ["x"], ["y", "1"]),  # a name that the cell gives to an annotation
        ("Any", ["x", "1", "[1]"], []),
        ("np.ndarray", ["x", "1"], []),
        ("Literal[Colour.RED]", ["RED"], []),
        ("L['a', 'b']", ["a"], ["c"]),
        ("Named", ["a"], ["c"]),
        ("Literal[Literal['a'], 'b']", ["a", "b"], ["c"]),
    ],
)
def test_annotations_are_checked_before_anything_starts(annotation, right, wrong, tmp_path):
    path = notebook(tmp_path / "n.ipynb", f"{ALIASES}Kind = Literal['x']\na: {annotation} = undefined\nb: int = 1")
    for value in right:
        sweep.plan(path, tmp_path / "out", grid={"a": [value]})
    for value in wrong:
        with pytest.raises(sweep.SweepError, match="a must be "):
            sweep.plan(path, tmp_path / "out", grid={"a": [value]})


def kernel(folder, name, language, program):
    """Install a kernel that exists only here."""
    (folder / "kernels" / name).mkdir(parents=True)
    spec = {"argv": [program, "-f", "{connection_file}"], "display_name": name, "language": language}
    (folder / "kernels" / name / "kernel.json").write_text(json.dumps(spec), encoding="utf-8")


@pytest.mark.parametrize(
    ("metadata", "options", "message"),
    [
        ({"kernelspec": {"name": "lab", "display_name": "lab"}}, [], "the kernel lab is not installed here; there are"),
        ({"kernelspec": {"name": "python3", "display_name": "x"}}, ["--kernel", "lab"], "the kernel lab is not"),
        ({"language_info": {"name": "R"}}, [], "a kernel for r is not installed here"),
        (
            {"kernelspec": {"name": "gone", "display_name": "x"}},
            [],
            "the kernel gone starts /nowhere/python, and there",
        ),
        ({"kernelspec": {"name": "python3", "display_name": "x"}}, ["--kernel", "gone"], "/nowhere/python"),
    ],
)
def test_a_kernel_that_is_not_here_is_named_before_anything_starts(metadata, options, message, tmp_path, monkeypatch):
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    kernel(tmp_path / "jupyter", "gone", "python", "/nowhere/python")
    path = notebook(tmp_path / "n.ipynb", "a = 1", metadata=metadata)
    for more in ([], ["--dry-run"]):
        result = samlib(path, "--grid", "a=1,2", "--out", tmp_path / "out", *options, *more)
        assert (result.exit_code, message in result.stderr) == (2, True), result.output
    assert not (tmp_path / "out").exists()


def test_a_kernel_is_chosen_by_option_by_the_notebook_or_by_its_language(tmp_path, monkeypatch):
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    kernel(tmp_path / "jupyter", "lab", "Fortran", sys.executable)
    lost = notebook(tmp_path / "n.ipynb", "a = 1", metadata={"kernelspec": {"name": "lost", "display_name": "x"}})
    assert kernel_of(lost, "python3") == ("python3", "python")
    for language, name in (("fortran", "lab"), ("ipython", "python3"), ("Python", "python3")):
        spoken = notebook(tmp_path / "spoken.ipynb", "a = 1", metadata={"language_info": {"name": language}})
        assert kernel_of(spoken)[0] == name
    # The choice is the sweep's: another one needs another folder.
    result = samlib(lost, "--grid", "a=1", "--out", tmp_path / "out", "--kernel", "python3")
    assert result.exit_code == 0, result.output
    assert sweep.load(tmp_path / "out").kernel == "python3"
    result = samlib(lost, "--grid", "a=1", "--out", tmp_path / "out", "--kernel", "lab")
    assert (result.exit_code, "with python3 as its kernel" in result.stderr) == (2, True)


def test_a_kernelspec_without_a_language_is_asked_for_it(tmp_path):
    metadata = {"kernelspec": {"name": "python3", "display_name": "x"}}
    path = notebook(tmp_path / "n.ipynb", "a = 1", "assert a == 2", metadata=metadata)
    done = execute(path, tmp_path / "out.ipynb", {"a": 2}, tmp_path, tmp_path / "log.txt")
    assert done.outcome == "finished", done.error
