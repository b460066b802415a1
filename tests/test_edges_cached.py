import itertools
import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from samlib import sam_edge, sam_step, two_cycle_radius
from samlib.edges_cached import (
    held_cycle_radius,
    held_edge,
    previous_gradient_edge,
    rotation_period,
    why_no_edge,
)

positive = st.floats(min_value=1e-8, max_value=1e8)
periods = st.integers(1, 60) | st.sampled_from([100, 101, 1000, 4321])


def cached_sam(gradient, w, learning_rate, rho, every, beta, epsilon=1e-5):
    """SAM with a remembered direction, as a pure generator of the points before each step."""
    for step in itertools.count():
        yield w
        if step % every == 0:
            d = gradient(w)
        u = gradient(w + rho * d / (np.linalg.norm(d) + epsilon))
        if beta < 1 and u.any():
            d = beta * d / np.linalg.norm(d) + (1 - beta) * u / np.linalg.norm(u)
        w = w - learning_rate * u


def path(*arguments, steps, **options):
    return np.array(list(itertools.islice(cached_sam(*arguments, **options), steps + 1)))


def quadratic_with_background(curvature, background, seed):
    """A random quadratic of that largest curvature, flat along a slope: tiny moves leave the gradient's norm alone.

    Returns the gradient, a tiny point and the principal eigenvector.
    """
    random = np.random.default_rng(seed)
    basis = np.linalg.qr(random.normal(size=(6, 6)))[0]
    hessian = basis * (curvature * np.array([1, 0, *random.uniform(0, 0.9, 4)])) @ basis.T
    slope = background * basis[:, 1]
    return lambda w: hessian @ w + slope, 1e-9 * random.normal(size=6), basis[:, 0]


def grows(curvature, background, learning_rate, rho, every, beta, seed, steps):
    """Whether the principal coordinate grows, at true gradients: within a cycle it may be larger for a while."""
    gradient, start, v = quadratic_with_background(curvature, background, seed)
    points = cached_sam(gradient, start, learning_rate, rho, every, beta)
    along = []
    for w in itertools.islice(points, 0, steps + 1, every if every <= steps else 1):
        along.append(abs(v @ w))
        if along[-1] > 1e-5:  # from 1e-9, and further out the norms change
            return True
    quarter = len(along) // 4
    return max(along[-quarter:]) > max(along[:quarter])


def bisected_edge(low, high, *arguments):
    assert not grows(low, *arguments)
    assert grows(high, *arguments)
    while high / low > 1 + 1e-4:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if grows(middle, *arguments) else (middle, high)
    return low


def excess(x, s, k):
    """(1 − mᵏ)(1 + sx) − 2 with x = ηλ and s = ρ/(η‖g‖)."""
    return (1 - (1 - x) ** k) * (1 + s * x) - 2


@given(positive, positive, positive, periods)
def test_the_held_edge_is_the_smallest_root_within_1e12(grad_norm, learning_rate, rho, every):
    edge = held_edge(grad_norm, learning_rate, rho, every)
    with mpmath.workdps(100):
        eta, s = mpmath.mpf(learning_rate), mpmath.mpf(rho) / (mpmath.mpf(learning_rate) * mpmath.mpf(grad_norm))
        x = eta * mpmath.mpf(edge)
        assert all(excess(x * i / 40, s, every) < 0 for i in range(40))
        if abs(x - 2) < 1e-12 and every % 2 == 0:
            # No root: nowhere is the excess positive, unless by rounding at a double root.
            assert all(excess(mpmath.mpf(i) / 500, s, every) < 1e-10 for i in range(1001))
        else:
            assert excess(x * (1 - mpmath.mpf("1e-12")), s, every) < 0 < excess(x * (1 + mpmath.mpf("1e-12")), s, every)


