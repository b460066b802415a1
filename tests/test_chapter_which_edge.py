"""An edge for every rule: claims on evidence that must and must not support them, runs, pictures."""

import json
import math

import numpy as np
import pandas as pd
import pytest

from samlib import Run
from samlib.claims import CHAPTERS, Evidence, evaluate
from samlib.claims.which_edge import RULES, SEEDS, by_rule, configs
from samlib.figures import which_edge as pictures
from samlib.rules import law_of
from samlib.rules import optimizer as make_optimizer

from .conftest import ROOT

CHAPTER = CHAPTERS["which_edge"]
CLAIMS = {claim.key: claim for claim in CHAPTER.claims}


def run_of(config, ratio=1.0, plain=0.5, drift=0.0, norm=5.0, **more):
    """A run whose ratios are given; λ drifts by a share over the last half, and ‖g‖ falls by a factor there."""
    step = np.arange(0, 101, 10)
    late = np.clip((step - 50) / 50, 0, 1)
    gd_edge = 2 / config.learning_rate
    sharpness = plain * gd_edge * (1 + drift * late)
    frame = pd.DataFrame(
        {
            "step": step,
            "loss": 0.1,
            "eigenvalue_1": sharpness,
            "operator_norm": sharpness,
            "gd_edge": gd_edge,
            "edge": sharpness / ratio,
            "edge_ratio": ratio * np.ones(len(step)),
            "grad_norm": norm**-late,
        }
    )
    return Run(
        config.id if hasattr(config, "id") else "x", config, frame.assign(**more), "finished", {"standin": False}
    )


def judged(key, runs):
    return evaluate(CLAIMS[key], Evidence(runs, {}), "which_edge")


def test_each_run_is_planned_once_and_is_found_by_its_rule():
    plan = configs()
    assert len(set(plan)) == len(plan) == len(SEEDS) * sum(map(len, RULES.values()))
    runs = [run_of(config) for config in plan]
    assert sum(len(by_rule(runs, experiment)) for experiment in RULES) == len(plan)
    assert 0 not in SEEDS  # the trials' seed


@pytest.mark.parametrize("config", configs()[: sum(map(len, RULES.values()))], ids=str)
def test_every_rule_but_sam_around_adam_has_a_law(config):
    import torch

    law = law_of(config, make_optimizer(config, torch.nn.Parameter(torch.ones(3)), 1))
    assert (law.limit > 0) if config.base != "adam" or not config.rho else True


@pytest.mark.parametrize(("ratio", "outcome"), [(1.05, "reproduced"), (1.5, "not reproduced")])
def test_a_run_at_its_edge_supports_that_and_one_beyond_does_not(ratio, outcome):
    verdict = judged("own_edge", [run_of(config, ratio) for config in configs()])
    assert verdict.outcome == outcome
    assert verdict.value == pytest.approx(ratio)
    assert "SAM around Adam" not in set(verdict.details.rule)


def test_a_run_that_never_reaches_its_edge_says_nothing():
    runs = [run_of(config, 0.9) for config in configs()]
    assert judged("own_edge", runs).outcome == "not recorded"
    assert judged("sam_around_adam", runs).total == len(SEEDS)


def test_rows_of_the_negative_end_do_not_count():
    config = configs()[0]
    run = run_of(config)
    run.measurements.loc[run.measurements.step > 30, "operator_norm"] *= 2
    run.measurements.loc[run.measurements.step <= 30, "edge_ratio"] = 0.5
    assert not judged("own_edge", [run]).total


def test_the_own_edge_must_be_nearer_than_that_of_gradient_descent():
    near = judged("not_plain", [run_of(config, 1.05, plain=0.3) for config in configs()])
    assert near.outcome == "reproduced"
    assert near.value == pytest.approx(math.log(1.05) / abs(math.log(0.3)))
    assert not set(near.details.rule) & {"Adam", "SAM around Adam"}
    far = judged("not_plain", [run_of(config, 1.6, plain=1.1) for config in configs()])
    assert far.outcome == "not reproduced"
    assert not judged(
        "not_plain", [run_of(config, 1.0, plain=1.0) for config in configs()]
    ).total  # one and the same edge


def test_a_constant_edge_needs_a_gradient_that_moves():
    chosen = [c for c in configs() if c.rule == "usam"]
    assert judged("usam_constant", [run_of(c, drift=0.1) for c in chosen]).outcome == "reproduced"
    assert judged("usam_constant", [run_of(c, drift=0.5) for c in chosen]).outcome == "not reproduced"
    assert not judged("usam_constant", [run_of(c, norm=1.1) for c in chosen]).total


def test_the_figures_show_all_that_is_given_and_say_what_they_show():
    found = by_rule([run_of(config) for config in configs()], "mnist")
    figure = pictures.ratios(found, "MNIST")
    assert figure.svg.count("<svg") == len(RULES["mnist"])
    assert "heavy ball 0.9 1.00" in figure.alt
    plain = pictures.ratios(found, "MNIST", "gd_edge")
    assert plain.data.ratio.unique() == pytest.approx([0.5])
    usam = {place: run for place, run in found.items() if place[0].startswith("unnormalised")}
    edges = {rule: 2.0 for rule, _ in usam}
    assert set(pictures.constant(usam, edges).data.rule) == set(edges)


def test_the_page_takes_parameters_and_is_in_the_contents():
    cells = json.loads((ROOT / "notebooks" / "which_edge.ipynb").read_text(encoding="utf-8"))["cells"]
    assert sum("parameters" in cell["metadata"].get("tags", []) for cell in cells) == 1
    assert "notebooks/which_edge" in (ROOT / "_toc.yml").read_text(encoding="utf-8")
