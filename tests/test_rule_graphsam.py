"""The rule GraphSAM in the laboratory: what a run of it is, what it costs, and the edge that it is measured against."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from samlib import RunConfig, train
from samlib.cached_law import cached_law
from samlib.config import explain
from samlib.edges_cached import held_edge, previous_gradient_edge
from samlib.optim import EPSILON, SAM
from samlib.rules import law_of, optimizer

from .conftest import small_config, small_language_config


def rows(run):
    return run.measurements.drop(columns=["seconds"])


@pytest.mark.parametrize("base", [{}, {"base": "adam", "learning_rate": 0.003}])
@pytest.mark.parametrize("beta", [1.0, 0.99, 0.0])
def test_a_true_gradient_in_every_step_is_sam_to_the_bit(base, beta):
    cached = train(small_config(rule="graphsam", every=1, cache_beta=beta, **base))
    sam = train(small_config(**base))
    known = [name for name in rows(sam) if name not in ("sam_edge",)]  # a column of the rule SAM's own
    pd.testing.assert_frame_equal(rows(cached)[known], rows(sam)[known], check_exact=True)
    assert cached.provenance["gradients"] == sam.provenance["gradients"] == 2 * cached.config.steps


def test_an_epoch_is_as_many_steps_as_it_has_mini_batches():
    run = train(small_language_config(rule="graphsam", every="epoch", path=["cache_age"], steps=30))
    epoch = run.config.examples // run.config.batch_size
    assert epoch == 12
    assert run.path.cache_age.tolist() == [(step + 1) % epoch for step in range(30)]
    assert run.provenance["gradients"] == 30 + math.ceil(30 / epoch)
    same = train(small_language_config(rule="graphsam", every=epoch, path=["cache_age"], steps=30))
    pd.testing.assert_frame_equal(rows(run), rows(same), check_exact=True)


def test_with_the_full_batch_an_epoch_is_a_step():
    assert train(small_config(rule="graphsam", every="epoch")).provenance["gradients"] == 2 * 30


@pytest.mark.parametrize("every", [2, 3, 5])
def test_a_row_is_measured_against_the_edge_of_the_last_true_gradient(every):
    config = small_config(rule="graphsam", every=every, cache_beta=1.0, steps=11, measure_every=1, dtype="float64")
    measured = train(config).measurements
    norms = measured.grad_norm.to_numpy()
    for step, edge in enumerate(measured.edge):
        held = norms[step - step % every] + EPSILON
        assert edge == pytest.approx(held_edge(held, config.learning_rate, config.rho, every), rel=1e-12)
    np.testing.assert_allclose(measured.edge_ratio, measured.operator_norm / measured.edge)


def test_without_memory_the_edge_is_that_of_the_gradient_stepped_with():
    config = small_config(rule="graphsam", every=50, cache_beta=0.0, steps=11, measure_every=1, dtype="float64")
    measured = train(config).measurements
    expected = [previous_gradient_edge(norm, config.learning_rate, config.rho) for norm in measured.sam_grad_norm]
    np.testing.assert_allclose(measured.edge, expected, rtol=1e-12)
    assert not np.allclose(measured.sam_grad_norm, measured.grad_norm)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"every": 5, "cache_beta": 0.99}, "norm of the stored average"),
        ({"every": 5, "cache_beta": 0.0}, "every 50 steps"),
        ({"every": 5, "momentum": 0.9}, "without momentum or decay"),
        ({"every": 5, "weight_decay": 0.1}, "without momentum or decay"),
    ],
)
def test_where_no_edge_is_known_there_is_none_and_why(settings, why):
    config = small_config(rule="graphsam", **settings, steps=6, measure_every=3)
    law = law_of(config, optimizer(config, nn.Parameter(torch.zeros(3))))
    assert why in law.reason
    assert train(config).measurements.edge.isna().all()


def test_around_adam_it_is_measured_against_adams_edge():
    config = small_config(rule="graphsam", every=4, base="adam", learning_rate=0.003, steps=8, measure_every=4)
    measured = train(config).measurements
    assert measured.edge.to_numpy()[1:] == pytest.approx(38 / 0.003)
    assert measured.preconditioned_norm[1:].notna().all()  # before the first step Adam has no preconditioner


@pytest.mark.parametrize("every", [0, -3, 1.5, "week", None])
def test_a_period_that_is_none_is_refused(every):
    with pytest.raises(ValidationError, match="every"):
        small_config(rule="graphsam", every=every)


@pytest.mark.parametrize("beta", [-0.1, 1.1, math.nan])
def test_a_beta_out_of_range_is_refused(beta):
    with pytest.raises(ValidationError, match="cache_beta"):
        small_config(rule="graphsam", every=3, cache_beta=beta)


def test_without_a_radius_it_is_the_base_alone_at_one_gradient_a_step():
    alone = small_config(rule="graphsam", every=3, cache_beta=0.5, rho=0.0)
    assert alone == small_config(rho=0.0)
    assert train(alone).provenance["gradients"] == 30


def test_settings_arrive_as_words_too():
    assert small_config(rule="graphsam", every="7").every == 7
    assert RunConfig(**small_config(rule="graphsam", every=7).model_dump()).every == 7


class Hill:
    """A random quadratic of a given largest curvature, flat along a slope: its gradient's norm stays as it is."""

    def __init__(self, curvature, slope, seed):
        generator = torch.Generator().manual_seed(seed)
        basis = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=generator)).Q
        values = torch.rand(6, dtype=torch.float64, generator=generator) * 0.9 * curvature
        values[0], values[1] = curvature, 0
        self.hessian, self.slope, self.top = basis @ values.diag() @ basis.T, slope * basis[:, 1], basis[:, 0]
        self.start = 1e-9 * torch.randn(6, dtype=torch.float64, generator=generator)

    def grows(self, learning_rate, rho, every, beta, steps):
        """Whether the principal coordinate grows under the optimizer, seen at true gradients."""
        w = nn.Parameter(self.start.clone())
        stepper = SAM([w], torch.optim.SGD, rho=rho, every=every, beta=beta, lr=learning_rate)

        def closure():
            w.grad = self.hessian @ w.detach() + self.slope
            return torch.zeros(())

        seen = []
        for step in range(steps):
            if step % min(every, 10) == 0:
                seen.append(abs(float(self.top @ w.detach())))
                if seen[-1] > 1e-5:
                    return True
            stepper.step(closure)
        quarter = len(seen) // 4
        return max(seen[-quarter:]) > max(seen[:quarter])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("every", "beta"), [(1, 1.0), (2, 1.0), (5, 1.0), (10, 1.0), (10**6, 0.0)])
