"""GraphSAM: its claims on evidence that must and must not support them, its runs, its pictures, its page."""

import ast
import base64
import dataclasses
import io
import json
import math
import re

import nbformat
import numpy as np
import pandas as pd
import pytest

from samlib import Run, train
from samlib.claims import CHAPTERS, Evidence, evaluate
from samlib.claims.graphsam import (
    CHEAP,
    FEWEST_SPLITS,
    NEAR_THE_EDGE,
    NEAR_THE_EDGE_OF_THE_PREVIOUS,
    OFTEN,
    WITHIN,
    intervals,
)
from samlib.claims.graphsam_readings import ages, final_error, method, of_cycles, of_edges, of_quality, period
from samlib.claims.graphsam_runs import configs, costs
from samlib.config import RunConfig
from samlib.edges import sam_edge
from samlib.edges_cached import held_edge, rotation_period
from samlib.figures import graphsam as pictures
from samlib.toys.cached import BASES, departure, identity

from .conftest import ROOT, small_config

CHAPTER = CHAPTERS["graphsam"]
CLAIMS = {claim.key: claim for claim in CHAPTER.claims}
ALL = configs()
PERIODS = {"esol": 28, "bbbp": 50}


def made(config, ratio=1.0, noise=0.0, up=1.0, error=1.0, gradients=0, turn=1.0, curvature=2.0):
    """A run of the chapter, made up: at this ratio of its edge, uphill in this share of the steps, of this error."""
    random = np.random.default_rng(config.seed)
    every = getattr(config, "every", 1)
    every = PERIODS[config.molecules] if every == "epoch" else every
    steps = np.arange(0, config.steps + 1, config.measure_every)
    # The norm of the gradient for which λ is at this ratio of the rule's own edge.
    norm = config.rho * curvature / 0.7
    edge = curvature / ratio
    rows = pd.DataFrame(
        {
            "step": steps,
            "loss": 1.0,
            "operator_norm": curvature,
            "eigenvalue_1": curvature,
            "gd_edge": 2 / config.learning_rate,
            "edge": edge,
            "edge_ratio": ratio,
            "grad_norm": norm,
            "sam_grad_norm": config.rho * curvature / ratio,
            "test_metric": math.nan,
        }
    ).astype(float)
    rows.loc[rows.index[-1], "test_metric"] = error
    time = np.arange(config.steps)
    path = pd.DataFrame({"step": time, "test_metric": math.nan})
    if config.test_every:
        path.loc[path.step % config.test_every == 0, "test_metric"] = error
    if "cache_age" in config.path:
        path["cache_age"] = (time + 1.0) % every if config.rule == "graphsam" else 0.0
    if "uphill" in config.path:
        path["uphill"] = np.where(random.permuted(np.arange(config.steps) < up * config.steps), 0.1, -0.1)
        path["uphill_cosine"] = np.where(time % every == 0, 1.0, 0.3 if up > 0.5 else -0.3)
    if "projection" in config.path:
        wanted = 2 * every
        if config.rule == "graphsam" and config.cache_beta == 0:
            wanted = rotation_period(curvature, config.learning_rate)
        path["projection"] = 0.003 * time + np.sin(2 * np.pi * time / (turn * wanted)) * 0.1
        path["projection"] += noise * random.normal(size=config.steps)
    own = config.steps + math.ceil(config.steps / every) if config.rule == "graphsam" else config.steps
    about = {"record": 2, "standin": False, "fingerprint": "f", "dataset": "made up", "gradients": own + gradients}
    run = Run(config.identity("f"), config, rows, "finished", about | {"seconds": 1.0}, path)
    return run


def named(name, runs=None, chosen=of_edges):
    return [run for run in chosen([made(c) for c in ALL] if runs is None else runs) if method(run) == name]


def judged(key, runs, toys=None):
    return evaluate(CLAIMS[key], Evidence(runs, toys or {}), "graphsam")


def test_the_thresholds_are_those_that_were_set_before_recording():
    assert (CHEAP, OFTEN, WITHIN, FEWEST_SPLITS) == (1.25, 0.8, 0.1, 5)
    assert NEAR_THE_EDGE == (0.9, 1.2)
    assert NEAR_THE_EDGE_OF_THE_PREVIOUS == (0.9, 1.1)


