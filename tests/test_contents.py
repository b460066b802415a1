"""What a book consists of, and what is asked before anything of it is executed."""

import importlib.util

import nbformat
import pytest
from typer.testing import CliRunner

from samlib.cli import app
from samlib.site import build as site_build
from samlib.site import contents, sharing
from samlib.site.build import BookError, build
from samlib.site.contents import InvalidBook, documents, notebooks_in

from .sweeps.conftest import notebook

PAGES = ("book/index.md", "book/a.md", "notebooks/one.ipynb", "notebooks/two.ipynb", "notebooks/deep/three.ipynb")


HEAD = "format: jb-book\nroot: book/index\nchapters: "
TOC = HEAD + "[{file: notebooks/one}]"


@pytest.fixture
def book(tmp_path):
    """A book of five pages with a given table of contents."""
    for page in PAGES:
        (tmp_path / page).parent.mkdir(parents=True, exist_ok=True)
        if page.endswith(".ipynb"):
            notebook(tmp_path / page, "a = 1")
        else:
            (tmp_path / page).write_text("# A page\n", encoding="utf-8")
    (tmp_path / "_config.yml").write_text("title: η\nexclude_patterns: [notebooks/two.*]\n", encoding="utf-8")

    def with_toc(text):
        (tmp_path / "_toc.yml").write_text(text, encoding="utf-8")
        return tmp_path / "_toc.yml"

    return with_toc


@pytest.mark.parametrize(
    ("toc", "expected"),
    [
        (HEAD + "[file: notebooks/one]", ["notebooks/one"]),
        ("format: jb-book\nroot: book/index.md\nchapters: [file: notebooks/one.ipynb]", ["notebooks/one"]),
        (HEAD + "[glob: notebooks/*]", ["notebooks/one"]),  # two is excluded
        (
            HEAD + "[glob: notebooks/**]",
            ["notebooks/deep/three", "notebooks/one"],
        ),
        (HEAD + "[glob: 'notebooks/[a-o]*']", ["notebooks/one"]),
        (
            "format: jb-book\nroot: notebooks/two\nparts:\n- chapters:\n  - file: notebooks/one.ipynb\n    sections:\n"
            "    - glob: '*/deep/*'\n    - url: https://example.org\n- caption: B\n  chapters: [{file: book/a}]",
            ["notebooks/two", "notebooks/one", "notebooks/deep/three"],
        ),
        ("format: jb-article\nroot: book/index\nsections: [{file: notebooks/two}]", ["notebooks/two"]),
        ("root: book/index\nsubtrees:\n- entries: [{file: notebooks/one}, {glob: 'notebooks/*'}]", ["notebooks/one"]),
    ],
)
def test_the_table_of_contents_is_read_as_jupyter_book_reads_it(toc, expected, book):
    assert notebooks_in(book(toc)) == expected


@pytest.mark.parametrize(
    ("toc", "message"),
    [
        (
            HEAD + "[file: notebooks/gone]",
            "names notebooks/gone, and there is no",
        ),
        (
            HEAD + "[glob: notebooks/*.ipynb]",
            "matches no page; give names without",
        ),
        (HEAD + "[file: ../outside]", "there is no|outside of the book"),
        (HEAD + "[file: notebooks/both]", "may be notebooks/both.ipynb or"),
        (HEAD + "[file: book/text]", "is a notebook written as text"),
        ("format: jb-book\nchapters: [", "cannot be read"),
        ("format: jb-book\nchapters: []", "cannot be read"),
        ("42", "cannot be read"),
    ],
)
def test_a_table_of_contents_that_cannot_be_built_is_refused_before_anything_is_executed(toc, message, book, tmp_path):
    notebook(tmp_path / "notebooks" / "both.ipynb", "a = 1")
    (tmp_path / "notebooks" / "both.md").touch()
    (tmp_path / "book" / "text.md").write_text("---\nfile_format: mystnb\n---\n# Text\n", encoding="utf-8")
    book(toc)
    result = CliRunner().invoke(app, ["book", "--root", str(tmp_path)])
    assert result.exit_code == 2, result.output
    with pytest.raises(InvalidBook, match=message):
        build(tmp_path)
    assert not (tmp_path / "_build").exists()


def test_documents_are_files_in_reading_order(book):
    toc = HEAD + "[{file: notebooks/one}, {file: book/a}, {glob: 'book/*'}]"
    assert [str(d) for d in documents(book(toc))] == ["book/index.md", "notebooks/one.ipynb", "book/a.md"]


@pytest.mark.parametrize("missing", ["jupyter_book", "sphinx_external_toc", "sphinxcontrib.bibtex", "vl_convert"])
def test_what_is_not_installed_is_named_first(missing, book, tmp_path, monkeypatch):
    book(TOC)
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == missing else find(name))
    result = CliRunner().invoke(app, ["book", "--root", str(tmp_path)])
    assert result.exit_code == 2
    assert f"the book needs {missing}, which is missing: pip install 'samlib[book]'" in result.stderr
    assert not (tmp_path / "_build").exists()


def test_a_package_that_is_missing_as_a_whole_is_missing():
    with pytest.raises(InvalidBook, match=r"needs nowhere\.at_all"):
        contents.require("yaml", "nowhere.at_all")


def test_a_browser_is_asked_for_before_the_book_is_built(book, tmp_path, monkeypatch):
    book(TOC)
    monkeypatch.setattr(site_build.browser, "chromium", lambda: None)
    result = CliRunner().invoke(app, ["book", "--root", str(tmp_path), "--pdf"])
    assert (result.exit_code, "printing needs Chromium" in result.stderr) == (2, True)
    assert not (tmp_path / "_build").exists()


