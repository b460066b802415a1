"""Build the website: execute the notebooks with papermill into a staged copy, then build the Jupyter Book from it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import filelock
import yaml

from ..files import as_text
from ..sweeps.executing import execute
from ..sweeps.notebooks import parameters
from . import browser
from .contents import InvalidBook, check_kernels, documents, notebooks_in, read_config, require
from .live import stage_live
from .sharing import clean_downloads, configure, files_of_data, stage_card

__all__ = ["BookError", "InvalidBook", "build", "execution_times", "notebooks_in", "pdf"]


STATUS = "book/status"  # the notebook about the others
_NO_CHROMIUM = "printing needs Chromium, and none of its usual names is on the PATH"
SIDE_BY_SIDE = 2  # notebooks executed at a time: starting kernels and importing takes most of a second build


class BookError(Exception):
    """A step of the build that failed; the message says which and why."""


def build(root: Path, profile: str = "quick", data: str = "auto", printed: bool = False) -> Path:
    """Execute the book's notebooks and build it. Until the new site is complete, the old one stays.

    Args:
        root: the project, with ``_config.yml`` and ``_toc.yml``.
        profile: profile of the live runs in the notebooks.
        data: data policy of the live runs.
        printed: whether :func:`pdf` is to follow.

    Returns:
        The site's first page, ``_build/html/index.html``.

    Raises:
        InvalidBook: if it cannot be built; nothing was executed.
        BookError: if a notebook or the build fails.
    """
    require()
    if printed and not browser.chromium():
        raise InvalidBook(_NO_CHROMIUM)
    config, pages, names = read_config(root), documents(root / "_toc.yml"), notebooks_in(root / "_toc.yml")
    check_kernels(root, names)
    (root / "_build").mkdir(exist_ok=True)
    with filelock.FileLock(root / "_build" / ".lock"):
        stage = _stage(root, config, pages)
        stage_card(stage, config["title"])
        stage_live(stage)
        _execute_all(root, stage, names, {"profile": profile, "data": data, "stage": as_text(stage)})
        index = _jupyter_book(root, "html")
        clean_downloads(root, index.parent, names)
    return index


def _stage(root: Path, config: dict[str, Any], pages: list[Path]) -> Path:
    """A copy of the book, in which the notebooks are executed."""
    stage = root / "_build" / "stage"
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    for part in dict.fromkeys(["book", "notebooks", *(page.parts[0] for page in pages)]):
        if (root / part).is_dir():
            # A link that leads nowhere is an editor's way of saying that a file is open.
            ignore = shutil.ignore_patterns(".ipynb_checkpoints")
            shutil.copytree(root / part, stage / part, ignore=ignore, ignore_dangling_symlinks=True)
        elif (root / part).is_file():
            shutil.copy(root / part, stage)
    shutil.copy(root / "_toc.yml", stage)
    for path in stage.rglob("*"):  # what is copied from a checkout that cannot be written cannot be either
        path.chmod(path.stat().st_mode | 0o200)
    config = configure(config)
    config["execute"]["execute_notebooks"] = "off"
    (stage / "_config.yml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return stage


def _execute_all(root: Path, stage: Path, names: list[str], values: dict[str, Any]) -> None:
    print(f"executing {len(names)} notebooks, {SIDE_BY_SIDE} at a time", flush=True)
    stop = threading.Event()
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        pending = [pool.submit(_execute_page, root, stage, name, values, stop) for name in names if name != STATUS]
        try:
            for future in as_completed(pending):
                print(future.result(), flush=True)
            if STATUS in names:  # last: it shows how long the others took
                print(_execute_page(root, stage, STATUS, values), flush=True)
        except BaseException:
            stop.set()  # one failed: the others need not go on
            raise
        finally:
            pool.shutdown(cancel_futures=True)


def pdf(root: Path) -> Path:
    """Print the book that ``build`` left, as one PDF with bookmarks, by way of one long page in Chromium.

    Args:
        root: the project; its book is built.

    Returns:
        The file, ``_build/book.pdf``.

    Raises:
        BookError: if there is no Chromium, or the build fails.
    """
    if not browser.chromium():
        raise BookError(_NO_CHROMIUM)
    pages = _jupyter_book(root, "singlehtml").parent
    # Sphinx puts the page where the first chapter lies, with addresses as seen from the top.
    page_file = pages / "index.html"
    page_file.write_text(
        (pages / "book" / "index.html").read_text(encoding="utf-8").replace('"book/index.html#', '"#'), encoding="utf-8"
    )
    target = root / "_build" / "book.pdf"
    with browser.launch() as chromium:
        page = chromium.new_page(color_scheme="light")
        page.set_default_timeout(300_000)
        page.goto(page_file.as_uri())
        browser.settle(page)
        # Data behind a figure is for the website: in print its link would lead nowhere.
        page.evaluate("document.querySelectorAll('a[download]').forEach(link => link.remove())")
        page.pdf(path=target, format="A4", outline=True, tagged=True, margin={"top": "15mm", "bottom": "15mm"})
    return target


def _jupyter_book(root: Path, builder: str) -> Path:
    """Build the staged book. Warnings are errors: a broken reference or a missing image must not reach a reader."""
    # By its module: the program of that name may lie elsewhere, or belong to another environment.
    program = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()"]
    fresh = root / "_build" / "fresh"
    command = ["build", str(root / "_build" / "stage"), "--path-output", str(fresh), "--builder", builder]
    command += ["--all", "-W", "-n", "--keep-going", "--quiet"]
    shutil.rmtree(fresh, ignore_errors=True)
    done = subprocess.run([*program, *command], cwd=root, env={**os.environ, "PYTHONUTF8": "1"})
    made, target = fresh / "_build" / builder, root / "_build" / builder
    if done.returncode or not any(made.rglob("index.html")):
        raise BookError("jupyter-book failed; its messages are above")
    if target.is_symlink():  # the site is kept elsewhere
        for old in target.iterdir():
            shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
        shutil.copytree(made, target, dirs_exist_ok=True)
    else:
        shutil.rmtree(target, ignore_errors=True)
        made.rename(target)
    shutil.rmtree(fresh)
    return target / "index.html"


def execution_times(stage: Path, names: list[str]) -> dict[str, float]:
    """Seconds that executing each notebook of a staged book took; those not executed are left out."""
    import nbformat

    times = {}
    for name in names:
        path = stage / f"{name}.ipynb"
        about = nbformat.read(path, as_version=4).metadata.get("papermill", {}) if path.exists() else {}
        if about.get("duration") is not None:
            times[name] = about["duration"]
    return times


def _execute_page(
    root: Path, stage: Path, name: str, values: dict[str, Any], stop: threading.Event | None = None
) -> str:
    started = time.monotonic()
    _execute(root, root / f"{name}.ipynb", stage / f"{name}.ipynb", values, stop)
    _hide_injected_parameters(stage / f"{name}.ipynb")
    files_of_data(stage, name)
    return f"executed {name} in {time.monotonic() - started:.0f} s"


def _hide_injected_parameters(path: Path) -> None:
    """The cell that papermill adds concerns the build, not the reader."""
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if "injected-parameters" in cell.metadata.get("tags", []):
            cell.metadata["tags"].append("remove-cell")
    nbformat.write(notebook, path)


def _execute(
    root: Path, source: Path, target: Path, values: dict[str, Any], stop: threading.Event | None = None
) -> None:
    """Execute one notebook; pass those values that it has parameters for."""
    known = parameters(source) or {}
    chosen = {name: value for name, value in values.items() if name in known}
    # Notebooks beside each other share the cores out; threads that compete for one stall each other.
    env = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // SIDE_BY_SIDE))}
    done = execute(source, target, chosen, root, target.with_suffix(".log"), env=env, stop=stop)
    if done.outcome != "finished":
        raise BookError(f"{source.name} {done.outcome}:\n{done.error}")
