"""Shared by the tests of sweeps: small notebooks and the command line."""

import time

import nbformat
import pytest
from typer.testing import CliRunner

from samlib.cli import app

from ..conftest import ROOT

RUN = ROOT / "notebooks" / "run.ipynb"


def notebook(path, *cells, tags=("parameters",), metadata=None):
    cells = [nbformat.v4.new_code_cell(cell) for cell in cells]
    cells[0].metadata.tags = list(tags)
    metadata = metadata or {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), path)
    return path


@pytest.fixture
def trivial(tmp_path):
    """A notebook that starts fast and ends as it is told, unless a file says that the fault is mended."""
    return notebook(
        tmp_path / "trivial.ipynb",
        'rate: float = 0.1\ndo: str = "finish"  # or raise, die, hang',
        "import os, time\n"
        "if not os.path.exists('mended'):\n"
        "    if do == 'raise': raise ValueError('as told')\n"
        "    if do == 'die': os.kill(os.getpid(), 9)\n"
        "    while do == 'hang': time.sleep(1)\n"
        "from samlib.journal import record\n"
        "record(square=rate**2)",
    )


def samlib(*arguments):
    return CliRunner().invoke(app, ["sweep", *map(str, arguments)])


def until(condition):
    deadline = time.monotonic() + 120
    while not (value := condition()):
        assert time.monotonic() < deadline, "gave up waiting"
        time.sleep(0.02)
    return value
