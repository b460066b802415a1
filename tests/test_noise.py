import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from samlib import Objective, top_eigenpairs
from samlib.experiments import mean_squared_error
from samlib.gauss_newton import TangentKernelOperator
from samlib.noise import kernel_norm, kernel_norm_bounds, noise_fraction, sam_factor, sgd_edge_ratio
from samlib.objective import flatten_parameters
from samlib.optim import EPSILON
from samlib.tangent import ntk_blocks, ntk_matrix

from .conftest import problem

spectra = st.lists(st.floats(0, 10), min_size=1, max_size=20).map(lambda v: sorted(v, reverse=True))


@given(st.integers(2, 1000), st.data())
def test_fraction_has_the_variance_of_a_sampled_mean(examples, data):
    """The mean of B drawn out of N numbers of variance 1 varies by p·(N − 1)/N, with replacement by 1/B."""
    assert noise_fraction(examples, 1) == noise_fraction(examples, 1, replacement=True) == 1
    assert noise_fraction(examples, examples) == 0
    batch_size = data.draw(st.integers(1, examples))
    fraction = noise_fraction(examples, batch_size)
    assert 0 <= fraction <= noise_fraction(examples, batch_size, replacement=True) == 1 / batch_size
    # The textbook's correction for a finite population, 1 − (B − 1)/(N − 1).
    assert fraction == pytest.approx((1 - (batch_size - 1) / (examples - 1)) / batch_size, abs=1e-12)


def test_fraction_at_its_limits():
    assert noise_fraction(1, 1) == 0
    assert noise_fraction(10**9, 10) == pytest.approx(1 / 10)
    assert noise_fraction(3, 5, replacement=True) == 1 / 5


@pytest.mark.parametrize(
    ("examples", "batch_size", "message"),
    [
        (0, 1, "examples must be a positive integer, got 0"),
        (10, 0, "batch_size must be a positive integer, got 0"),
        (10, 2.5, "batch_size must be a positive integer, got 2.5"),
        (10, 11, "batch_size must be at most the 10 examples, got 11"),
    ],
)
def test_impossible_batches_are_refused(examples, batch_size, message):
    with pytest.raises(ValueError, match=message):
        noise_fraction(examples, batch_size)


@given(spectra, st.floats(1e-3, 10), st.floats(0, 1), st.integers(1, 5))
def test_kernel_norm_is_its_formula_and_infinite_beyond_the_pole(values, rate, fraction, outputs):
    assume(abs((1 - fraction) * rate * values[0] - 2) > 1e-6)
    found = kernel_norm(values, rate, fraction, outputs)
    if (1 - fraction) * rate * values[0] >= 2:
        assert found == math.inf
    else:
        expected = sum(fraction / outputs / (2 / (rate * v) - (1 - fraction)) for v in values if rate * v > 1e-300)
        assert found == pytest.approx(expected, rel=1e-9)
        tiny = 1e-300  # what underflows has no digits
        assert found + tiny >= fraction * rate * sum(values) / (2 * outputs) * (1 - 1e-12)
    for given_as in (np.array(values), torch.tensor(values, dtype=torch.float64)):
        assert kernel_norm(given_as, rate, fraction, outputs) == found


def test_kernel_norm_grows_with_learning_rate_and_noise():
    values = [3.0, 1.0, 0.2]
    rates = [kernel_norm(values, rate, 0.4) for rate in np.linspace(0.01, 1.1, 30)]
    assert rates == sorted(rates)
    assert kernel_norm(values, 0.6, 0.0) == 0
    assert kernel_norm(values, 0.7, 0.0) == math.inf
    assert kernel_norm(values, 0.7, 0.1) < math.inf
    assert kernel_norm([0.0, 0.0], 5.0, 0.5) == 0


@given(spectra, st.floats(1e-3, 3), st.floats(0, 1), st.integers(1, 3), st.data())
def test_bounds_enclose_the_kernel_norm(values, rate, fraction, outputs, data):
    count = data.draw(st.integers(1, len(values)))
    assume(abs((1 - fraction) * rate * values[0] - 2) > 1e-6)
    low, high = kernel_norm_bounds(sum(values), values[:count], rate, fraction, outputs)
    exact = kernel_norm(values, rate, fraction, outputs)
    assert low <= exact * (1 + 1e-9) + 1e-12
    assert exact <= high * (1 + 1e-9) + 1e-12
    if exact < math.inf:
        more = kernel_norm_bounds(sum(values), values, rate, fraction, outputs)
        assert more == pytest.approx((exact, exact), rel=1e-9, abs=1e-12)


def test_bounds_are_reached():
    """The lower one by a tail of many small eigenvalues, the upper one by a tail of values as large as the last."""
    low, high = kernel_norm_bounds(7.0, [3.0, 2.0], 0.5, 0.3)
    assert low == pytest.approx(kernel_norm([3.0, 2.0, *[1e-6] * 2_000_000], 0.5, 0.3), rel=1e-6)
    assert high == pytest.approx(kernel_norm([3.0, 2.0, 2.0], 0.5, 0.3))


