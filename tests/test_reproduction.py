"""The result itself: SAM trains at its edge, with thresholds written down before the runs were looked at."""

import numpy as np
import pytest

from samlib import RunConfig, train


def sam_at_its_edge(run):
    rows = run.measurements
    assert run.outcome == "finished"
    half = rows[rows.step >= run.config.steps / 2]
    assert 0.95 <= half.edge_ratio.median() <= 1.10
    # A ratio of 1 can come from the gradient norm alone; the curvature itself must fall after it met the edge.
    contact = rows[rows.edge_ratio >= 0.95].iloc[0]
    assert contact.eigenvalue_1 / run.last.eigenvalue_1 >= 1.5
    return run.last


@pytest.mark.data
@pytest.mark.usefixtures("real_data")
def test_sam_on_mnist():
    last = sam_at_its_edge(train(RunConfig(experiment="mnist", learning_rate=0.3, rho=0.1, steps=1500, data="real")))
    assert last.gd_edge == pytest.approx(20 / 3)
    assert last.gd_edge / last.sam_edge > 5


def test_sam_on_the_digits_stand_in():
    config = RunConfig(experiment="mnist", learning_rate=0.3, rho=0.1, steps=1500, width=100, data="standin")
    last = sam_at_its_edge(train(config))
    assert last.gd_edge / last.sam_edge > 5


@pytest.mark.data
@pytest.mark.usefixtures("real_data")
def test_gradient_descent_on_mnist_ends_at_its_edge():
    run = train(RunConfig(experiment="mnist", learning_rate=1.0, rho=0.0, steps=600, data="real"))
    assert run.last.operator_norm == pytest.approx(run.last.gd_edge, rel=0.1)


def test_gradient_descent_below_its_edge_stays_below():
    run = train(RunConfig(experiment="mnist", learning_rate=0.3, rho=0.0, steps=300, width=50, data="standin"))
    assert (run.measurements.edge_ratio < 0.9).all()
    assert np.isfinite(run.measurements.loss).all()