def test_a_kernel_that_is_not_here_is_named_first(book, tmp_path):
    book(TOC)
    content = nbformat.read(tmp_path / "notebooks" / "one.ipynb", as_version=4)
    content.metadata.kernelspec.name = "lab"
    nbformat.write(content, tmp_path / "notebooks" / "one.ipynb")
    with pytest.raises(InvalidBook, match="the kernel lab is not installed here"):
        build(tmp_path)
    assert not (tmp_path / "_build").exists()


def test_a_book_that_cannot_be_written_is_said(book, tmp_path):
    book(TOC)
    (tmp_path / "_build").touch()  # in the way, also of the superuser
    result = CliRunner().invoke(app, ["book", "--root", str(tmp_path)])
    assert (result.exit_code, "cannot write the book" in result.stderr) == (1, True), result.output


def test_a_configuration_that_cannot_be_read_is_named(book, tmp_path):
    book(TOC)
    for content in ("html: [", "\x00"):
        (tmp_path / "_config.yml").write_text(content, encoding="utf-8")
        with pytest.raises(InvalidBook, match=r"_config\.yml cannot be read"):
            build(tmp_path)
    (tmp_path / "_config.yml").unlink()
    with pytest.raises(InvalidBook, match=r"_config\.yml cannot be read"):
        build(tmp_path)


def test_a_link_that_an_editor_leaves_is_no_page(book, tmp_path):
    toc = book(HEAD + "[glob: notebooks/*]")
    (tmp_path / "notebooks" / ".#one.ipynb").symlink_to("somebody@somewhere")
    (tmp_path / "book" / ".#a.md").symlink_to("somebody@somewhere")
    assert notebooks_in(toc) == ["notebooks/one"]
    for path in (tmp_path / "book", tmp_path / "book" / "a.md"):  # nor is what cannot be written copied as such
        path.chmod(0o555)
    stage = site_build._stage(tmp_path, contents.read_config(tmp_path), documents(toc))
    assert all(path.stat().st_mode & 0o200 for path in stage.rglob("*"))
    (tmp_path / "book").chmod(0o755)
    assert sorted(p.name for p in (stage / "notebooks").iterdir()) == ["deep", "one.ipynb", "two.ipynb"]


@pytest.mark.parametrize("failing", ["notebook", "site"])
def test_the_old_site_stays_until_the_new_one_is_complete(failing, book, tmp_path):
    book(TOC)
    (tmp_path / "_build" / "html").mkdir(parents=True)
    (tmp_path / "_build" / "html" / "index.html").write_text("yesterday's site", encoding="utf-8")
    if failing == "notebook":
        notebook(tmp_path / "notebooks" / "one.ipynb", "raise ValueError('as told')")
    else:
        (tmp_path / "book" / "index.md").write_text("# A page\n\n[gone](nowhere.md)\n", encoding="utf-8")
    with pytest.raises(BookError, match="as told" if failing == "notebook" else "jupyter-book failed"):
        build(tmp_path)
    assert (tmp_path / "_build" / "html" / "index.html").read_text(encoding="utf-8") == "yesterday's site"


def test_pages_elsewhere_and_a_bare_configuration_make_a_book_too(tmp_path):
    """No folder book/, no folder notebooks/, a name in the locale C: what samlib's own book has by chance."""
    (tmp_path / "intro.md").write_text("# η, größer\n", encoding="utf-8")
    path = notebook(tmp_path / "one.ipynb", "a = 1", "print('EXECUTED', 6 * 7)")
    content = nbformat.read(path, as_version=4)
    content.cells.insert(0, nbformat.v4.new_markdown_cell("# A notebook"))
    nbformat.write(content, path)
    (tmp_path / "chapters").mkdir()
    path.rename(tmp_path / "chapters" / "one.ipynb")
    (tmp_path / "_config.yml").write_text("title: η\n", encoding="utf-8")
    toc = "format: jb-book\nroot: intro.md\nchapters: [{file: chapters/one.ipynb}]"
    (tmp_path / "_toc.yml").write_text(toc, encoding="utf-8")
    (tmp_path / "elsewhere" / "old").mkdir(parents=True)
    (tmp_path / "_build").mkdir()
    (tmp_path / "_build" / "html").symlink_to(tmp_path / "elsewhere")
    build(tmp_path)
    assert (tmp_path / "_build" / "html").is_symlink()
    assert not (tmp_path / "elsewhere" / "old").exists()
    assert "EXECUTED 42" in (tmp_path / "_build/html/chapters/one.html").read_text(encoding="utf-8")
    assert "größer" in (tmp_path / "_build/html/intro.html").read_text(encoding="utf-8")


def test_empty_parts_of_a_configuration_are_left_out(book, tmp_path):
    book(TOC)
    empty = "title:\nexecute:\nhtml:\nrepository:\nlaunch_buttons:\nsphinx:\n  config:\nexclude_patterns:\n"
    (tmp_path / "_config.yml").write_text(empty, encoding="utf-8")
    config = contents.read_config(tmp_path)
    assert config == {"title": tmp_path.name, "html": {}, "execute": {}, "sphinx": {"config": {}}}
    assert "launch_buttons" in sharing.configure(config | {"repository": {"url": "https://example.org/book"}}, {})
    assert notebooks_in(tmp_path / "_toc.yml") == ["notebooks/one"]


@pytest.mark.parametrize("text", ["[a, b]", "3", "html: 3", "sphinx: [x]", "sphinx: {config: true}", "repository: x"])
def test_a_configuration_of_another_shape_is_refused(book, tmp_path, text):
    book(TOC)
    (tmp_path / "_config.yml").write_text(text, encoding="utf-8")
    with pytest.raises(InvalidBook, match="must hold settings by name"):
        build(tmp_path)
    assert not (tmp_path / "_build").exists()
