"""The parts of the project that are not Python: notebooks, table of contents, pinned versions."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from itertools import chain

import nbformat
import papermill
import pypdf
import pytest
import yaml

from samlib.site import extension as site
from samlib.site.browser import chromium
from samlib.site.build import BookError, _execute, _jupyter_book, notebooks_in, pdf

from .conftest import ROOT

NOTEBOOKS = sorted(path for folder in ("notebooks", "book") for path in (ROOT / folder).glob("*.ipynb"))


def pinned():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.lower().replace("_", "-").split("==") for line in lines if "==" in line)


def test_every_dependency_is_pinned_within_its_range():
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    for text in [*project["dependencies"], *chain.from_iterable(extras.values())]:
        requirement = Requirement(text)
        if requirement.name == "samlib":  # an extra that includes another
            assert requirement.extras <= set(extras), text
            continue
        version = pinned()[requirement.name.lower().replace("_", "-")]
        assert requirement.specifier.contains(version), (text, version)


def test_conda_and_binder_get_the_pinned_versions():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    [pip] = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert "--constraint constraints.txt" in pip
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
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
    toc = (ROOT / "_toc.yml").read_text(encoding="utf-8")
    names = [yaml.safe_load(toc)["root"], *re.findall(r"file: (\S+)", toc)]
    for name in names:
        assert (ROOT / f"{name}.md").exists() or (ROOT / f"{name}.ipynb").exists(), name
    pages = {str(p.relative_to(ROOT).with_suffix("")) for p in NOTEBOOKS}
    # The report belongs to a sweep, not to the book.
    assert set(notebooks_in(ROOT / "_toc.yml")) == pages


def test_parameters_are_typed():
    for path in NOTEBOOKS:
        for name, parameter in papermill.inspect_notebook(str(path)).items():
            assert parameter["inferred_type_name"] in ("str", "float", "int", "list", "bool", "dict"), (path, name)


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


@pytest.fixture
def small_book(tmp_path):
    """Build a book of one page, with the configuration of the real one."""

    def build(page):
        stage = tmp_path / "_build" / "stage"
        shutil.copytree(ROOT / "book" / "_static", stage / "book" / "_static", dirs_exist_ok=True)
        shutil.copy(ROOT / "book" / "references.bib", stage / "book")
        for path in stage.rglob("*"):  # the checkout may be one that cannot be written
            path.chmod(path.stat().st_mode | 0o200)
        config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
        (stage / "_config.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
        (stage / "_toc.yml").write_text("format: jb-book\nroot: book/index", encoding="utf-8")
        (stage / "book" / "index.md").write_text(page, encoding="utf-8")
        _jupyter_book(tmp_path, "html")

    return build


SOUND = """(top)=
# A page

[Here](#top), $\\alpha$ and {cite:t}`long2024sam`.

![A dot](_static/favicon.svg)

<details class="samlib-fold"><summary>A fold</summary>What is in it.</details>

```{bibliography}
```
"""
FAULTY = {
    "[gone](nowhere.md)": "cross-reference target not found: 'nowhere.md'",
    "{ref}`nowhere`": "undefined label: 'nowhere'",
    "{eq}`nowhere`": "equation not found: nowhere",
    "{cite:t}`nobody2000`": 'could not find bibtex key "nobody2000"',
    "![gone](gone.png)": "image file not readable: book/gone.png",
    "![](_static/favicon.svg)": "figure without alternative text: img ../_images/favicon.svg",
    '<a href="gone.html">raw</a>': "broken link: gone.html",
}


def test_the_build_fails_on_broken_links_references_citations_and_pictures(small_book, capfd):
    small_book(SOUND)
    capfd.readouterr()
    with pytest.raises(BookError):
        small_book(SOUND + "\n\n".join(["", *FAULTY]))
    output = "".join(capfd.readouterr())
    assert [message for message in FAULTY.values() if message not in output] == []


@pytest.mark.skipif(not chromium(), reason="no Chromium on this machine")
def test_the_book_prints_with_bookmarks_and_mathematics(small_book, tmp_path):
    small_book(SOUND)
    printed = pypdf.PdfReader(pdf(tmp_path))
    assert "A page" in str(printed.outline)
    text = "".join(page.extract_text() for page in printed.pages)
    assert "A page" in text
    assert "What is in it." in text
    assert "alpha" not in text


def test_each_fault_of_a_page_is_found_and_nothing_else(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "other.html").write_text(
        '<h1 id="there">x</h1><a href="../page.html?q=1#here">back</a>', encoding="utf-8"
    )
    (tmp_path / "picture.png").touch()
    (tmp_path / "page.html").write_text(
        """
        <a id="here" href="sub/other.html#there">x</a> <a href="https://example.org/gone">x</a> <a href="#here">x</a>
        <img src="picture.png" alt="a picture"> <svg aria-label="a chart"></svg>
        <svg aria-hidden="true"></svg>
        <a href="sub/other.html#nowhere">x</a> <a href="#nowhere">x</a> <img src="gone.png" alt="gone">
        <img src="picture.png"> <img src="picture.png" alt=""> <svg></svg>""",
        encoding="utf-8",
    )
    assert site.faults(tmp_path) == [
        "page.html: figure without alternative text: img picture.png",
        "page.html: figure without alternative text: svg ",
        "page.html: broken link: sub/other.html#nowhere (no such place on that page)",
        "page.html: broken link: #nowhere (no such place on that page)",
        "page.html: broken link: gone.png",
    ]
