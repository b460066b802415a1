"""The configuration file of a sweep."""

import pytest

from samlib.sweeps import planning as sweep
from samlib.sweeps.configuration import read_config

from .conftest import RUN, samlib


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("grid: {rho: []}", "grid of rho is empty"),
        ("points: []", "the list of points is empty"),
        ("grid: [", "is not a readable YAML file"),
        ("\x00", "is not a readable YAML file"),
        ("", "must hold some of set, grid, ranges, points"),
        ("grids: {rho: [1]}", "grids is unknown; there are set, grid, ranges, points"),
        ("grid: {rho: 1}", "grid of rho must be a list, got 1"),
        ("points: {rho: 1}", "points must be a list"),
        ("points: [1]", "a point must be names with values, got 1"),
        ("ranges: {rho: {linspace: [0, 1]}}", "range of rho must be one of linspace, logspace, geomspace"),
        ("ranges: {rho: {logspace: [0, 1, 2.5]}}", "range of rho must be"),
        ("{grid: {rho: [1]}, ranges: {rho: {linspace: [0, 1, 2]}}}", "rho stands in both grid and ranges"),
        ("points: [{rho: 0}, {rho: 0.0}]", "the point rho=0.0 occurs twice"),
        ("points: [{rho: -0.0}, {rho: 0.0}]", "the point rho=0.0 occurs twice"),
        ("grid: {rho: [0], rho: [1]}", "rho is given twice"),
        ("set: {data: standin}\nset: {data: real}\ngrid: {rho: [1]}", "set is given twice"),
    ],
)
def test_a_bad_configuration_file_is_explained(content, message, tmp_path):
    (tmp_path / "sweep.yaml").write_text(content, encoding="utf-8")
    result = samlib(RUN, "--config", tmp_path / "sweep.yaml", "--out", tmp_path / "out")
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_ranges_points_and_grids_combine(tmp_path):
    (tmp_path / "sweep.yaml").write_text(
        "set: {steps: 1e2, data: standin}\n"
        "grid: {seed: [0, 1]}\n"
        "ranges: {tolerance: {logspace: [-3, -1, 3]}}\n"
        "points: [{learning_rate: 1e-1, rho: 0}, {learning_rate: 0.3, rho: 0.1}]\n",
        encoding="utf-8",
    )
    request = read_config(tmp_path / "sweep.yaml")
    assert request["grid"].pop("tolerance") == pytest.approx([0.001, 0.01, 0.1])
    request["grid"]["eigenvalues"] = [1, 2, 3]
    planned = sweep.plan(RUN, tmp_path / "out", **request)
    assert len(planned.points) == 12
    assert planned.points[0].params == {
        **{"steps": 100, "data": "standin", "learning_rate": 0.1, "rho": 0.0, "seed": 0, "eigenvalues": 1}
    }
    assert planned.swept == ["learning_rate", "rho", "seed", "eigenvalues"]


def test_the_command_line_overrides_the_configuration_file(tmp_path):
    (tmp_path / "sweep.yaml").write_text(
        "set: {steps: 5, data: standin, width: 16}\ngrid: {rho: [0, 1]}\n", encoding="utf-8"
    )
    result = samlib(
        *(RUN, "--config", tmp_path / "sweep.yaml", "--grid", "rho=0.5", "--set", "steps=7", "--set", "examples=50"),
        *("--out", tmp_path / "out", "--dry-run"),
    )
    assert result.exit_code == 0, result.output
    assert "data=standin width=16 steps=7 examples=50 rho=0.5" in result.stdout
    assert "1 points, 1 of them without a result; about " in result.stdout
    assert not (tmp_path / "out").exists()