def test_the_runs_are_new_and_enough():
    assert len(ALL) == len(set(ALL))
    for config in ALL:
        assert config.seed >= 3
        assert getattr(config, "split", 3) >= 3
        assert config.data == "real"
    runs = [made(config) for config in ALL]
    for data in ("esol", "bbbp"):
        mine = [run for run in of_quality(runs) if run.config.molecules == data]
        for name in ("base", "SAM", "epoch, β = 0.99", "epoch, β = 0"):
            assert len({r.config.split for r in mine if method(r) == name}) >= FEWEST_SPLITS
    assert {method(run) for run in of_edges(runs)} >= {"base", "SAM", "k = 2", "k = 5", "k = 10", "k = 20", "β = 0"}
    assert {method(run) for run in of_edges(runs, "molecules")} == {"base", "SAM", "k = 10"}
    assert len(of_edges(runs)) + len(of_edges(runs, "molecules")) + len(of_cycles(runs)) + len(of_quality(runs)) == len(
        runs
    )
    held_out = [r.config for r in of_quality(runs)]
    assert {c.held_out for c in held_out} == {"test"}


def test_the_gradients_are_counted_exactly():
    runs = [made(config) for config in ALL]
    assert judged("evaluations", runs).outcome == "reproduced"
    assert judged("evaluations", runs).total == sum(config.rule == "graphsam" for config in ALL)
    for wrong in (-1, 1):
        assert judged("evaluations", [made(c, gradients=wrong) for c in ALL]).outcome == "not reproduced"


@pytest.mark.parametrize(("ratio", "outcome"), [(1.0, "reproduced"), (1.25, "reproduced"), (1.26, "not reproduced")])
def test_the_cost_is_that_of_the_cache_alone(ratio, outcome):
    table = pd.DataFrame(
        {"rule": ["base", "SAM", "epoch, β = 0.99", "k = 5"], "repeat": 0, "cpu_ratio": [1, 9, ratio, 9]}
    )
    result = judged("cost", [], {"cost": table})
    assert (result.outcome, result.total) == (outcome, 1)
    assert judged("cost", []).outcome == "not recorded"


def compared(shift, spread, splits=5, data="esol"):
    """Runs of all splits, with test errors that differ from the base's by about a shift."""
    random = np.random.default_rng(0)
    runs = []
    for config in ALL:
        if getattr(config, "molecules", "") != data or config.measure_on == "all" or config.split >= 3 + splits:
            continue
        own = config.split * 0.1
        runs.append(made(config, error=1 + own + (shift + spread * random.normal()) * (config.rho > 0)))
    return runs


def test_an_improvement_is_one_whose_interval_excludes_zero():
    better = judged("improves", compared(-0.1, 0.01))
    assert (better.outcome, better.total) == ("reproduced", 2)  # of two methods; SAM is not asked
    assert better.value == pytest.approx(-0.1, abs=0.02)
    assert judged("improves", compared(0.1, 0.01)).outcome == "not reproduced"
    assert judged("improves", compared(0.0, 0.05)).outcome == "not reproduced"
    assert judged("improves", compared(-0.1, 0.01, splits=4)).outcome == "not recorded"
    table = intervals(compared(-0.1, 0.01))
    assert set(table.method) == {"SAM", "epoch, β = 0.99", "epoch, β = 0"}
    assert (table.low < table["mean"]).all()
    assert (table["mean"] < table.high).all()


