"""What a book consists of, as Jupyter Book reads it, and whether it can be built: asked before anything is executed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from ..sweeps.notebooks import NotebookError, kernel_of

__all__ = ["InvalidBook", "check_kernels", "documents", "notebooks_in", "read_config", "require"]

SUFFIXES = (".ipynb", ".md", ".rst")
_EXCLUDED = ("_build", "Thumbs.db", ".DS_Store", "**.ipynb_checkpoints")  # Jupyter Book's own
_NEEDED = (
    *("jupyter_book", "sphinx_external_toc", "sphinx_proof", "sphinx_design", "sphinxcontrib.bibtex"),
    *("sphinxext.opengraph", "sphinx-mathjax-offline", "bs4", "altair", "vl_convert"),
)


class InvalidBook(Exception):
    """A book that cannot be built; nothing was executed."""


def require(*modules: str) -> None:
    """Check that what builds the book is installed.

    Raises:
        InvalidBook: naming what is missing and the extra that brings it.
    """
    missing = [name for name in modules or _NEEDED if not _found(name)]
    if missing:
        raise InvalidBook(f"the book needs {', '.join(missing)}, which is missing: pip install 'samlib[book]'")


def _found(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of a package that is missing as a whole
        return False


def read_config(root: Path) -> dict[str, Any]:
    """A book's configuration, with an empty entry for each part that it leaves out.

    Raises:
        InvalidBook: if there is none, or it is not YAML.
    """
    try:
        config = yaml.safe_load((root / "_config.yml").read_text(encoding="utf-8")) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InvalidBook(f"{root / '_config.yml'} cannot be read: {' '.join(str(error).split())}") from None
    config = _mapping(config, root / "_config.yml")
    config = {"title": root.name, "html": {}, "execute": {}, "sphinx": {}, **config}
    for part in {"html", "execute", "sphinx", "repository", "launch_buttons"} & config.keys():
        config[part] = _mapping(config[part], f"{part} in {root / '_config.yml'}")
    config["sphinx"]["config"] = _mapping(
        config["sphinx"].get("config", {}), f"sphinx.config in {root / '_config.yml'}"
    )
    return config


def _mapping(value: Any, place: Any) -> dict[str, Any]:
    """Settings by name, without those that are left empty."""
    if not isinstance(value, dict):
        raise InvalidBook(f"{place} must hold settings by name, got {value!r}")
    return {name: setting for name, setting in value.items() if setting is not None}


def documents(toc: Path) -> list[Path]:
    """The files of a book's pages, within its folder and in reading order: what a table of contents names or matches.

    Raises:
        InvalidBook: if it is malformed, or names a page that is not there, or there twice.
    """
    require("sphinx_external_toc")
    from sphinx_external_toc.parsing import parse_toc_yaml

    root = toc.parent
    try:
        site_map = parse_toc_yaml(toc)
        names = list(dict.fromkeys(_walk(site_map, site_map.root, _pages(root))))
    except InvalidBook:
        raise
    except Exception as error:  # of the parser and of YAML
        raise InvalidBook(f"{toc} cannot be read: {' '.join(str(error).split())}") from None
    return [_file(root, name) for name in names]


def notebooks_in(toc: Path) -> list[str]:
    """The notebooks among a book's pages, without extension, in reading order.

    Raises:
        InvalidBook: as :func:`documents`, or if there is a notebook of a kind that is not executed.
    """
    found = []
    for page in documents(toc):
        if page.suffix == ".ipynb":
            found.append(page.with_suffix("").as_posix())
        elif page.suffix == ".md" and _is_notebook((toc.parent / page).read_text(encoding="utf-8")):
            raise InvalidBook(f"{page} is a notebook written as text, which is not executed here; make it an .ipynb")
    return found


def check_kernels(root: Path, names: list[str]) -> None:
    """Check that each notebook can be executed here.

    Raises:
        InvalidBook: naming one whose kernel is not installed, or that is damaged.
    """
    try:
        for name in names:
            kernel_of(root / f"{name}.ipynb")
    except NotebookError as error:
        raise InvalidBook(str(error)) from None


def _walk(site_map: Any, document: Any, pages: list[str]) -> Iterator[str]:
    """The names of a document and of those below it."""
    from sphinx.util.matching import patfilter
    from sphinx_external_toc.api import FileItem, GlobItem

    own = _stem(document.docname)
    yield own
    for item in (item for tree in document.subtrees for item in tree.items):
        if isinstance(item, FileItem):
            yield from _walk(site_map, site_map[item], pages)
        elif isinstance(item, GlobItem):
            matching = [name for name in sorted(patfilter(pages, str(item))) if name != own]
            if not matching:
                raise InvalidBook(f"_toc.yml: the pattern {item} matches no page; give names without their extension")
            yield from matching


def _pages(root: Path) -> list[str]:
    """All that could be a page, by name."""
    from sphinx.util.matching import get_matching_files

    excluded = (
        [*_EXCLUDED, *read_config(root).get("exclude_patterns", ())] if (root / "_config.yml").exists() else _EXCLUDED
    )
    files = get_matching_files(root, exclude_patterns=excluded)
    return list(dict.fromkeys(_stem(file) for file in files if file.endswith(SUFFIXES) and (root / file).is_file()))


def _stem(name: str) -> str:
    return next((name.removesuffix(suffix) for suffix in SUFFIXES if name.endswith(suffix)), name)


def _file(root: Path, name: str) -> Path:
    files = [Path(name + suffix) for suffix in SUFFIXES if (root / (name + suffix)).is_file()]
    if not files:
        raise InvalidBook(f"_toc.yml names {name}, and there is no {name}{f', {name}'.join(SUFFIXES)} in {root}")
    if len(files) > 1:
        raise InvalidBook(f"_toc.yml names {name}, which may be {' or '.join(map(str, files))}; rename one of them")
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise InvalidBook(f"_toc.yml names {name}, which lies outside of the book's folder")
    return files[0]


def _is_notebook(text: str) -> bool:
    from myst_nb.core.read import is_myst_markdown_notebook

    return is_myst_markdown_notebook(text)
