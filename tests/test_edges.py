import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import SGD

import samlib
from samlib import (
    SAM,
    adam_edge,
    frobenius_noise_kernel,
    gd_edge,
    growth_factor,
    momentum_edge,
    sam_edge,
    sam_negative_range,
    stability_limit,
    stale_edge,
    two_cycle_radius,
    usam_edge,
)
from samlib.optim import EPSILON

from .quadratics import SIZE, Quadratic, around, expected, fill, flat, holder, stepping

positive = st.floats(min_value=1e-8, max_value=1e8)
momenta = st.floats(min_value=0, max_value=0.999)
shares = st.floats(min_value=0, max_value=0.9)  # of the decay that alone would be unstable


def agree(value, exact):
    """To 1e-12, in the 60 digits in which the other was computed."""
    return mpmath.isfinite(exact) and abs(mpmath.mpf(value) - exact) <= abs(exact) * mpmath.mpf("1e-12")


def numbers(*values):
    return map(mpmath.mpf, values)


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


EDGES = {
    "momentum": lambda g, eta, rho: momentum_edge(eta, 0.5, weight_decay=rho),
    "nesterov": lambda g, eta, rho: momentum_edge(eta, rho, nesterov=True),
    "adam": lambda g, eta, rho: adam_edge(eta, rho, weight_decay=0.1),
    "sam": lambda g, eta, rho: sam_edge(g, eta, rho, limit=stability_limit(rho), weight_decay=g / 100),
    "sam, perturbation": lambda g, eta, rho: sam_edge(g, eta, rho, weight_decay=0.5, decay="perturbation"),
    "sam, decoupled": lambda g, eta, rho: sam_edge(g, eta, rho, weight_decay=0.5, decay="decoupled"),
    "usam": lambda g, eta, rho: usam_edge(eta, rho, weight_decay=0.5),
    "low": lambda g, eta, rho: sam_negative_range(g, eta, rho)[0],
    "high": lambda g, eta, rho: sam_negative_range(g, eta, rho)[1],
    "stale": stale_edge,
    "cycle": lambda g, eta, rho: two_cycle_radius(g, eta, rho, limit=3.0),
}


@pytest.mark.parametrize("make", [np.asarray, torch.tensor])
@pytest.mark.parametrize("name", EDGES)
def test_every_edge_broadcasts(name, make):
    norms, rates, radii = [0.1, 1.0, 5.0], [0.01, 0.3], [0.0, 0.2, 0.5, 0.7]
    grid = np.meshgrid(norms, rates, radii, indexing="ij")
    expected = np.vectorize(EDGES[name])(*grid)
    shaped = make(norms)[:, None, None], make(rates)[:, None], make(radii)
    found = EDGES[name](*shaped)
    assert type(found) is type(shaped[0])
    np.testing.assert_allclose(np.broadcast_to(np.asarray(found), grid[0].shape), expected, rtol=1e-5)
    assert isinstance(EDGES[name](1.0, 0.1, 0.2), float)


