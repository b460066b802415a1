import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from samlib import gd_edge, growth_factor, sam_edge, two_cycle_radius

positive = st.floats(min_value=1e-8, max_value=1e8)


@given(positive, positive, positive)
def test_sam_edge_equals_the_paper_formula_in_100_digits(grad_norm, learning_rate, rho):
    with mpmath.workdps(100):
        g, eta, radius = map(mpmath.mpf, (grad_norm, learning_rate, rho))
        exact = g / (2 * radius) * (mpmath.sqrt(1 + 8 * radius / (eta * g)) - 1)
        assert abs(mpmath.mpf(sam_edge(grad_norm, learning_rate, rho)) / exact - 1) < 1e-12


@given(positive, positive, positive)
def test_growth_factor_is_minus_one_at_the_edge(grad_norm, learning_rate, rho):
    edge = sam_edge(grad_norm, learning_rate, rho)
    assert growth_factor(edge, grad_norm, learning_rate, rho) == pytest.approx(-1, rel=1e-10)
    assert growth_factor(0.9 * edge, grad_norm, learning_rate, rho) > -1
    assert growth_factor(1.1 * edge, grad_norm, learning_rate, rho) < -1


@given(positive, positive, positive)
def test_sam_edge_lies_below_the_gd_edge_and_grows_with_the_gradient(grad_norm, learning_rate, rho):
    edge = sam_edge(grad_norm, learning_rate, rho)
    assert 0 < edge <= gd_edge(learning_rate) * (1 + 1e-15)
    assert edge <= sam_edge(2 * grad_norm, learning_rate, rho) * (1 + 1e-15)


@given(st.floats(min_value=0, max_value=1e8), positive)
def test_rho_zero_is_gradient_descent(grad_norm, learning_rate):
    assert sam_edge(grad_norm, learning_rate, 0.0) == gd_edge(learning_rate)


def test_limits():
    assert sam_edge(0.0, 0.1, 0.5) == 0
    assert math.isnan(sam_edge(math.nan, 0.1, 0.5))
    assert isinstance(sam_edge(1.0, 0.1, 0.5), float)
    assert isinstance(gd_edge(0.1), float)


@pytest.mark.parametrize("make", [np.asarray, torch.tensor])
def test_arrays_and_tensors_broadcast(make):
    norms, rates = make([[0.1], [1.0], [10.0]]), make([0.01, 0.3])
    edges = sam_edge(norms, rates, 0.2)
    assert tuple(edges.shape) == (3, 2)
    assert type(edges) is type(norms)
    for i in range(3):
        for j in range(2):
            expected = sam_edge(float(norms[i, 0]), float(rates[j]), 0.2)
            assert float(edges[i, j]) == pytest.approx(expected, rel=1e-6)


def test_tensor_keeps_dtype_and_gradient():
    norm = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda g: sam_edge(g, 0.1, 0.3), (norm,))
    assert sam_edge(torch.tensor([1, 2]), 0.5, 0.0).dtype == torch.get_default_dtype()


@given(st.floats(0.01, 100), st.floats(0.01, 0.99), st.floats(1e-3, 10))
def test_the_two_cycle_is_a_cycle_of_sam_and_lies_on_the_edge(curvature, fraction, rho):
    learning_rate = 2 * fraction / curvature
    radius = two_cycle_radius(curvature, learning_rate, rho)
    after = radius - learning_rate * curvature * (radius + rho)
    assert after == pytest.approx(-radius, rel=1e-9)
    assert sam_edge(curvature * radius, learning_rate, rho) == pytest.approx(curvature, rel=1e-9)


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan, math.inf])
def test_bad_learning_rates_are_named(rate):
    for call in (gd_edge, lambda r: sam_edge(1.0, r, 0.1), lambda r: growth_factor(1.0, 1.0, r, 0.1)):
        with pytest.raises(ValueError, match=r"learning_rate must be positive and finite, got"):
            call(rate)


def test_other_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"rho must be non-negative and finite, got -0\.1"):
        sam_edge(1.0, 0.1, -0.1)
    with pytest.raises(ValueError, match="grad_norm must be non-negative and finite, got"):
        sam_edge(torch.tensor([1.0, -1.0]), 0.1, 0.1)
    with pytest.raises(ValueError, match="2-cycle"):
        two_cycle_radius(30.0, 0.1, 0.1)
