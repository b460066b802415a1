"""Own objectives and sampled traces against dense Hessians and closed forms."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from samlib import Run, train
from samlib.experiments.task import Task
from samlib.observables import measure
from samlib.observables.curvature import FINITE_DIFFERENCE_NORM
from samlib.observables.sampled import RADII, own_objective
from samlib.rules import optimizer

from .conftest import small_config

UNIVERSAL = {"rho": 0.05, "strength": 0.7, "samples": 2}


def tiny(**settings):
    return small_config(
        **{"widths": "4", "activation": "tanh", "examples": 20, "dtype": "float64", "rho": 0.0, **settings}
    )


def dense(function, w):
    return torch.func.hessian(function)(w)


def at(config):
    task = Task(config)
    w = task.initial_parameters()
    x, y = task.everything().inputs.flatten(1), task.everything().targets
    shapes = [p.shape for p in task.model.parameters()]

    def loss(w):
        a, b, c, d = (part.view(s) for part, s in zip(w.split([s.numel() for s in shapes]), shapes, strict=True))
        return (torch.tanh(x @ a.T + b) @ c.T + d - y).square().mean()

    return task, w, loss


SHARPNESSES = {
    "trace_sam": lambda d: d.mean(1),
    "frobenius_sam": lambda d: (d[:, 0] - d[:, 1]).square() / 4,  # ½ of the variance of two
    "determinant_sam": lambda d: -torch.log(torch.exp(-0.3 * d).mean(1)) / 0.3,
}


@pytest.mark.parametrize("rule", SHARPNESSES)
def test_own_objective_of_paired_variants_is_the_stated_one(rule):
    config = tiny(rule=rule, **UNIVERSAL)
    _, w, loss = at(config)
    directions = torch.randn(6, len(w), generator=torch.Generator().manual_seed(0), dtype=w.dtype)
    own = own_objective(optimizer(config, nn.Parameter(w.clone())), loss, directions)
    middle = loss(w)
    changes = torch.stack([(loss(w + 0.05 * x) + loss(w - 0.05 * x) - 2 * middle) / (2 * 0.05**2) for x in directions])
    # One direction of each half is in a pair: the first dimension of the sample is n.
    groups = torch.stack([changes[:3], changes[3:]], 1)
    expected = middle + 0.7 * 0.05**2 * SHARPNESSES[rule](groups).mean()
    assert float(own(w)) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("rule", SHARPNESSES)
def test_own_sharpness_is_the_largest_eigenvalue_of_a_dense_hessian(rule):
    config = tiny(rule=rule, observables="edge,own_sharpness", own_directions=5, tolerance=1e-8, **UNIVERSAL)
    task, w, loss = at(config)
    row = measure(task, w)
    directions = torch.randn(4, len(w), generator=torch.Generator().manual_seed(0)).to(w)
    own = own_objective(optimizer(config, nn.Parameter(w.clone())), loss, directions)
    assert row["own_sharpness"] == pytest.approx(float(torch.linalg.eigvalsh(dense(own, w))[-1]), rel=1e-6)
    assert row["own_residual"] <= 1e-8 * row["own_sharpness"]
    assert row["own_sharpness"] != pytest.approx(row["eigenvalue_1"], rel=1e-3)


def test_of_the_base_alone_it_is_the_sharpness_itself():
    config = tiny(observables="edge,own_sharpness", tolerance=1e-8)
    task, w, _ = at(config)
    row = measure(task, w)
    assert row["own_sharpness"] == pytest.approx(row["eigenvalue_1"], rel=1e-7)


@pytest.mark.parametrize("settings", [{"rule": "usam", "rho": 0.2}, {"rule": "frobenius_sam", **UNIVERSAL}])
def test_penalties_by_finite_differences(settings):
    plain = {} if settings["rule"] == "usam" else {"paired": False}
    config = tiny(observables="own_sharpness", tolerance=1e-8, **settings, **plain)
    task, w, loss = at(config)
    strength = config.rho if config.rule == "usam" else config.strength
    gradient = torch.func.grad(loss)

    def penalty_gradient(w):
        hessian_product = torch.func.jvp(gradient, (w,), (gradient(w),))[1]
        return gradient(w) + strength * hessian_product

    steps = 1e-5 * torch.eye(len(w), dtype=w.dtype)
    numeric = torch.stack([(penalty_gradient(w + s) - penalty_gradient(w - s)) / 2e-5 for s in steps])
    largest = np.linalg.eigvalsh((numeric + numeric.T).detach().numpy() / 2)[-1]
    assert measure(task, w)["own_sharpness"] == pytest.approx(largest, rel=1e-6)


@pytest.mark.parametrize(
    "settings", [{"rule": "sam", "rho": 0.1}, {"rule": "determinant_sam", "paired": False, **UNIVERSAL}]
)
def test_rules_without_an_objective_have_none(settings):
    task, w, _ = at(tiny(observables="own_sharpness", **settings))
    assert math.isnan(measure(task, w)["own_sharpness"])


def test_sampled_trace_of_a_smooth_network_is_the_trace():
    config = tiny(observables="sampled_trace", trace_samples=200)
    task, w, loss = at(config)
    trace = float(dense(loss, w).trace())
    row = measure(task, w)
    for rho in RADII:
        assert abs(row[f"sampled_trace_{rho:g}"] - trace) < 4 * row[f"sampled_trace_{rho:g}_error"]
    error = float(dense(loss, w).square().sum().mul(2 / 200).sqrt())  # of normal directions
    assert row["sampled_trace_0.0001_error"] == pytest.approx(error, rel=0.3)


def test_sampled_trace_in_single_precision_is_that_in_double():
    double, single = (
        measure(*at(tiny(observables="sampled_trace", trace_samples=8, dtype=dtype))[:2])
        for dtype in ("float64", "float32")
    )
    # w itself is rounded, not the losses: with float32 losses the first would be wrong by tens of per cent.
    assert single["sampled_trace_0.0001"] == pytest.approx(double["sampled_trace_0.0001"], rel=1e-3)


def test_a_run_reads_them_and_keeps_its_path(store):
    settings = {"rule": "trace_sam", **UNIVERSAL, "steps": 6, "measure_every": 3}
    with_them = train(tiny(**settings, observables="edge,own_sharpness,sampled_trace"), store)
    without = train(tiny(**settings), store)
    assert isinstance(with_them, Run)
    assert with_them.measurements.loss.tolist() == without.measurements.loss.tolist()
    assert with_them.measurements.own_sharpness.notna().all()


def test_finite_differences_of_a_smooth_loss_read_its_hessian():
    task, w, loss = at(tiny(observables="edge,finite_difference_norm", tolerance=1e-8))
    row = measure(task, w)
    norm = float(torch.linalg.eigvalsh(dense(loss, w)).abs().max())
    divisor = 2e-3 / (2e-3 + 1e-5)  # the reference's
    assert row["converged_norm"] == pytest.approx(norm * divisor, rel=1e-4)
    assert 1 < row["converged_matvecs"] < 10  # it begins at the eigenvector
    assert row["reference_norm"] == pytest.approx(norm * divisor, rel=0.02)
    assert row["reference_norm"] < row["converged_norm"]  # from below, and stopped early
    assert [row[f"difference_{s}"] for s in ("0.001", "0.0001")] == pytest.approx([norm, norm], rel=1e-4)


def test_an_iteration_that_goes_on_changing_has_no_norm():
    class Turning:
        """Differences of gradients that are not those of any function: the norm never settles."""

        calls = 0

        def __call__(self, params):
            self.calls += 1
            return params * (1 + self.calls % 7)

    point = SimpleNamespace(
        params=torch.ones(4), principal=torch.full((4,), 0.5), objective=SimpleNamespace(gradient=Turning())
    )
    row = FINITE_DIFFERENCE_NORM.measure(point)
    assert math.isnan(row["converged_norm"])
    assert row["converged_matvecs"] == 100