def test_limits_of_the_further_edges():
    assert sam_edge(0.0, 0.1, 0.5, weight_decay=1.0) == 0
    assert sam_edge(0.0, 0.1, 0.5, weight_decay=1.0, decay="perturbation") == 0
    assert sam_edge(0.0, 0.1, 0.0, weight_decay=1.0, decay="perturbation") == pytest.approx(19)
    assert usam_edge(0.1, 0.0, limit=3.0) == pytest.approx(30)
    assert sam_negative_range(1.0, 0.1, 0.0) == (math.inf, math.inf)
    assert sam_negative_range(0.0, 0.1, 0.1) == (0, 0)
    assert stale_edge(0.0, 0.1, 0.1) == 0
    assert stale_edge(0.0, 0.1, 0.0) == stale_edge(1.0, 0.1, 0.0) == 20
    assert all(map(math.isnan, (*sam_negative_range(math.nan, 0.1, 0.1), stale_edge(math.nan, 0.1, 0.1))))
    assert stability_limit(0.0, dampening=0.5) == 2  # as PyTorch, which ignores it then
    norm = torch.tensor([0.1, 8.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda g: stale_edge(g, 0.1, 0.05), (norm,))
    assert torch.autograd.gradcheck(lambda g: sam_negative_range(g, 0.1, 0.05), (norm,))


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


@pytest.mark.parametrize(
    "settings", [{"momentum": 0.9}, {"momentum": 0.5, "dampening": 0.3}, {"momentum": 0.5, "nesterov": True}]
)
def test_the_two_cycle_of_momentum_lies_on_its_edge(settings):
    rate, rho, share = 0.1, 0.2, 0.4
    limit = stability_limit(**settings)
    curvature = share * limit / rate
    radius = two_cycle_radius(curvature, rate, rho, limit=limit)
    assert sam_edge(curvature * radius, rate, rho, limit=limit) == pytest.approx(curvature, rel=1e-12)
    params = holder(1)
    fill(params, torch.tensor([radius], dtype=torch.float64))
    optimizer = SGD(params, lr=rate, **settings)
    # What alternates in sign satisfies b = −β b + (1 − dampening) g.
    beta, push = settings["momentum"], curvature * (radius + rho)
    buffer = -push * (1 - settings.get("dampening", 0)) / (1 + beta)
    optimizer.state[params[0]]["momentum_buffer"] = torch.tensor([buffer], dtype=torch.float64)
    step = stepping(optimizer, params, lambda w: curvature * (w + rho * w.sign()))
    for sign in (-1, 1, -1):
        step()
        assert params[0].item() == pytest.approx(sign * radius, rel=1e-12)


@given(positive, positive, st.floats(min_value=0, max_value=1e8))
def test_the_defaults_give_the_bits_that_they_always_gave(grad_norm, learning_rate, rho):
    def published(g, eta, radius, sqrt):
        below = sqrt(g) + sqrt(g + 8 * radius / eta)
        return 4 / eta * sqrt(g) / below if radius else 2 / eta

    assert sam_edge(grad_norm, learning_rate, rho) == published(grad_norm, learning_rate, rho, math.sqrt)
    narrow = [torch.tensor(x, dtype=torch.float32) for x in (grad_norm, learning_rate, rho)]
    assert sam_edge(*narrow).item() == published(*narrow, torch.sqrt).item()
    assert gd_edge(learning_rate) == 2 / learning_rate == momentum_edge(learning_rate, 0.0)


@given(positive, momenta, momenta, shares)
def test_the_edges_of_momentum_are_the_formulas_in_60_digits(learning_rate, momentum, dampening, share):
    with mpmath.workdps(60):
        eta, beta, damp = numbers(learning_rate, momentum, dampening)
        heavy = (2 + 2 * beta) / (1 - damp if beta else 1)
        nesterov = (2 + 2 * beta) / (1 + 2 * beta)
        for c, settings in ((heavy, {"dampening": dampening}), (nesterov, {"nesterov": True})):
            assert agree(stability_limit(momentum, **settings), c)
            decay = float(share * c / eta)
            edge = momentum_edge(learning_rate, momentum, weight_decay=decay, **settings)
            assert agree(edge, c / eta - mpmath.mpf(decay))
            decay = float(share * 2 / eta)
            edge = momentum_edge(learning_rate, momentum, weight_decay=decay, decay="decoupled", **settings)
            assert agree(edge, c * (1 / eta - mpmath.mpf(decay) / 2))
        adam = (2 + 2 * beta) / (1 - beta)
        assert agree(adam_edge(learning_rate, momentum), adam / eta)
        assert agree(adam_edge(learning_rate, momentum, weight_decay=decay), adam * (1 / eta - mpmath.mpf(decay) / 2))
    assert adam_edge(0.5) == pytest.approx(38 / 0.5, rel=1e-14)


@given(positive, positive, positive, momenta, shares, st.booleans())
def test_sam_edges_solve_their_equation_in_60_digits(grad_norm, learning_rate, rho, momentum, share, normalize):
    limit = stability_limit(momentum)
    with mpmath.workdps(60):
        g, eta, radius, c = numbers(grad_norm if normalize else 1, learning_rate, rho, limit)
        for decay in ("step", "perturbation", "decoupled"):
            most = 2 / eta if decay == "decoupled" else c / eta
            delta = mpmath.mpf(float(share * most))
            # slope · λ + curve · λ² = rest
            rest = c * (1 / eta - delta / 2) if decay == "decoupled" else c / eta - delta
            slope = 1 + (radius * delta / g if decay == "perturbation" else 0)
            curve = radius / g
            exact = (mpmath.sqrt(slope**2 + 4 * curve * rest) - slope) / (2 * curve)
            settings = {"limit": limit, "weight_decay": float(delta), "decay": decay}
            if normalize:
                edge = sam_edge(grad_norm, learning_rate, rho, **settings)
            else:
                edge = usam_edge(learning_rate, rho, **settings)
            assert agree(edge, exact), decay


@given(positive, positive, positive, momenta)
def test_the_negative_range_is_that_of_its_formulas_in_60_digits(grad_norm, learning_rate, rho, momentum):
    limit = stability_limit(momentum)
    low, high = sam_negative_range(grad_norm, learning_rate, rho, limit=limit)
    with mpmath.workdps(60):
        g, eta, radius, c = numbers(grad_norm, learning_rate, rho, limit)
        assert agree(low, g / radius)
        assert agree(high, g / (2 * radius) * (mpmath.sqrt(1 + 4 * radius * c / (eta * g)) + 1))


@given(positive, positive, positive)
def test_the_stale_edge_is_the_first_curvature_with_a_root_on_the_circle(grad_norm, learning_rate, rho):
    edge = stale_edge(grad_norm, learning_rate, rho)
    with mpmath.workdps(60):
        g, eta, radius = numbers(grad_norm, learning_rate, rho)
        turning = mpmath.sqrt(g / (eta * radius))  # product of the roots 1
        candidates = [turning] if eta * turning <= 3 else []  # else they are real there
        if eta * g >= 8 * radius:  # a root −1
            candidates.append(g / (2 * radius) * (1 - mpmath.sqrt(1 - 8 * radius / (eta * g))))
        assert agree(edge, min(candidates))


@given(st.floats(-3, 3), st.floats(-2, 2), st.floats(0.5, 1.5))
def test_the_stale_step_is_stable_below_its_edge_and_unstable_above(log_rate, log_rho, closeness):
    learning_rate, rho = 10**log_rate, 10**log_rho
    grad_norm = 9 * rho / learning_rate * closeness  # on both sides of where turning gives way to the flip
    edge = stale_edge(grad_norm, learning_rate, rho)

    def radius(curvature):
        s = learning_rate * curvature
        return np.abs(np.roots([1, s - 1, s * rho * curvature / grad_norm])).max()

    assert radius(0.5 * edge) < 1
    assert radius(0.999 * edge) < 1 < radius(1.001 * edge)


def test_the_stale_edge_lies_close_to_that_of_sam():
    shares = [stale_edge(g, 0.3, 0.1) / sam_edge(g, 0.3, 0.1) for g in (0.02, 0.1, 0.5)]
    assert shares == pytest.approx([0.77, 0.86, 1.08], abs=0.005)


@pytest.mark.parametrize(
    ("rate", "rho", "slope"), [(0.3, 0.1, 0.02), (0.3, 0.1, 0.5), (0.3, 0.1, 4.0), (0.05, 2.0, 1.0)]
)
def test_a_stale_perturbation_is_stable_up_to_its_edge(rate, rho, slope):
    params = holder(SIZE)
    quadratic = Quadratic(around(stale_edge(slope, rate, rho)), slope)
    fill(params, quadratic.start)
    before = [quadratic.gradient(quadratic.start)]

    def gradient(w):
        before.append(quadratic.gradient(w))
        return quadratic.gradient(w + rho * before[-2] / before[-2].norm())

    step = stepping(SGD(params, lr=rate), params, gradient)
    # Turning grows by half of what the edge is exceeded by, slower than the flip: look longer.
    assert quadratic.grows(step, lambda: flat(params), steps=600).tolist() == expected().tolist()


@pytest.mark.parametrize("decay", ["perturbation", "decoupled"])
@pytest.mark.parametrize("settings", [{}, {"momentum": 0.9}, {"momentum": 0.5, "nesterov": True}])
@pytest.mark.parametrize(("rate", "rho", "slope"), [(0.2, 0.1, 0.3), (0.03, 0.5, 0.2)])
def test_decay_in_other_places_moves_the_edge_as_told(decay, settings, rate, rho, slope):
    delta = 2.0
    limit = stability_limit(**settings)
    params = holder(SIZE)
    quadratic = Quadratic(around(sam_edge(slope, rate, rho, limit=limit, weight_decay=delta, decay=decay)))
    fill(params, quadratic.start)
    inside = decay == "perturbation"
    hessian = quadratic.hessian

    def gradient(w):  # with the norm held at ``slope``, for g + δw too
        return hessian @ (w + rho / slope * (hessian @ w + inside * delta * w))

    step = stepping(SGD(params, lr=rate, weight_decay=inside * delta, **settings), params, gradient)

    def decayed():
        before = flat(params)
        step()
        if not inside:
            fill(params, flat(params) - rate * delta * before)

    assert quadratic.grows(decayed, lambda: flat(params)).tolist() == expected().tolist()


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.9}, {"momentum": 0.5, "nesterov": True}])
@pytest.mark.parametrize(("rate", "rho", "slope"), [(0.2, 0.1, 0.3), (0.03, 0.5, 0.2)])
def test_negative_curvature_is_stable_only_within_its_range(settings, rate, rho, slope):
    low, high = sam_negative_range(slope + EPSILON, rate, rho, limit=stability_limit(**settings))
    magnitudes = [0, 0.99 * low, 1.01 * low, (low + high) / 2, 0.999 * high, 1.001 * high]
    params = holder(SIZE)
    quadratic = Quadratic(-torch.tensor(magnitudes, dtype=torch.float64), slope)
    fill(params, quadratic.start)
    step = stepping(SAM(params, rho=rho, lr=rate, **settings), params, quadratic.gradient)
    assert quadratic.grows(step, lambda: flat(params)).tolist() == [True, False, False, False, True]


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


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stability_limit(1.0), r"momentum must be non-negative and less than 1, got 1\.0"),
        (lambda: stability_limit(-0.1), r"momentum must be non-negative and less than 1, got -0\.1"),
        (lambda: stability_limit(math.nan), "momentum must be non-negative and less than 1, got nan"),
        (lambda: stability_limit(0.9, dampening=1.0), "dampening must be non-negative and less than 1"),
        (
            lambda: stability_limit(0.9, dampening=0.1, nesterov=True),
            r"dampening must be 0 with nesterov=True.*got 0\.1",
        ),
        (lambda: momentum_edge(0.0, 0.9), "learning_rate must be positive and finite"),
        (
            lambda: momentum_edge(0.1, 0.9, weight_decay=-0.1),
            r"weight_decay must be non-negative and finite, got -0\.1",
        ),
        (lambda: momentum_edge(0.1, 0.0, weight_decay=20.0), "weight_decay must be below limit/learning_rate.*got 20"),
        (lambda: adam_edge(0.1, 1.0), r"beta1 must be non-negative and less than 1, got 1\.0"),
        (lambda: adam_edge(0.1, weight_decay=20.0), "weight_decay must be below 2/learning_rate"),
        (lambda: sam_edge(1.0, 0.1, 0.1, limit=0.0), r"limit must be positive and finite, got 0\.0"),
        (
            lambda: sam_edge(1.0, 0.1, 0.1, decay="l2"),
            "decay must be one of 'step', 'perturbation', 'decoupled', got 'l2'",
        ),
        (lambda: usam_edge(0.1, -1.0), r"rho must be non-negative and finite, got -1\.0"),
        (lambda: sam_negative_range(1.0, 0.1, 0.1, limit=-1.0), "limit must be positive"),
        (lambda: sam_negative_range(-1.0, 0.1, 0.1), "grad_norm must be non-negative"),
        (lambda: stale_edge(1.0, 0.1, -0.1), "rho must be non-negative"),
        (lambda: two_cycle_radius(31.0, 0.1, 0.1, limit=3.0), "limit/learning_rate for a 2-cycle"),
    ],
)
def test_bad_settings_are_named_with_what_is_allowed(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_directions_without_curvature_are_left_out_of_the_noise_kernel():
    generator = np.random.default_rng(0)
    half = generator.normal(size=(6, 3))
    values = np.linalg.eigvalsh(half @ half.T)
    expected = frobenius_noise_kernel(values[-3:], 1e-3, 0.3, 2)
    assert expected < math.inf
    assert frobenius_noise_kernel(values, 1e-3, 0.3, 2) == pytest.approx(expected, rel=1e-12)
    assert frobenius_noise_kernel([], 1e-3, 0.3, 2) == 0
    for values, samples in (([1.0, math.nan], 2), ([1.0], 2.5), ([1.0], math.nan)):
        with pytest.raises(ValueError, match="must be"):
            frobenius_noise_kernel(values, 0.1, 0.3, samples)


def test_names_are_found_where_their_subject_is():
    from samlib.edges import held_edge, previous_gradient_edge
    from samlib.noise import GaussNewtonOperator, exact_kernel_norm, ntk_blocks, ntk_matrix, sgd_sharpness
    from samlib.universal import universal_gradient, universal_step

    for found in (held_edge, previous_gradient_edge, GaussNewtonOperator, exact_kernel_norm, ntk_blocks, ntk_matrix):
        assert getattr(samlib, found.__name__) is found
    for found in (sgd_sharpness, universal_gradient, universal_step):
        assert getattr(samlib, found.__name__) is found
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        samlib.edges.nothing  # noqa: B018