@given(st.floats(1e-3, 1e3), st.integers(2, 7))
def test_the_held_edge_is_the_smallest_root_of_the_polynomial(s, every):
    with mpmath.workdps(40):
        binomial = [-mpmath.binomial(every, i) * (-1) ** i for i in range(every, 0, -1)]  # of 1 − (1 − x)ᵏ, but for x⁰
        product = [a * s + b for a, b in zip([*binomial, 0], [0, *binomial], strict=True)]
        roots = mpmath.polyroots([*product, -2], maxsteps=500, extraprec=300)
        real = [r.real for r in roots if abs(mpmath.im(r)) < 1e-15 and 0 < r.real < 2]
        closest = min([abs(a - b) for a, b in itertools.combinations(roots, 2)])
        if closest > 1e-3:
            assert abs(held_edge(1.0, 1.0, s, every) - min([*real, mpmath.mpf(2)])) < 1e-12


@pytest.mark.parametrize(("every", "threshold"), [(2, 0.903), (4, 0.749), (10, 0.621), (50, 0.532)])
def test_even_periods_have_no_edge_of_their_own_for_a_small_radius(every, threshold):
    assert held_edge(1.0, 1.0, threshold - 0.0005, every) == 2
    assert 1 < held_edge(1.0, 1.0, threshold + 0.0005, every) < 1.9


@given(st.floats(1e-3, 1e3), st.integers(2, 100))
def test_the_held_edge_is_at_most_one_exactly_if_the_radius_exceeds_a_step(s, every):
    assert (held_edge(1.0, 1.0, s, every) <= 1) == (s >= 1)


@given(positive, positive, positive, periods)
def test_limits_of_the_held_edge(grad_norm, learning_rate, rho, every):
    gd, never = 2 / learning_rate, held_edge(grad_norm, learning_rate, rho, math.inf)
    assert held_edge(grad_norm, learning_rate, rho, 1) == sam_edge(grad_norm, learning_rate, rho)
    assert held_edge(grad_norm, learning_rate, 0.0, every) == pytest.approx(gd, rel=1e-15)
    assert held_edge(0.0, learning_rate, rho, every) == 0
    assert held_edge(0.0, learning_rate, rho, math.inf) == 0
    assert math.isnan(held_edge(math.nan, learning_rate, rho, every))
    assert never == pytest.approx(min(grad_norm / rho, gd), rel=1e-12)
    assert held_edge(grad_norm, learning_rate, rho, every) <= gd * (1 + 1e-15)


def test_the_held_edge_falls_to_its_limit_as_the_period_grows():
    edges = [held_edge(1.0, 0.1, 0.3, k) for k in (1, 2, 3, 10, 30, 100, 1000)]
    assert all(before > after for before, after in itertools.pairwise(edges[:5]))
    assert edges[-1] == pytest.approx(1 / 0.3, rel=1e-12)


@given(positive, positive, st.floats(min_value=0, max_value=1e8))
def test_the_edge_of_the_previous_gradient_is_the_closed_form(norm, learning_rate, rho):
    edge = previous_gradient_edge(norm, learning_rate, rho)
    with mpmath.workdps(50):
        u, eta, radius = map(mpmath.mpf, (norm, learning_rate, rho))
        exact = u / radius if radius and eta * u <= 4 * radius else 2 * u / (eta * u - 2 * radius)
        assert abs(edge / exact - 1) < 1e-12


@pytest.mark.parametrize("s", [0.05, 0.2, 0.3, 1, 20])
def test_the_edge_of_the_previous_gradient_is_where_the_recurrence_leaves_the_unit_circle(s):
    def largest_root(x):
        return np.abs(np.roots([1, -(1 - x + s * x), s * x])).max()

    x = previous_gradient_edge(1.0, 1.0, s)
    assert largest_root(x) == pytest.approx(1, abs=1e-7)
    assert largest_root(0.999 * x) < 1 < largest_root(1.001 * x)


def test_limits_of_the_edge_of_the_previous_gradient():
    assert previous_gradient_edge(0.0, 0.5, 0.1) == 0
    assert previous_gradient_edge(1.0, 0.5, 0.0) == previous_gradient_edge(0.0, 0.5, 0.0) == 4
    assert math.isnan(previous_gradient_edge(math.nan, 0.5, 0.1))
    assert previous_gradient_edge(4.0, 1.0, 1.0) == 4  # both are the edge there


