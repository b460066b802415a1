import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from samlib.mean_square import SgdSharpness
from samlib.noise import kernel_norm
from samlib.toys import noise as toys_noise
from samlib.toys.noise import (
    _descend,
    _quadratic_regression,
    kernel_rate,
    linear_thresholds,
    pathwise_rate,
    quadratic_runs,
    random_kernel,
)


def test_random_kernel_has_the_columns_of_its_name():
    """Θ = (2/NC) Σ_i s_i² g_i g_iᵀ with g_i of N(0, 1): its trace is about 2 Σ_i s_i², its rows as many as outputs."""
    for decay in (0.0, 0.5, 1.0):
        traces = torch.stack([random_kernel(20, 3, decay, seed).trace() for seed in range(30)])
        squares = torch.arange(1, 121).double() ** (-2 * decay)
        variance = 2 * 4 * float((squares**2).sum()) / 60 / 30  # χ² of every column and row
        assert float(traces.mean()) == pytest.approx(2 * float(squares.sum()), abs=4 * variance**0.5)
    assert random_kernel(4, 2).shape == (8, 8)
    assert torch.equal(random_kernel(4, 2, 1.0, 3), random_kernel(4, 2, 1.0, 3))
    assert not torch.equal(random_kernel(4, 2, 1.0, 3), random_kernel(4, 2, 1.0, 4))


@given(st.floats(0.1, 10), st.integers(1, 30), st.floats(0, 1), st.integers(1, 4))
def test_kernel_rate_of_equal_eigenvalues(value, count, fraction, outputs):
    """K = (p/C) n ηλ/(2 − (1 − p)ηλ) = 1 at ηλ = 2/(pn/C + 1 − p); without noise at ηλ = 2."""
    expected = 2 / value / (fraction * count / outputs + 1 - fraction)
    assert kernel_rate(torch.full((count,), value), fraction, outputs) == pytest.approx(expected, rel=1e-6)


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=20), st.floats(0.01, 1), st.integers(1, 4))
def test_the_kernel_norm_is_one_at_its_rate(values, fraction, outputs):
    values = torch.tensor(values, dtype=torch.float64)
    rate = kernel_rate(values, fraction, outputs)
    assert kernel_norm(values, rate * (1 - 1e-9), fraction, outputs) < 1
    assert kernel_norm(values, rate * (1 + 1e-9), fraction, outputs) >= 1


@pytest.mark.parametrize(("outputs", "decay"), [(1, 0.0), (1, 1.0), (3, 0.5)])
def test_thresholds_are_ordered(outputs, decay):
    rows = linear_thresholds(20, (1, 4, 20), (0, 1), outputs, decay)
    assert len(rows) == 6
    for row in rows:
        assert row["exact_rate"] <= row["kernel_rate"] * (1 + 1e-6)  # K ≥ 1 implies instability
        assert row["exact_rate"] <= row["gd_rate"] * (1 + 1e-6)
        assert row["trace_rate"] <= row["gd_rate"]
        if row["batch_size"] == 20:
            assert row["kernel_rate"] == pytest.approx(row["gd_rate"])
            assert row["exact_rate"] == pytest.approx(row["gd_rate"], rel=1e-6)
        if row["batch_size"] == 1 and row["kernel_rate"] < row["gd_rate"]:  # K = K_tr for single examples
            assert row["trace_rate"] == pytest.approx(row["kernel_rate"])
    assert rows == linear_thresholds(20, (1, 4, 20), (0, 1), outputs, decay)


@pytest.mark.parametrize("sampling", ["subsets", "epochs"])
@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_pathwise_threshold_of_decoupled_examples(batch_size, sampling):
    """A chosen example's residual is multiplied by 1 − η(N/B)λ_i and another's is not: η = 2B/(N λ_max)."""
    theta = torch.diag(torch.tensor([1.0, 3.0, 0.5, 2.0], dtype=torch.float64))
    found = pathwise_rate(theta, batch_size, sampling=sampling, chains=3, steps=200)
    assert found == pytest.approx(2 * batch_size / (4 * 3.0), rel=0.003)


def test_pathwise_threshold_of_the_full_batch_with_several_outputs():
    theta = random_kernel(6, 2, 0.0, 0)
    found = pathwise_rate(theta, 6, 2, chains=2, steps=400)
    assert found == pytest.approx(2 / float(torch.linalg.eigvalsh(theta)[-1]), rel=0.003)


def test_a_typical_run_survives_where_the_mean_square_does_not():
    """With skewed spectra and single examples; and the rows are those of the function."""
    row = linear_thresholds(40, (1,), (0,), decay=1.0, simulate=("subsets", "epochs"))[0]
    assert row["exact_rate"] < row["subsets_rate"] < row["gd_rate"]
    assert row["subsets_rate"] == pathwise_rate(random_kernel(40, 1, 1.0, 0), 1)
    assert row["epochs_rate"] == pathwise_rate(random_kernel(40, 1, 1.0, 0), 1, sampling="epochs")
    assert row["epochs_rate"] != row["subsets_rate"]


