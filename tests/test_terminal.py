"""The command line on terminals that know no Greek, and settings that are given twice."""

import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from samlib.cli import app
from samlib.files import as_path
from samlib.sweeps import load
from samlib.terminal import given_once, pairs, seconds

from .conftest import ROOT
from .sweeps.conftest import notebook

CHARSETS = ("ascii", "latin-1", "cp1252", "cp437", "utf-8")
# The locale C as such: Python goes to UTF-8 by itself unless it is told not to.
C = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
SMALL = ["--set", "examples=50", "--set", "width=8", "--set", "depth=2", "--set", "measure_every=5"]
RUN = ["run", "mnist", "--learning-rate", "0.3", "--rho", "0.1", "--steps", "10", "--data", "standin", *SMALL]


def call(*arguments, charset="utf-8"):
    return CliRunner(charset=charset).invoke(app, list(map(str, arguments)))


@pytest.mark.parametrize("charset", CHARSETS)
@pytest.mark.parametrize("command", ["", "run", "data", "claims", "book", "sweep", "sweep run", "sweep report"])
def test_every_help_is_shown_on_every_terminal(command, charset):
    result = call(*command.split(), "--help", charset=charset)
    assert (result.exit_code, result.exception) == (0, None)


@pytest.mark.parametrize("charset", CHARSETS)
def test_runs_are_trained_whatever_the_terminal_knows(charset, tmp_path):
    result = call(*RUN, "--grid", "seed=0,1,2", "--store", tmp_path / "store", charset=charset)
    assert (result.exit_code, result.exception) == (0, None)
    assert result.output.count("finished") == 3
    assert result.output.count("η=0.3 ρ=0.1" if charset == "utf-8" else "=0.3 ") == 3


@pytest.mark.parametrize("charset", CHARSETS)
def test_what_is_wrong_is_said_on_every_terminal(charset, tmp_path):
    path = notebook(tmp_path / as_path("höhe.ipynb"), "η: float = 1.0")
    result = call("sweep", path, "--grid", "η=größe", "--out", tmp_path / "out", charset=charset)
    assert result.exit_code == 2
    assert "must be a number, got" in result.output
    result = call("sweep", path, "--grid", "η=1,2", "--out", tmp_path / as_path("日本"), "--dry-run", charset=charset)
    assert result.exit_code == 0
    assert "2 points, 2 of them without a result" in result.output


def test_text_goes_through_the_locale_c_as_it_is(tmp_path):
    cell = "open(f'{name}.txt', 'w').write(f'η of {name}')\nfrom samlib.journal import record\nrecord(said=name)"
    folder = tmp_path / as_path("überall")
    folder.mkdir()
    path = notebook(folder / as_path("höhe.ipynb"), "name: str = ''\nstore: str = ''", cell)
    config = tmp_path / as_path("größe.yaml")
    config.write_text("grid: {name: [größe, 日本]}\n", encoding="utf-8")
    out = folder / as_path("日本")

    def samlib(*words):
        command = [sys.executable, "-m", "samlib.cli", *map(str, words)]
        env = {**os.environ, **C, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode()

    assert "name=h" in samlib("sweep", path, "--grid", as_path("name=höhe"), "--out", tmp_path / "o", "--dry-run")
    samlib("sweep", path, "--config", config, "--out", out, "--jobs", 2)
    samlib("sweep", "report", out)
    table = (out / "table.csv").read_text(encoding="utf-8")
    assert table.count("größe") == table.count("日本") == 2
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "größe" in page
    assert "日本" in page
    assert (tmp_path / as_path("größe.txt")).read_text(encoding="utf-8") == "η of größe"
    # And what was begun there goes on here.
    result = call("sweep", path, "--config", config, "--out", out)
    assert (result.exit_code, "2 of 2 points are done already" in result.output) == (0, True), result.output
    assert str(load(out).notebook) == str(path)


def test_an_argument_in_bytes_is_text():
    assert pairs(["name=h\udcc3\udcb6he", "learning-rate=1"], "--set") == {"name": "höhe", "learning_rate": "1"}
    with pytest.raises(SystemExit):
        pairs(["learning-rate=1", "learning_rate=2"], "--set")


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["--set", "learning_rate=0.5"], ["learning_rate is given twice, as 0.3 and as 0.5"]),
        (["--set", "learning-rate=0.5"], ["learning_rate is given twice, as 0.3 and as 0.5"]),
        (["--set", "rho=0.1"], ["rho is given twice, as 0.1 and as 0.1"]),
        (["--seed", "5", "--grid", "seed=0,1"], ["seed is given twice, as 5 and as ['0', '1']"]),
        (["--seed", "0", "--grid", "seed=0,1"], ["seed is given twice"]),  # at its default it is given, too
        (["--profile", "quick", "--set", "profile=paper"], ["profile is given twice"]),
        (["--device", "cpu", "--grid", "device=cpu,auto"], ["device is given twice"]),
        (["--set", "width=9", "--grid", "width=8,16"], ["width is given twice, as 9 and as"]),
        (["--set", "width=9", "--set", "width=9"], ["--set names width twice"]),
        (["--set", "batch-size=9", "--set", "batch_size=8"], ["--set names batch_size twice"]),
        (["--grid", "width=9", "--grid", "width=8"], ["--grid names width twice"]),
        (["--rho", "0.2"], ["--rho is given twice"]),
        (["--jobs", "1", "--jobs", "2"], ["--jobs is given twice"]),
        (["--set", "rho=1", "--grid", "steps=1,2"], ["rho is given twice", "steps is given twice"]),
    ],
)
def test_a_setting_is_given_once(arguments, messages, tmp_path):
    result = call(*RUN[: RUN.index("--set")], *arguments, "--store", tmp_path / "store")
    assert result.exit_code == 2, result.output
    assert all(message in result.output for message in messages), result.output
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("option", ["--out", "--config", "--jobs", "--timeout", "--retries", "--ray", "--kernel"])
def test_an_option_of_a_sweep_is_given_once(option, tmp_path):
    path = notebook(tmp_path / "n.ipynb", "a = 1")
    result = call(
        "sweep", path, "--grid", "a=1", *([] if option == "--out" else ["--out", tmp_path / "out"]), *[option, "1"] * 2
    )
    assert (result.exit_code, f"{option} is given twice" in result.output) == (2, True), result.output


def test_repeatable_options_and_flags_may_be_repeated(tmp_path):
    path = notebook(tmp_path / "n.ipynb", "a = 1\nb = 1\nc = 1\nd = 1")
    options = ["--grid", "a=1", "--grid", "b=1", "--set", "c=1", "--set", "d=1", "--dry-run", "--dry-run"]
    assert call("sweep", path, *options, "--out", tmp_path / "out").exit_code == 0


def test_times_and_places():
    assert [seconds(text, "--x") for text in ("90s", "9m", "2h", "5")] == [90, 540, 7200, 5]
    given_once({"a": 1}, {"b": 2}, {})


def test_a_compiled_run_says_what_it_lacks_in_the_locale_c(tmp_path):
    """PyTorch's compiler reads its own files as the locale has it."""
    command = [sys.executable, "-m", "samlib", *RUN, "--set", "compiled=true", "--store", str(tmp_path / "store")]
    environment = {**os.environ, **C, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, encoding="utf-8", check=False)
    assert done.returncode == 1
    assert "set PYTHONUTF8=1, or do without the compiler" in " ".join((done.stdout + done.stderr).split())
