"""The trajectory explorer: its specification, and the data it carries."""

import json
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import vl_convert

from samlib import published_runs
from samlib.claims import last_half
from samlib.figures import standard
from samlib.site import explorer

from .conftest import ROOT

# The grid alone: runs of another size form groups of their own.
RUNS = standard(published_runs("mnist", ROOT / "data" / "published"))


def content(page):
    """What the page carries, each group with its runs."""
    found = json.loads(re.search(r'id="explorer-data">(.*?)</script>', page.data, re.DOTALL)[1])
    runs = dict(re.findall(r'class="samlib-runs" data-source="([^"]+)">(.*?)</script>', page.data, re.DOTALL))
    for group in found["groups"]:
        group["runs"] = json.loads(runs[group["source"]])[group["key"]]
    return found


@pytest.fixture
def without_vega(monkeypatch):
    """The libraries take seconds to bundle and are the same for every page."""
    monkeypatch.setattr(explorer, "_vega", lambda: "")


def diverged(run):
    """The same run, had it diverged at its last step."""
    rows = run.measurements.copy()
    rows.iloc[-1, rows.columns.get_indexer(rows.columns.difference(["step", "loss"]))] = np.nan
    rows.loc[rows.index[-1], "loss"] = np.inf
    return replace(run, outcome="diverged", measurements=rows)


def test_the_page_carries_the_measurements(without_vega):
    [group] = content(explorer.explore({"mnist": RUNS, "cifar10": []}))["groups"]
    assert group["key"] == "mnist"
    assert {run["id"] for run in group["runs"]} == {run.id for run in RUNS}
    for run, shown in zip(RUNS, group["runs"], strict=True):
        assert (shown["learning_rate"], shown["rho"], shown["seed"]) == (
            run.config.learning_rate,
            run.config.rho,
            run.config.seed,
        )
        assert shown["step"] == run.measurements.step.tolist()
        assert shown["diverged"] is None
        for name in explorer.QUANTITIES:
            np.testing.assert_allclose(shown[name], run.measurements[name], rtol=1e-5)


def test_the_map_shows_the_statistic_of_the_claims():
    for cell in explorer.cells(RUNS):
        place = (cell["learning_rate"], cell["rho"])
        own = [run for run in RUNS if (run.config.learning_rate, run.config.rho) == place]
        assert cell["edge_ratio"] == np.median([last_half(run).edge_ratio.median() for run in own])
        assert (cell["runs"], cell["diverged"]) == (len(own), 0)


def test_diverged_runs_are_shown_and_enter_no_median(without_vega):
    one, *others = [run for run in RUNS if (run.config.learning_rate, run.config.rho) == (1.0, 0.1)]
    [cell] = explorer.cells([diverged(one), *others])
    assert cell["diverged"] == 1
    assert cell["text"].endswith("*")
    assert cell["edge_ratio"] == np.median([last_half(run).edge_ratio.median() for run in others])
    [cell] = explorer.cells([diverged(one)])
    assert (cell["edge_ratio"], cell["text"]) == (None, "diverged")
    [group] = content(explorer.explore({"mnist": [diverged(one)]}))["groups"]  # no NaN, no infinity: JSON has neither
    assert group["runs"][0]["diverged"] == one.last.step
    assert group["runs"][0]["loss"][-1] is None


def test_runs_of_another_size_are_a_choice_of_their_own():
    wide = replace(RUNS[0], config=RUNS[0].config.model_copy(update={"width": 1000, "examples": 5000}))
    paper = replace(RUNS[0], config=RUNS[0].config.model_copy(update={"profile": "paper"}))
    found = explorer.groups("mnist", [wide, paper, *RUNS], "MNIST")
    assert found[0]["key"] == "mnist"
    assert len(found[0]["runs"]) == len(RUNS)
    assert found[1]["key"] == "mnist:reduced:examples=5000:width=1000"
    assert found[2]["key"].startswith("mnist:paper")
    assert len({group["label"] for group in found}) == 3


def test_thinning_keeps_order_and_both_ends():
    rows = pd.DataFrame({"step": np.arange(12_345)})
    kept = explorer.thin(rows, 1000).step.to_numpy()
    assert len(kept) == 1000
    assert (kept[0], kept[-1]) == (0, 12_344)
    assert set(np.diff(kept)) <= {12, 13}
    pd.testing.assert_frame_equal(explorer.thin(rows[:1000], 1000), rows[:1000])


def test_a_page_of_long_runs_stays_small(without_vega):
    rows = RUNS[0].measurements
    long = rows.loc[rows.index.repeat(40)].assign(step=np.arange(40 * len(rows))).reset_index(drop=True)
    page = explorer.explore({"mnist": [replace(run, measurements=long) for run in RUNS]})
    assert len(page.data) < 2_000_000  # the libraries are another million characters
    [group] = content(page)["groups"]
    assert all(500 < len(run["step"]) <= explorer.MOST_POINTS for run in group["runs"])
    assert (
        len(content(explorer.explore({"mnist": [replace(RUNS[0], measurements=long)]}))["groups"][0]["runs"][0]["step"])
        == 1000
    )


def test_nothing_published(tmp_path):
    page = explorer.explore({"mnist": published_runs("mnist", tmp_path)})
    assert "No runs are published yet" in page.data
    assert "<script" not in page.data


def test_the_charts_are_valid_and_tied_together():
    """Altair has validated them by its schema; here Vega-Lite itself compiles them."""
    vega = vl_convert.vegalite_to_vega(explorer.trajectories().to_dict())
    assert {"at", "hover"} <= {signal["name"] for signal in vega["signals"]}
    assert len([scale for scale in vega["scales"] if scale["name"] == "x"]) == 1  # one for the three panels
    colours = {name: explorer.COLOURS[name] for name in explorer.QUANTITIES}
    [palette] = [scale for scale in vega["scales"] if scale["name"] == "color"]
    assert dict(zip(palette["domain"], palette["range"], strict=True)) == colours
    assert "cell" in {
        signal["name"] for signal in vl_convert.vegalite_to_vega(explorer.overview().to_dict())["signals"]
    }


def test_the_page_asks_nobody_for_anything():
    page = explorer.explore({"mnist": RUNS}).data
    assert "vegaEmbed" in page
    assert page.count("</script>") == page.count("<script") == 4
    assert not re.search(r"<(script|link)[^>]*(src|href)=", page)
    assert len(page) < 2_000_000
    assert "@VEGA@" not in page
