"""Sweeps and runs that are killed again and again; see the scripts in benchmarks/."""

import importlib.util
import json
import subprocess
import sys

import pandas as pd
import pytest

from samlib.sweeps import planning as sweep
from samlib.sweeps import report as sweep_report

from ..conftest import ROOT
from .conftest import samlib

has_ray = importlib.util.find_spec("ray") is not None
SMALL = ("--points=2", "--steps=600", "--width=16")


def drill(folder, *options):
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "sweep_drill.py", "--light", "--folder", folder, *options],
        capture_output=True,
        encoding="utf-8",
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout[done.stdout.index("{") :])


@pytest.fixture(scope="module")
def drilled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drill")
    return folder, drill(folder, *SMALL, "--kills=2", "--no-ray")


def test_a_killed_sweep_ends_with_the_table_of_an_undisturbed_one(drilled):
    folder, result = drilled
    assert [kill["victim"] for kill in result["kills"]] == ["sweep", "kernel"]
    assert result["tables_equal"]
    assert result["trained_again"] == 0
    frame = sweep_report.table(folder / "disturbed")
    assert list(frame.outcome) == ["finished", "finished"]
    assert frame[["loss", "operator_norm", "edge_ratio", "edge_ratio_late", "test_metric"]].notna().all(axis=None)


def test_a_report_is_a_page_with_links(drilled):
    out = drilled[0] / "undisturbed"
    first = sweep.load(out).points[0].id
    (out / first / "status.json").rename(out / first / "status.aside")
    result = samlib("report", out)
    assert result.exit_code == 1
    assert f"1 of 2 points have no result (1 missing: {first})" in result.stderr
    result = samlib("report", out, "--allow-partial")
    assert result.exit_code == 0, result.output
    second = sweep.load(out).points[1].id
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count(f'href="{second}/executed.ipynb"') >= 4
    assert 'aria-label="Heatmap of edge ratio, median over the last half of training over rho' in page
    assert f'href="{first}' not in page
    table = pd.read_parquet(out / "table.parquet")
    written = pd.read_csv(out / "table.csv")
    pd.testing.assert_frame_equal(written[["point", "rho", "loss"]], table[["point", "rho", "loss"]], check_dtype=False)
    (out / first / "status.aside").rename(out / first / "status.json")


@pytest.mark.skipif(not has_ray, reason='Ray is not installed (pip install "samlib[ray]")')
def test_a_ray_node_that_dies_loses_nothing(drilled):
    result = drill(drilled[0], *SMALL, "--ray-node")
    assert [kill["victim"] for kill in result["kills"]] == ["Ray node"]
    assert result["tables_equal"]
    assert result["trained_again"] == 0


def test_runs_that_are_killed_again_and_again_end_as_undisturbed_ones():
    """A dozen kills over rules and bases; the script itself compares, and checks that nothing was trained twice."""
    command = [sys.executable, ROOT / "benchmarks" / "run_drill.py", "--kills=12", "--steps=300", "--fork"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    for kind in ("sam sgd", "sam adam", "usam sgd", "usam adam"):
        assert f"{kind}: " in done.stdout
    assert done.stdout.count("'trained_again': 0") == 4
