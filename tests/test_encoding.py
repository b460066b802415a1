"""Text is UTF-8 on every machine, whatever its locale: the code says so wherever it reads or writes some."""

import ast
import codecs

import nbformat
import pytest

from .conftest import ROOT

SOURCES = sorted(p for folder in ("samlib", "tests", "benchmarks") for p in (ROOT / folder).rglob("*.py"))
NOTEBOOKS = sorted(p for folder in ("samlib", "notebooks", "book") for p in (ROOT / folder).rglob("*.ipynb"))


def unsaid(tree):
    """The calls that leave an encoding to the locale, as (line, what)."""
    for node in (n for n in ast.walk(tree) if isinstance(n, ast.Call)):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        named = {k.arg: k.value for k in node.keywords}
        if "encoding" in named:
            continue
        if name == "read_text" and not node.args:
            yield node.lineno, name
        if name == "write_text" and len(node.args) < 2:
            yield node.lineno, name
        if any(getattr(named.get(word), "value", False) is True for word in ("text", "universal_newlines")):
            yield node.lineno, "text of a process"
        if name in ("open", "NamedTemporaryFile", "TemporaryFile", "fdopen"):
            modes = [a.value for a in [*node.args, named.get("mode")] if isinstance(a, ast.Constant)]
            binary = any(isinstance(m, str) and "b" in m and len(m) <= 3 for m in modes)
            of_something_else = isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name)
            if not binary and not (of_something_else and node.func.value.id in ("tarfile", "zipfile", "Image", "os")):
                yield node.lineno, name


@pytest.mark.parametrize(
    ("code", "count"),
    [
        ("p.read_text()", 1),
        ("p.read_text('utf-8'); p.read_text(encoding='ascii')", 0),
        ("p.write_text(x)", 1),
        ("p.write_text(x, encoding='utf-8')", 0),
        ("open(p); open(p, 'w'); p.open(); p.open('a')", 4),
        ("open(p, 'rb'); p.open('wb'); open(p, mode='ab'); tarfile.open(p); p.open(encoding='utf-8')", 0),
        ("subprocess.run(c, text=True); subprocess.run(c, text=True, encoding='utf-8')", 1),
        ("tempfile.NamedTemporaryFile('w')", 1),
        ("chart.mark(text='x'); run(c, text=False)", 0),
    ],
)
def test_the_search_finds_what_it_is_after(code, count):
    assert len(list(unsaid(ast.parse(code)))) == count


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_sources_say_the_encoding(path):
    assert list(unsaid(ast.parse(path.read_text(encoding="utf-8")))) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: str(p.relative_to(ROOT)))
def test_notebooks_say_the_encoding(path):
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            plain = "\n".join(line for line in cell.source.splitlines() if line.lstrip()[:1] not in ("%", "!"))
            assert list(unsaid(ast.parse(plain or "pass"))) == [], cell.source


def test_a_terminal_that_knows_less_gets_words():
    import samlib.terminal  # noqa: F401, which registers the way of writing

    def written(text, charset):
        return text.encode(charset, "samlib.spelled")

    assert written("η=0.3 ρ=0.1 … ‖H‖ 日", "ascii") == b"eta=0.3 rho=0.1 ... ||H|| ?"
    assert written("η × “é”", "cp1252") == b"eta \xd7 \x93\xe9\x94"
    assert written("η é", "utf-8").decode() == "η é"
    # The name of a file that is not UTF-8 comes out as it is.
    assert written("out/gr\udcf6\udcdfe", "utf-8") == b"out/gr\xf6\xdfe"
    assert written("out/gr\udcc3\udcb6e", "ascii") == "out/gröe".encode()
    assert codecs.lookup_error("samlib.spelled")