def test_the_optimizer_is_stable_below_the_law_it_is_measured_against_and_not_above(every, beta, seed):
    slope, learning_rate, rho = 0.5 + 0.3 * seed, 0.2, 0.4 + 0.1 * seed
    probe = SAM([nn.Parameter(torch.zeros(6))], torch.optim.SGD, rho=rho, every=every, beta=beta, lr=learning_rate)
    edge = cached_law(probe)(slope + EPSILON)
    assert 0 < edge < 2 / learning_rate
    steps = 600 if beta else 3000
    assert not Hill(0.98 * edge, slope, seed).grows(learning_rate, rho, every, beta, steps)
    assert Hill(1.02 * edge, slope, seed).grows(learning_rate, rho, every, beta, steps)


@pytest.mark.parametrize("every", [0, 2.5, "week", True, "-1"])
def test_a_bad_period_is_named_once(every):
    with pytest.raises(ValidationError) as caught:
        small_config(rule="graphsam", every=every)
    assert explain(caught.value) == [f"every must be a whole number of steps, at least 1, or epoch, got {every!r}"]


@pytest.mark.parametrize("rule", ["frobenius_sam", "determinant_sam"])
def test_one_loss_change_has_no_spread(rule):
    with pytest.raises(ValidationError, match="samples"):
        small_config(rule=rule, strength=1.0, samples=1)
    assert small_config(rule="trace_sam", strength=1.0, samples=1).samples == 1