def test_bounds_of_a_network_from_its_trace_and_leading_pairs():
    objective, params = problem("mlp")
    trace = float(ntk_blocks(objective, params).diagonal(dim1=1, dim2=2).sum(1).mean())
    operator = TangentKernelOperator(objective, params)
    top = top_eigenpairs(operator, 5, tol=1e-3)
    values = torch.linalg.eigvalsh(ntk_matrix(objective, params))
    fraction, outputs = noise_fraction(20, 4), 4
    for share in (0.2, 0.9):
        rate = share * 2 / float(values[-1])
        low, high = kernel_norm_bounds(trace, top.values, rate, fraction, outputs)
        assert low <= kernel_norm(values, rate, fraction, outputs) <= high
        assert high < 1.5 * low


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kernel_norm([1.0], 0.0, 0.5), "learning_rate must be positive and finite, got 0.0"),
        (lambda: kernel_norm([1.0], math.inf, 0.5), "learning_rate must be positive"),
        (lambda: kernel_norm([1.0], 0.1, -0.1), "fraction must lie between 0 and 1, got -0.1"),
        (lambda: kernel_norm([1.0], 0.1, 0.5, 0), "outputs must be a positive integer, got 0"),
        (lambda: kernel_norm([], 0.1, 0.5), "must be finite and not negative"),
        (lambda: kernel_norm([1.0, math.nan], 0.1, 0.5), "must be finite and not negative"),
        (lambda: kernel_norm([1.0, -0.1], 0.1, 0.5), "must be finite and not negative"),
        (lambda: kernel_norm_bounds(1.0, [0.8, 0.5], 0.1, 0.5), "add up to 1.3, more than the trace 1"),
        (lambda: kernel_norm_bounds(math.nan, [0.8], 0.1, 0.5), "more than the trace nan"),
        (lambda: sgd_edge_ratio(1.0, -1.0), "learning_rate must be positive"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_rounding_below_zero_is_forgiven():
    assert kernel_norm([1.0, -1e-7], 0.1, 0.5) == kernel_norm([1.0, 0.0], 0.1, 0.5)
    assert kernel_norm_bounds(1.0, [1.0 + 1e-6], 0.1, 0.5)[0] == pytest.approx(kernel_norm([1.0], 0.1, 0.5), rel=1e-5)


def test_edge_ratio():
    assert sgd_edge_ratio(4.0, 0.5) == 1.0


def linear_objective(examples=6, outputs=2, seed=0):
    torch.manual_seed(seed)
    model = nn.Linear(3, outputs, bias=False, dtype=torch.float64)
    x, y = torch.randn(examples, 3).double(), torch.randn(examples, outputs).double()
    return Objective(model, mean_squared_error, x, y), flatten_parameters(model)


def products(objective, params, rho, chosen):
    """⟨g_SAM, g⟩ and |g|² of a linear model on some examples, in closed form: g_SAM = g + ρ H g/(|g| + 1e-5)."""
    x, y = objective.inputs[chosen].numpy(), objective.targets[chosen].numpy()
    w = params.view(y.shape[1], -1).numpy()
    grad = 2 / y.size * (x @ w.T - y).T @ x
    along = 2 / y.size * grad @ (x.T @ x)
    return float((grad * (grad + rho / (np.linalg.norm(grad) + EPSILON) * along)).sum()), float((grad**2).sum())


@pytest.mark.parametrize("rho", [0.0, 0.05, 1.0])
def test_sam_factor_of_the_full_batch_in_closed_form(rho):
    objective, params = linear_objective()
    above, below = products(objective, params, rho, np.arange(6))
    assert sam_factor(objective, params, rho, 6) == pytest.approx(above / below, rel=1e-10)
    if rho == 0:
        assert sam_factor(objective, params, rho, 2) == 1


def test_sam_factor_averages_numerator_and_denominator_over_mini_batches():
    """Two examples, one at a time: whatever was drawn, φ is (k a₁ + (m − k) a₂)/(k b₁ + (m − k) b₂), k about m/2."""
    objective, params = linear_objective(examples=2)
    (a1, b1), (a2, b2) = (products(objective, params, 0.3, np.array([i])) for i in range(2))
    batches = 40
    possible = [(k * a1 + (batches - k) * a2) / (k * b1 + (batches - k) * b2) for k in range(batches + 1)]
    found = sam_factor(objective, params, 0.3, 1, batches, torch.Generator().manual_seed(3))
    drawn = int(np.abs(np.array(possible) - found).argmin())
    assert found == pytest.approx(possible[drawn], rel=1e-10)
    assert 10 <= drawn <= 30
    assert found == sam_factor(objective, params, 0.3, 1, batches, torch.Generator().manual_seed(3))
    assert sam_factor(objective, params, 0.3, 1, batches) == sam_factor(objective, params, 0.3, 1, batches)


def test_sam_factor_of_the_full_batch_needs_no_average():
    objective, params = linear_objective()
    calls = []

    def counted(f, y):
        calls.append(len(y))
        return mean_squared_error(f, y)

    counting = Objective(objective.model, counted, objective.inputs, objective.targets)
    sam_factor(counting, params, 0.1, 6, batches=1)  # the first evaluation checks the loss as well
    calls.clear()
    sam_factor(counting, params, 0.1, 6, batches=1)
    alone = len(calls)
    sam_factor(counting, params, 0.1, 6, batches=50)
    assert len(calls) == 2 * alone


def test_sam_factor_without_a_gradient_is_not_a_number():
    objective, params = linear_objective()
    solved = Objective(objective.model, objective.loss, objective.inputs, objective.forward(params, objective.inputs))
    assert math.isnan(sam_factor(solved, params, 0.1, 2))


def test_sam_factor_refuses_what_it_is_not_for():
    objective, params = linear_objective()
    with pytest.raises(ValueError, match="rho must be non-negative and finite, got -1"):
        sam_factor(objective, params, -1, 2)
    with pytest.raises(ValueError, match="batch_size must be at most the 6 examples, got 7"):
        sam_factor(objective, params, 0.1, 7)
    with pytest.raises(ValueError, match="batches must be at least 1, got 0"):
        sam_factor(objective, params, 0.1, 2, batches=0)
    with pytest.raises(ValueError, match="needs squared error"):
        sam_factor(*problem("transformer"), 0.1, 2)