def test_the_twin_is_sam_when_it_holds_nothing():
    gradient, start, _ = quadratic_with_background(3.0, 0.7, seed=0)
    points = path(gradient, 1e9 * start, 0.2, 0.3, 1, 0.4, steps=5)
    w = torch.tensor(points[0])
    for expected in points[1:]:
        w = sam_step(lambda p: torch.tensor(gradient(p.numpy())), w, 0.2, 0.3)
        np.testing.assert_allclose(w.numpy(), expected, rtol=1e-12)


# Step sizes and radii around the change of regime at ρ = η‖g‖, below and above the even periods' thresholds.
@pytest.mark.parametrize("s", [0.4, 0.95, 1.5, 20])
@pytest.mark.parametrize("every", [1, 2, 3, 7, 10])
def test_sam_with_a_held_direction_leaves_at_its_edge(every, s):
    background, learning_rate = 1.7, 0.13
    rho = s * learning_rate * background
    edge = held_edge(background, learning_rate, rho, every)
    setting = (background, learning_rate, rho, every, 1.0, every, 400 * every)
    assert bisected_edge(0.9 * edge, 1.05 * edge, *setting) == pytest.approx(edge, rel=1e-3)


@pytest.mark.parametrize("s", [0.1, 0.2, 0.4, 1, 5, 30])
def test_sam_along_the_previous_gradient_leaves_at_its_edge(s):
    background, learning_rate = 0.6, 0.3
    rho = s * learning_rate * background
    edge = previous_gradient_edge(background, learning_rate, rho)
    setting = (background, learning_rate, rho, 10**9, 0.0, 3, 16_000)
    assert bisected_edge(0.9 * edge, 1.1 * edge, *setting) == pytest.approx(edge, rel=1e-3)


@pytest.mark.parametrize("every", [50, 83])
@pytest.mark.parametrize("s", [0.15, 0.3, 2, 10])
def test_a_seldom_true_gradient_moves_the_edge_of_the_previous_gradient_by_less_than_a_tenth(s, every):
    edge = previous_gradient_edge(1.0, 1.0, s)
    assert why_no_edge(every, 0.0) is None
    first = next(f for f in np.arange(0.8, 1.2, 0.02) if grows(f * edge, 1.0, 1.0, s, every, 0.0, 1, 40 * every))
    assert 0.9 < first < 1.1


@pytest.mark.parametrize("every", [1, 2, 3, 10])
@pytest.mark.parametrize("x", [0.2, 0.9, 1.3])
def test_held_directions_cycle_at_the_stated_radius(every, x):
    curvature, learning_rate, rho = 5.0, x / 5.0, 0.2
    radius = held_cycle_radius(curvature, learning_rate, rho, every)
    v = np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))[0]
    hessian = v * np.array([curvature, 2.0, 1.0, 0.3]) @ v.T

    def run(distance, steps):
        start = distance * v[:, 0]
        return path(lambda w: hessian @ w, start, learning_rate, rho, every, 1.0, steps=steps, epsilon=0) @ v[:, 0]

    along = run(radius, 4 * every)
    np.testing.assert_allclose(along[::every], radius * np.array([1, -1, 1, -1, 1]), rtol=1e-9)
    np.testing.assert_allclose(along[: 2 * every], along[2 * every : -1], rtol=1e-9)
    assert (np.abs(along).max() > radius * (1 + 1e-9)) == (x > 1 and every > 1)
    assert abs(run(0.3 * radius, 400 * every)[-1]) == pytest.approx(radius, rel=1e-6)
    # λ is a root for the norm that the cycle makes; the smallest one, unless an even period has passed its peak.
    assert excess(x, rho / (learning_rate * curvature * radius), every) == pytest.approx(0, abs=1e-12)
    if x < 1 or every % 2:
        assert held_edge(curvature * radius, learning_rate, rho, every) == pytest.approx(curvature, rel=1e-12)


