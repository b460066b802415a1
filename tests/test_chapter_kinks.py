"""Kinks: claims on evidence that must and must not support them, and the pictures."""

import json

import numpy as np
import pandas as pd
import pytest

from samlib import Run
from samlib.claims import CHAPTERS, Evidence, evaluate
from samlib.claims.kinks import KINKED, configs
from samlib.figures import kinks as pictures
from samlib.observables.curvature import STEPS

from .conftest import ROOT

CLAIMS = {claim.key: claim for claim in CHAPTERS["kinks"].claims}


def run_of(config, read, reading=1.0):
    """A run in which differences of length s read ``read(s)`` times ‖Hv‖, which is the edge."""
    step = np.arange(0, 101, 20)
    rows = {"step": step, "loss": 0.1, "eigenvalue_1": 2.0, "operator_norm": 2.0, "edge": 2.0, "edge_ratio": 1.0}
    rows |= {f"difference_{s:g}": 2.0 * read(s) for s in STEPS}
    rows |= {"reference_norm": 2.0 * reading, "converged_norm": 2.2 * reading, "gauss_newton_norm": 1.9}
    return Run(config.experiment, config, pd.DataFrame(rows), "finished", {"standin": False})


def recorded(kinked, smooth, reading=1.0):
    return [run_of(c, kinked if c.experiment in KINKED else smooth, reading) for c in configs()]


def judged(key, runs):
    return evaluate(CLAIMS[key], Evidence(runs, {}), "kinks")


def test_differences_without_a_limit_support_the_claims():
    runs = recorded(lambda s: (1e-2 / s) ** 0.2, lambda s: 1 + s)
    assert {key: judged(key, runs).outcome for key in CLAIMS} == dict.fromkeys(CLAIMS, "reproduced")
    assert judged("no_limit", runs).value == pytest.approx(1000**0.2)
    assert judged("smooth_control", runs).total == 6  # the start counts too
    assert judged("no_limit", runs).total == 2 * 5


def test_differences_that_converge_and_other_readings_do_not():
    runs = recorded(lambda s: 1 + s, lambda s: 1 + 1e-4 / s, reading=1.5)
    assert {key: judged(key, runs).outcome for key in CLAIMS} == dict.fromkeys(CLAIMS, "not reproduced")


def test_the_pictures_show_every_run_and_length():
    runs = recorded(lambda s: 2.0, lambda s: 1.0)
    lengths = pictures.against_length(runs)
    assert lengths.svg.count("<svg") == len(runs)
    assert set(lengths.data.length) == set(STEPS)
    assert "MNIST 2.00" in lengths.alt
    readings = pictures.readings(runs)
    assert readings.data["Gauss–Newton"].unique() == pytest.approx([0.95])
    assert "MNIST 1.000, and 1.100 for the 6 of 6 that settle" in readings.caption


def test_the_page_takes_parameters_and_is_in_the_contents():
    cells = json.loads((ROOT / "notebooks" / "kinks.ipynb").read_text(encoding="utf-8"))["cells"]
    assert sum("parameters" in cell["metadata"].get("tags", []) for cell in cells) == 1
    assert "notebooks/kinks" in (ROOT / "_toc.yml").read_text(encoding="utf-8")