@pytest.mark.parametrize("scale", [0.1, 10.0])
def test_a_threshold_beyond_the_rates_tried_is_not_a_number(monkeypatch, scale):
    theta = random_kernel(6, 1, 0.0, 0)
    right = toys_noise.sgd_sharpness(theta, 0.0).value
    monkeypatch.setattr(toys_noise, "sgd_sharpness", lambda *_: SgdSharpness(scale * right, 0.0, True))
    assert math.isnan(pathwise_rate(theta, 6, chains=2, steps=100))


def test_an_unknown_way_of_sampling_is_refused():
    with pytest.raises(ValueError, match="sampling must be 'subsets' or 'epochs', got 'bootstrap'"):
        pathwise_rate(torch.eye(3).double(), 1, sampling="bootstrap")


def regression(curvature, examples=8, parameters=12, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return _quadratic_regression(generator, examples, parameters, 0.5, curvature), generator


def test_without_curvature_the_full_batch_contracts_as_its_kernel_says():
    """z_t = (1 − ηΘ)^t z_0."""
    (jacobian, curvature, targets), generator = regression(0.0)
    theta = 2 / 8 * jacobian @ jacobian.T
    rates = torch.tensor([0.1, 0.5, 1.2], dtype=torch.float64) / torch.linalg.eigvalsh(theta)[-1]
    initial, losses, jacobians = _descend((jacobian, curvature, targets), rates, torch.tensor([8] * 3), 30, generator)
    assert initial == pytest.approx(float(targets.square().mean()))
    for rate, loss in zip(rates, losses, strict=True):
        z = torch.linalg.matrix_power(torch.eye(8).double() - rate * theta, 30) @ targets
        assert float(loss) == pytest.approx(float(z.square().mean()), rel=1e-10)
    torch.testing.assert_close(jacobians, jacobian.expand(3, 8, 12))


def test_the_full_batch_follows_autograd():
    (jacobian, curvature, targets), generator = regression(0.5)
    w, rate = torch.zeros(12, dtype=torch.float64, requires_grad=True), 0.2

    def outputs(w):
        return jacobian @ w + torch.einsum("p,npq,q->n", w, curvature, w) / 2

    for _ in range(7):
        (gradient,) = torch.autograd.grad((outputs(w) - targets).square().mean(), w)
        w = (w - rate * gradient).detach().requires_grad_()
    w = w.detach()
    _, losses, jacobians = _descend(
        (jacobian, curvature, targets), torch.tensor([rate], dtype=torch.float64), torch.tensor([8]), 7, generator
    )
    assert float(losses[0]) == pytest.approx(float((outputs(w) - targets).square().mean()), rel=1e-12)
    torch.testing.assert_close(jacobians[0], torch.autograd.functional.jacobian(outputs, w))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_step_is_that_of_one_mini_batch(batch_size):
    """From w = 0 the Jacobian after a step is J − η Q (2/B) Σ_S J_i (f_i − y_i): one subset S must explain it."""
    (jacobian, curvature, targets), generator = regression(0.5)
    found = _descend(
        (jacobian, curvature, targets),
        torch.tensor([0.1], dtype=torch.float64),
        torch.tensor([batch_size]),
        1,
        generator,
    )[2][0]
    distances = []
    for chosen in itertools.combinations(range(8), batch_size):
        part = list(chosen)
        w = 0.1 * 2 / batch_size * targets[part] @ jacobian[part]
        distances.append(float((jacobian + curvature @ w - found).abs().max()))
    assert sorted(distances)[0] < 1e-12 < 1e-6 < sorted(distances)[1]


def test_rows_of_quadratic_runs():
    rows = quadratic_runs((0.2, 4.5), (2, 5), (0, 1), examples=10, parameters=20, steps=100)
    assert len(rows) == 2 * 2 * 3
    again = [quadratic_runs((0.2, 4.5), (2, 5), (seed,), examples=10, parameters=20, steps=100) for seed in (0, 1)]
    assert repr(rows) == repr([row for part in again for row in part])  # NaN differs from itself
    for row in rows:
        assert row["learning_rate"] * row["initial_sharpness"] == pytest.approx(row["rate"])
        if row["rate"] > 4:  # beyond any edge
            assert row["trained"] == 0
            assert math.isnan(row["sharpness"])
        if row["batch_size"] == 10:
            assert row["kernel_trace"] == 0 or math.isnan(row["kernel_trace"])
            assert row["full_edge_ratio"] == pytest.approx(row["learning_rate"] * row["sharpness"] / 2, nan_ok=True)


def test_the_trace_at_the_full_batchs_solution_tells_which_runs_train():
    rows = quadratic_runs((0.2, 0.6), (1, 2, 4, 8), (0, 1))
    known = [row for row in rows if row["full_edge_ratio"] < 0.7 and row["batch_size"] < 50]
    quiet, loud = ([r for r in known if r["kernel_trace"] < 0.7], [r for r in known if r["kernel_trace"] > 1])
    assert len(quiet) >= 6
    assert len(loud) >= 4
    assert all(row["trained"] for row in quiet)
    assert not any(row["trained"] for row in loud)