@given(st.floats(1e-6, 1.999), periods, st.floats(1e-3, 1e3))
def test_the_radius_of_the_cycle_in_50_digits(x, every, rho):
    with mpmath.workdps(50):
        power = (1 - mpmath.mpf(x)) ** every
        exact = rho * (1 - power) / (1 + power)
    assert abs(held_cycle_radius(x, 1.0, rho, every) / exact - 1) < 1e-12
    assert held_cycle_radius(x, 1.0, rho, 1) == pytest.approx(two_cycle_radius(x, 1.0, rho), rel=1e-12)
    assert held_cycle_radius(x, 1.0, rho, math.inf) == rho


@pytest.mark.parametrize("s", [0.3, 1, 5, 30])
def test_the_iterate_rotates_with_the_stated_period(s):
    background, learning_rate = 0.6, 0.3
    rho = s * learning_rate * background
    curvature = previous_gradient_edge(background, learning_rate, rho)
    gradient, start, v = quadratic_with_background(curvature, background, seed=5)
    along = path(gradient, start, learning_rate, rho, 10**9, 0.0, steps=4000) @ v
    turns = np.count_nonzero(np.diff(np.sign(along))) / 2
    assert 4000 / turns == pytest.approx(rotation_period(curvature, learning_rate), rel=2e-2)


@given(st.floats(1e-9, 4.0))
def test_the_period_in_50_digits(x):
    with mpmath.workdps(50):
        exact = 2 * mpmath.pi / mpmath.acos(1 - mpmath.mpf(x) / 2)
    assert abs(rotation_period(x, 1.0) / exact - 1) < 1e-12


@pytest.mark.parametrize("make", [np.asarray, torch.tensor])
def test_arrays_and_tensors_broadcast(make):
    norms, rhos = make([[0.0], [0.4], [3.0]]), make([0.0, 0.01, 0.5, 4.0])
    calls = [lambda n, r, k=k: held_edge(n, 0.3, r, k) for k in (1, 2, 5, 12, math.inf)]
    calls += [lambda n, r: previous_gradient_edge(n, 0.3, r), lambda n, r: held_cycle_radius(n + 1, 0.3, r, 4)]
    for call in calls:
        edges = call(norms, rhos)
        assert tuple(edges.shape) == (3, 4)
        assert type(edges) is type(norms)
        for (i, n), (j, r) in itertools.product(enumerate(norms[:, 0]), enumerate(rhos)):
            assert float(edges[i, j]) == pytest.approx(call(float(n), float(r)), rel=1e-5)


def test_why_no_edge():
    assert [why_no_edge(1, 0.3), why_no_edge(7, 1.0), why_no_edge(math.inf, 0.0)] == [None] * 3
    assert "norm of the stored average" in why_no_edge(5, 0.99)
    assert "every 50 steps" in why_no_edge(49, 0.0)


@pytest.mark.parametrize("every", [0, -1, 1.5, math.nan, -math.inf])
def test_bad_periods_are_named(every):
    for call in (lambda: held_edge(1.0, 0.1, 0.1, every), lambda: why_no_edge(every, 0.5)):
        with pytest.raises(ValueError, match=r"every must be a whole number of at least 1, or infinity, got"):
            call()


def test_other_bad_arguments_are_named():
    for beta in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"beta must lie within \[0, 1\], got"):
            why_no_edge(2, beta)
    with pytest.raises(ValueError, match=r"learning_rate must be positive and finite, got 0\.0"):
        held_edge(1.0, 0.0, 0.1, 3)
    with pytest.raises(ValueError, match=r"update_norm must be non-negative and finite, got -1\.0"):
        previous_gradient_edge(-1.0, 0.1, 0.1)
    with pytest.raises(ValueError, match="curvature must lie below 2/learning_rate for a cycle to exist, got 30"):
        held_cycle_radius(30.0, 0.1, 0.1, 3)
    with pytest.raises(ValueError, match="curvature must be at most 4/learning_rate, beyond which steps flip, got 41"):
        rotation_period(41.0, 0.1)
