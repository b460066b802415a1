"""The parts of the project that are not Python: notebooks, table of contents, pinned versions."""

import json
import re
import subprocess
import sys
import tomllib
from itertools import chain

import nbformat
import papermill
import pytest
import yaml

from samlib.book import BookError, _execute, notebooks_in

from .conftest import ROOT

NOTEBOOKS = sorted(path for folder in ("notebooks", "book") for path in (ROOT / folder).glob("*.ipynb"))


def pinned():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.lower().replace("_", "-").split("==") for line in lines if "==" in line)


def test_every_dependency_is_pinned_within_its_range():
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for text in [*project["dependencies"], *chain.from_iterable(extras.values())]:
        requirement = Requirement(text)
        version = pinned()[requirement.name.lower().replace("_", "-")]
        assert requirement.specifier.contains(version), (text, version)


def test_conda_and_binder_get_the_pinned_versions():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    [pip] = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert "--constraint constraints.txt" in pip
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert any(
        set(re.findall(r"\w+", line.partition("[")[2])) <= set(extras) for line in pip if line.startswith("--ed")
    )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_committed_clean_and_valid(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


def test_the_table_of_contents_names_files_that_exist():
    toc = (ROOT / "_toc.yml").read_text()
    names = [yaml.safe_load(toc)["root"], *re.findall(r"file: (\S+)", toc)]
    for name in names:
        assert (ROOT / f"{name}.md").exists() or (ROOT / f"{name}.ipynb").exists(), name
    pages = {str(p.relative_to(ROOT).with_suffix("")) for p in NOTEBOOKS}
    # The report belongs to a sweep, not to the book.
    assert set(notebooks_in(ROOT / "_toc.yml")) == pages - {"notebooks/sweep_report"}


def test_parameters_are_typed():
    for path in NOTEBOOKS:
        for name, parameter in papermill.inspect_notebook(str(path)).items():
            assert parameter["inferred_type_name"] in ("str", "float", "int", "list"), (path, name)


def test_one_run_notebook_executes_and_shows_its_figures(tmp_path):
    values = {"data": "standin", "steps": "20", "examples": "50", "width": "8", "store": str(tmp_path / "runs")}
    _execute(ROOT, ROOT / "notebooks/run.ipynb", tmp_path / "out.ipynb", values)
    text = json.dumps(nbformat.read(tmp_path / "out.ipynb", 4))
    assert text.count('role=\\\\\\"img') + text.count('role=\\"img') >= 3
    assert "Stand-in data" in text
    assert not (tmp_path / "out.part.ipynb").exists()


def test_a_failing_notebook_fails_the_build_with_its_reason(tmp_path):
    with pytest.raises(BookError, match=r"run\.ipynb failed(.|\n)*learning_rate"):
        _execute(ROOT, ROOT / "notebooks/run.ipynb", tmp_path / "out.ipynb", {"learning_rate": "-1.0"})
    assert not (tmp_path / "out.ipynb").exists()


def test_importing_samlib_does_not_import_torch():
    code = "import sys, samlib, samlib.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
