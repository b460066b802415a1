"""samlib as people have it: a wheel, in an environment of their own, away from the checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pandas as pd
import pytest

from ..conftest import ROOT
from .conftest import notebook

pytest.importorskip("setuptools", minversion="77")


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """An environment on top of this one, in which samlib is the wheel."""
    folder = tmp_path_factory.mktemp("installed")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "samlib", source / "samlib", ignore=shutil.ignore_patterns("__pycache__"))
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*install, "--target", folder / "site", source], check=True, capture_output=True)
    venv.create(folder / "env", with_pip=False)
    [packages] = (folder / "env" / "lib").glob("python*/site-packages")
    paths = [folder / "site", sysconfig.get_path("purelib")]
    (packages / "all.pth").write_text("\n".join(map(str, paths)) + "\n", encoding="utf-8")
    return folder / "env" / "bin" / "python"


@pytest.fixture
def samlib(python, tmp_path):
    def call(*words, code=0):
        env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"SAMLIB_DATA": ""}
        command = [python, "-m", "samlib.cli", *words]
        done = subprocess.run(list(map(str, command)), cwd=tmp_path, env=env, capture_output=True, encoding="utf-8")
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout + done.stderr

    return call


TRAINS = """
import samlib
from samlib import RunConfig, RunStore, train
from samlib.journal import record
settings = {"data": "standin", "examples": 50, "width": 8, "depth": 2, "steps": 10, "measure_every": 5}
run = train(RunConfig(experiment="mnist", learning_rate=rate, rho=0.1, **settings), RunStore(store))
record(loss_of_mine=run.last.loss, where=samlib.__file__)
"""


def test_a_sweep_and_its_report_need_no_checkout(python, samlib, tmp_path):
    path = notebook(tmp_path / "n.ipynb", "rate: float = 0.1\nstore: str = 'runs'", TRAINS)
    samlib("sweep", path, "--grid", "rate=0.1,0.2", "--out", "out", "--jobs", 2)
    samlib("sweep", "report", "out")
    table = pd.read_csv(tmp_path / "out" / "table.csv")
    assert table.loss.tolist() == table.loss_of_mine.tolist()
    assert {Path(where).parents[1] for where in table["where"]} == {python.parents[2] / "site"}
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page.count("<figure") >= 3
    assert "executed.ipynb" in page


def test_runs_are_trained_and_a_book_that_is_not_there_is_missed(samlib, tmp_path):
    run = ["run", "mnist", "--learning-rate", 0.3, "--rho", 0.1, "--steps", 2, "--data", "standin"]
    assert "finished" in samlib(*run, "--set", "examples=50", "--set", "width=8")
    assert [p.name for p in tmp_path.iterdir()] == ["runs"]
    assert "holds no _toc.yml" in samlib("book", code=2)


def test_a_book_of_ones_own_needs_no_checkout(samlib, tmp_path):
    (tmp_path / "index.md").write_text("# A page\n\nSome text.\n", encoding="utf-8")
    (tmp_path / "_config.yml").write_text("title: A book\n", encoding="utf-8")
    (tmp_path / "_toc.yml").write_text("format: jb-book\nroot: index\n", encoding="utf-8")
    samlib("book")
    assert "Some text." in (tmp_path / "_build" / "html" / "index.html").read_text(encoding="utf-8")
