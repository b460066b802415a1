import base64
import io
import re

import numpy as np
import pandas as pd
import pytest

from samlib import Run, RunConfig, figures, published_runs, train
from samlib.cli import app

from .conftest import small_config


@pytest.fixture(scope="module")
def runs():
    configs = [small_config(rho=rho, seed=seed, eigenvalues=2) for rho in (0.0, 0.1) for seed in (0, 1)]
    return [train(c) for c in configs] + [train(small_config(learning_rate=1000.0, rho=0.0))]


DRAWN = {
    "norms_and_edges": lambda runs: figures.norms_and_edges(runs),
    "norms_and_sam_edge": lambda runs: figures.norms_and_edges(runs, gd=False),
    "alignments": figures.alignments,
    "losses": figures.losses,
    "eigenvalues": figures.eigenvalues,
    "edge_ratios": figures.edge_ratios,
    "headline": lambda runs: figures.headline(runs[-2]),
}


@pytest.mark.parametrize("name", DRAWN)
def test_every_figure_is_accessible_themed_and_carries_its_data(name, runs):
    figure = DRAWN[name](runs)
    page = figure._repr_html_()
    label = re.search(r'role="img" aria-label="([^"]+)"', page)
    assert label
    assert len(label[1]) > 40
    assert "currentColor" in page
    assert figures.style.FOREGROUND not in page
    assert figure.name == name
    csv = base64.b64decode(re.search(r"base64,([^\"]+)", page)[1])
    data = pd.read_csv(io.BytesIO(csv))
    assert len(data) == len(figure.data)
    for run in figure.runs:
        assert run.id in page
        assert run.id in set(data.run_id)
    assert "samlib run mnist" in page
    assert "Stand-in data" in page or name == "headline"


def test_the_data_are_the_measurements(runs):
    data = figures.norms_and_edges(runs).data
    for run in runs:
        drawn = data[data.run_id == run.id]
        np.testing.assert_array_equal(drawn.operator_norm, run.measurements.operator_norm)


def test_diverged_runs_are_shown(runs):
    assert "1 of 1 diverged" in figures.losses(runs).svg


def test_the_command_under_a_figure_reproduces_the_run(runs, tmp_path):
    from typer.testing import CliRunner

    run = runs[2]
    arguments = figures.command(run).split()[1:]
    result = CliRunner().invoke(
        app, [*arguments, "--data", "standin", "--device", "cpu", "--store", str(tmp_path / "s")]
    )
    assert run.id in result.output


def test_final_table(runs):
    table = figures.final_table(runs)
    assert list(table["ρ"]) == ["0", "0.1", "0"]
    sam = [run for run in runs if run.config.rho]
    expected = np.mean([run.last.loss for run in sam])
    assert table["training loss"][1].startswith(f"{expected:.4g}")
    assert table["training loss"][2] == "–"
    assert list(table["diverged"]) == [0, 0, 1]


def test_choosing_runs(runs):
    assert figures.standard(runs, "quick") == []
    assert figures.with_spectrum(runs) == runs[:-1]
    assert len(figures.beside([train(small_config(seed=3))])) == 1
    assert "digits" in figures.banner(runs).data
    assert figures.banner([]).data == ""
    with pytest.raises(ValueError, match="no runs to draw"):
        figures.alignments([run for run in runs if not run.config.rho])


def test_a_setting_recorded_on_two_devices_counts_once():
    def run(device, seed):
        config = RunConfig(experiment="mnist", profile="paper", learning_rate=0.3, rho=0.1, seed=seed, device=device)
        return Run(f"{device}{seed}", config, pd.DataFrame(), "finished", {})

    runs = [run("cpu", 0), run("cuda", 0), run("cuda", 1), run("cpu", 2)]
    assert [r.id for r in figures.standard(runs, "paper")] == ["cuda0", "cuda1", "cpu2"]
    runs = [run("cpu", 0), run("cpu", 1), run("cuda", 0)]
    assert [r.id for r in figures.standard(runs, "paper")] == ["cpu0", "cpu1"]
    assert figures.typical(runs) is None
    assert figures.typical(published_runs("mnist")).config.rho == 0.1
