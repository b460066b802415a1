"""What the website offers beside its pages: files of data, notebooks, launch buttons, a card."""

import base64
import io
import re

import nbformat
import pytest
import yaml
from PIL import Image

from samlib import published_runs
from samlib.figures import card
from samlib.site import sharing
from samlib.site.build import execution_times, notebooks_in

from .conftest import ROOT

CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))


def test_without_an_address_nothing_depends_on_one():
    config = sharing.configure(CONFIG, {})
    assert "launch_buttons" not in config
    assert not config["html"]["use_repository_button"]
    assert config["sphinx"]["config"]["ogp_site_url"] == ""
    assert "sphinxext.opengraph" in config["sphinx"]["extra_extensions"]
    assert yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8")) == CONFIG


@pytest.mark.parametrize("given", ["in the configuration", "by GitHub"])
def test_an_address_brings_launch_edit_and_issue_buttons(given):
    environ = {"GITHUB_SERVER_URL": "https://github.com", "GITHUB_REPOSITORY": "someone/book"}
    written = {"repository": {"url": "https://github.com/someone/book", "branch": "main"}}
    config = sharing.configure(*((CONFIG, environ) if given == "by GitHub" else ({**CONFIG, **written}, {})))
    assert config["repository"] == written["repository"]
    assert {"binderhub_url", "colab_url"} <= set(config["launch_buttons"])
    assert config["html"]["use_edit_page_button"]
    assert config["html"]["use_issues_button"]
    if given == "by GitHub":
        assert config["sphinx"]["config"]["ogp_site_url"] == "https://someone.github.io/book/"


def test_every_notebook_of_the_book_can_install_samlib():
    """The first code cell, which Colab needs, is the same everywhere and agrees with the configuration."""
    cells = set()
    for name in notebooks_in(ROOT / "_toc.yml"):
        cell = next(c for c in nbformat.read(ROOT / f"{name}.ipynb", 4).cells if c.cell_type == "code")
        assert cell.metadata.tags == ["remove-cell"], name
        cells.add(cell.source)
    [source] = cells
    assert f'repository = "{CONFIG["repository"]["url"]}"\n' in source


def staged(tmp_path, *pages):
    outputs = [nbformat.v4.new_output("display_data", {"text/html": page}) for page in pages]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(outputs=outputs)])
    notebook.metadata["papermill"] = {"duration": 1.5}
    (tmp_path / "book").mkdir()
    nbformat.write(notebook, tmp_path / "book/page.ipynb")


def link(name, content):
    return f'<a download="{name}.csv" href="data:text/csv;base64,{base64.b64encode(content).decode()}">Data (CSV)</a>'


def test_long_data_become_files_with_the_same_content(tmp_path):
    small, large = b"step,loss\n0,1\n", b"step,loss\n" + b"0,1\n" * 5000
    staged(tmp_path, link("a", small), link("b", large), link("b", large[::-1]))
    sharing.files_of_data(tmp_path, "book/page")
    pages = [o.data["text/html"] for o in nbformat.read(tmp_path / "book/page.ipynb", 4).cells[0].outputs]
    assert pages[0] == link("a", small)
    for page, content in zip(pages[1:], (large, large[::-1]), strict=True):
        href = re.search(r'<a download="b\.csv" href="([^"]+)">Data \(CSV\)</a>', page)[1]
        assert (tmp_path / sharing.EXTRA / "book" / href).resolve().read_bytes() == content  # as seen from the page


def test_downloads_are_the_committed_notebooks(tmp_path):
    (tmp_path / "_sources/book").mkdir(parents=True)
    sharing.clean_downloads(ROOT, tmp_path, ["book/claims"])
    assert (tmp_path / "_sources/book/claims.ipynb").read_bytes() == (ROOT / "book/claims.ipynb").read_bytes()


@pytest.mark.parametrize("run", [None, published_runs("mnist", ROOT / "data/published")[3]])
def test_the_card_has_the_size_that_sites_expect(run):
    assert Image.open(io.BytesIO(card(run, "A title"))).size == (1200, 630)


def test_execution_times_are_those_of_papermill(tmp_path):
    staged(tmp_path)
    assert execution_times(tmp_path, ["book/page", "book/not_there"]) == {"book/page": 1.5}