def test_the_test_error_is_the_mean_of_the_last_five_epochs():
    [config] = [c for c in ALL if getattr(c, "split", 0) == 3 and c.rho == 0 and getattr(c, "width", 0) == 64][:1]
    run = made(config)
    path = run.path.copy()
    path.loc[path.step % config.test_every == 0, "test_metric"] = np.arange(config.steps // config.test_every)
    measured = run.measurements.copy()
    measured.loc[measured.index[-1], "test_metric"] = 100.0
    changed = dataclasses.replace(run, path=path, measurements=measured)
    last = config.steps // config.test_every - 1
    assert final_error(changed) == pytest.approx((last + last - 1 + last - 2 + last - 3 + 100) / 5)


@pytest.mark.parametrize(("up", "outcome"), [(0.9, "reproduced"), (0.5, "not reproduced"), (0.1, "not reproduced")])
@pytest.mark.parametrize(("key", "beta"), [("uphill", 0.99), ("uphill_previous", 0.0)])
def test_going_uphill_is_counted_for_each_beta(key, beta, up, outcome):
    result = judged(
        key, [made(config, up=up if getattr(config, "cache_beta", 1) == beta else 1 - up) for config in ALL]
    )
    assert result.outcome == outcome
    assert result.value == pytest.approx(up, abs=0.05)


def test_ages_leave_out_the_first_epoch_and_start_at_the_true_gradient():
    run = next(made(c) for c in ALL if getattr(c, "every", 0) == "epoch" and c.molecules == "esol")
    rows = ages(run)
    assert rows.step.min() == 28
    assert (rows.age == rows.step % 28).all()


@pytest.mark.parametrize(("ratio", "outcome"), [(0.95, "reproduced"), (1.15, "reproduced"), (0.8, "not reproduced")])
def test_the_own_edge_of_a_held_direction(ratio, outcome):
    result = judged("own_edge", [made(config, ratio=ratio) for config in ALL])
    assert result.outcome == outcome
    assert set(result.details.method) == {"k = 2", "k = 5", "k = 10"}
    assert set(result.details.data) == {"mnist", "esol"}
    # Outside the law's domain, ηλ ≥ 1, a run says nothing.
    beyond = [made(c, ratio=ratio, curvature=1.5 / c.learning_rate) for c in ALL]
    assert judged("own_edge", beyond).outcome == "not recorded"


def test_the_sam_edge_is_that_of_the_gradient_at_the_weights():
    result = judged("sam_edge", [made(config) for config in ALL])
    for row in result.details.itertuples():
        rate, rho = (0.3, 0.1) if row.data == "mnist" else (0.003, 0.02)
        assert row.ratio == pytest.approx(2.0 / sam_edge(rho * 2.0 / 0.7 + 1e-5, rate, rho))
    assert result.outcome == ("reproduced" if result.details.ratio.between(0.9, 1.2).all() else "not reproduced")
    norm = 0.1 * 2.0 / 0.7
    assert held_edge(norm, 0.3, 0.1, 10) < sam_edge(norm, 0.3, 0.1)  # what makes the two claims differ


@pytest.mark.parametrize(
    ("ratio", "outcome"), [(1.0, "reproduced"), (1.15, "not reproduced"), (0.85, "not reproduced")]
)
def test_the_edge_of_the_previous_gradient(ratio, outcome):
    result = judged("previous_edge", [made(config, ratio=ratio) for config in ALL])
    assert (result.outcome, set(result.details.method)) == (outcome, {"β = 0"})
    assert result.value == pytest.approx(ratio)


@pytest.mark.parametrize(("turn", "outcome"), [(1.0, "reproduced"), (1.08, "reproduced"), (1.3, "not reproduced")])
def test_periods_are_found_under_drift_and_noise(turn, outcome):
    runs = [made(config, turn=turn, noise=0.02) for config in ALL]
    result = judged("period", runs)
    shown = result.details[result.details.method != "SAM"]  # a period of 2 can only be met or not
    assert (shown.supports == (outcome == "reproduced")).all()
    assert shown.ratio.to_numpy() == pytest.approx(turn, abs=0.03)


@pytest.mark.parametrize("wanted", [2, 10, 20])
def test_a_jump_from_side_to_side_has_its_period(wanted):
    name = {2: "SAM", 10: "k = 5", 20: "k = 10"}[wanted]
    run = named(name, chosen=of_cycles)[0]
    along = np.where(run.path.step % wanted < wanted / 2, 1.0, -1.0)
    found, predicted = period(dataclasses.replace(run, path=run.path.assign(projection=along)))
    assert predicted == wanted
    assert found == pytest.approx(wanted, rel=0.01)


def test_diverged_runs_do_not_count():
    runs = [dataclasses.replace(made(config), outcome="diverged") for config in ALL]
    for key in CLAIMS:
        assert judged(key, runs).outcome == "not recorded"


def test_a_held_perturbation_follows_the_base_optimizer_without_decay():
    for name, base in BASES.items():
        distances = [departure(base, every=k, seed=s) for k in (2, 9) for s in range(3)]
        if name in ("gradient descent with L2 decay", "AdamW"):
            assert min(distances) > 1e-4
        else:
            assert max(distances) < 1e-12
    table = identity(seeds=2)
    assert list(table) == ["base", "seed", "departure"]
    assert len(table) == 2 * len(BASES)


def test_costs_count_gradients():
    base = small_config(rho=0.0, base="adam", learning_rate=0.003)
    cached = small_config(rule="graphsam", every=4, base="adam", learning_rate=0.003)
    table = costs(base, {"cached": cached, "SAM": cached.model_copy(update={"every": 1})}, steps=9, repeats=2)
    assert table.groupby("rule", sort=False).gradients.first().to_dict() == pytest.approx(
        {"base": 1.0, "cached": 12 / 9, "SAM": 2.0}
    )
    assert (table[table.rule == "base"].cpu_ratio == 1).all()
    assert (table.milliseconds > 0).all()


def drawn():
    runs = [made(config, noise=0.01) for config in ALL]
    table = pd.DataFrame(
        {"rule": ["base", "SAM"] * 2, "repeat": [0, 0, 1, 1], "gradients": [1, 2] * 2, "cpu_ratio": [1, 1.9, 1, 2.0]}
    )
    return {
        "directions": lambda: pictures.directions(runs),
        "cached_edges_mnist": lambda: pictures.edges(runs),
        "cached_edges_molecules": lambda: pictures.edges(runs, "molecules"),
        "oscillations": lambda: pictures.oscillations(runs),
        "quality": lambda: pictures.quality(runs, intervals(runs)),
        "costs": lambda: pictures.costs(table),
    }


@pytest.mark.parametrize("name", list(drawn()))
def test_every_picture_is_accessible_and_carries_its_data(name):
    figure = drawn()[name]()
    page = figure._repr_html_()
    labels = re.findall(r'role="img" aria-label="([^"]+)"', page)
    assert labels
    assert all(len(label) > 40 for label in labels)
    assert figure.name == name
    csv = base64.b64decode(re.search(r"base64,([^\"]+)", page)[1])
    assert len(pd.read_csv(io.BytesIO(csv))) == len(figure.data) > 0
    assert {run.id for run in figure.runs} <= set(figure.data.get("run_id", [])) or name == "quality"
    assert "nan" not in figure.caption


def test_a_real_run_is_drawn_and_marked_where_its_data_are_a_stand_in():
    settings = {"steps": 12, "measure_every": 4}
    runs = [train(small_config(**settings)), train(small_config(**settings, rule="graphsam", every=3))]
    figure = pictures.edges(runs)
    assert "Stand-in data" in figure.caption
    assert set(figure.data.method) == {"SAM", "k = 3, β = 1"}
    held = figure.data[figure.data.run_id == runs[1].id]
    expected = sam_edge(held.grad_norm.to_numpy() + 1e-5, 0.3, 0.1)
    np.testing.assert_allclose(held.sam_edge, expected)


def test_the_parameters_of_the_page():
    notebook = nbformat.read(ROOT / "notebooks" / "graphsam.ipynb", as_version=4)
    [cell] = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    assigned = {node.target.id: ast.literal_eval(node.value) for node in ast.parse(cell.source).body}
    assert {"profile", "data", "device", "store"} <= assigned.keys()
    usual = {name: assigned[name] for name in ("profile", "learning_rate", "rho", "seed", "steps", "data", "device")}
    config = RunConfig(
        experiment="mnist", rule="graphsam", every=assigned["every"], cache_beta=assigned["beta"], **usual
    )
    assert config.steps <= 100  # within a minute
    assert json.dumps(assigned)
