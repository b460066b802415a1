"""The universal class as pure functions, against closed forms, Gaussian quadrature and finite differences."""

import itertools
import math

import numpy as np
import pytest
import torch

from samlib import (
    determinant,
    frobenius,
    frobenius_noise_kernel,
    integral,
    sam_edge,
    trace,
    universal_gradient,
    universal_step,
    universal_value,
)
from samlib.cumulants import sharpness_weights

from .conftest import problem

SHARPNESS = {
    "trace": trace,
    "frobenius": frobenius,
    "determinant": determinant(0.8),
    "integral": integral(torch.square, lambda d: d + d.square() / 8),
}
VARIANTS = list(itertools.product(SHARPNESS, (True, False)))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def bent(w):
    """A loss of two parameters, without symmetry, for any number of copies: (…, 2) → (…)."""
    x, y = w.unbind(-1)
    return (x * y - 1).square() / 2 + 0.3 * torch.sin(x) + 0.1 * y**3


def with_gradient(value):
    def value_and_gradient(w):
        w = w.detach().requires_grad_()
        loss = value(w)
        return loss.detach(), torch.autograd.grad(loss.sum(), w)[0]

    return value_and_gradient


def quadratic(hessian):
    """½ w·(H w), with its gradient, for any number of copies."""
    return lambda w: ((w @ hessian * w).sum(-1) / 2, w @ hessian)


def symmetric(size, seed=0, shift=0.0):
    matrix = normal(size, size, seed=seed)
    return (matrix + matrix.mT) / 2 + shift * torch.eye(size)


def differences(f, w, step=1e-4):
    """∇f by central differences of fourth order."""
    rows = step * torch.eye(len(w), dtype=w.dtype)
    return torch.stack([(8 * (f(w + e) - f(w - e)) - f(w + 2 * e) + f(w - 2 * e)) / (12 * step) for e in rows])


def expected_objective(w, rho, strength, sharpness, paired):
    """E F over two normal directions: Gauss–Hermite quadrature in their four dimensions."""
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(14))
    grid = torch.cartesian_prod(*[nodes] * 4).reshape(-1, 2, 2)
    share = torch.cartesian_prod(*[weights / weights.sum()] * 4).prod(1)
    values = universal_value(bent, w.expand(len(grid), 2), grid.movedim(1, 0), rho, strength, sharpness, paired)
    return (values * share).sum()


@pytest.mark.parametrize(("name", "paired"), VARIANTS)
def test_the_mean_update_is_the_gradient_of_the_mean_objective(name, paired):
    w, copies = torch.tensor([0.9, 1.3], dtype=torch.float64), 100_000
    settings = (0.3, 0.7, SHARPNESS[name], paired)
    updates = universal_gradient(with_gradient(bent), w.expand(copies, 2), normal(2, copies, 2), *settings)
    expected = differences(lambda v: expected_objective(v, *settings), w)
    error = updates.std(0) / copies**0.5
    assert bool(((updates.mean(0) - expected).abs() <= 3 * error).all())
    gradient = with_gradient(bent)(w)[1]
    assert bool(((expected - gradient).abs() > 10 * error).any())  # the sharpness term is seen at all


@pytest.mark.parametrize(("name", "paired"), VARIANTS)
@pytest.mark.parametrize("kind", ["mlp", "transformer"])
def test_for_given_directions_it_is_the_gradient_of_the_objective(name, paired, kind):
    objective, params = problem(kind)
    settings = (normal(3, len(params)), 0.05, 0.6, SHARPNESS[name], paired)
    gradient = universal_gradient(objective.value_and_gradient, params, *settings)
    probe = normal(len(params), seed=1) / len(params) ** 0.5
    slope = differences(
        lambda t: universal_value(objective.value, params + t * probe, *settings), torch.zeros(1).double()
    )
    assert float(gradient @ probe) == pytest.approx(float(slope), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", SHARPNESS)
def test_weights_are_the_derivatives_in_closed_form(name):
    d = normal(5)
    n, mean = 5, d.mean()
    m = (d + d.square() / 8).mean()
    expected = {
        "trace": torch.full_like(d, 1 / n),
        "frobenius": (d - mean) / (n - 1),
        "determinant": torch.softmax(-0.8 * d, 0),
        "integral": 2 * m * (1 + d / 4) / n,
    }[name]
    torch.testing.assert_close(sharpness_weights(SHARPNESS[name], d.float()), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sharpness_weights(SHARPNESS[name], d), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("paired", [True, False])
def test_at_a_minimum_the_measures_are_cumulants(paired):
    hessian, beta, copies = symmetric(4, shift=3.0), 0.8, 400_000
    x, zero = normal(copies, 4), torch.zeros(4, dtype=torch.float64)
    values = torch.linalg.eigvalsh(hessian)
    loss = lambda w: quadratic(hessian)(w)[0]  # noqa: E731
    changes = torch.stack([loss(sign * 0.1 * x) for sign in ((1, -1) if paired else (1,))]).mean(0) / 0.01

    def measure(sharpness, n):
        per_set = sharpness(changes.reshape(n, -1))
        return per_set.mean(), per_set.std() / per_set.numel() ** 0.5

    for sharpness, n, expected in (
        (trace, 1, values.sum() / 2),
        (frobenius, 4, values.square().sum() / 4),
        (determinant(beta), 4000, torch.log1p(beta * values).sum() / (2 * beta)),
    ):
        mean, error = measure(sharpness, n)
        assert abs(mean - expected) <= 3 * error + 2e-3 * (n == 4000)  # of the order 1/n: the log of a mean
    assert float(universal_value(loss, zero, x[:1], 0.1, 2.0, trace)) == pytest.approx(0.02 * float(changes[0]))


def test_determinant_is_the_trace_at_first_and_falls_with_the_variance():
    d = normal(7)
    slope = (determinant(1e-4)(d) - determinant(2e-4)(d)) / 1e-4
    assert float(determinant(1e-6)(d)) == pytest.approx(float(trace(d)), abs=1e-5)
    assert float(slope) == pytest.approx(6 / 7 * float(frobenius(d)), rel=1e-3)
    assert float(determinant(1.0)(torch.tensor([1e4, 2e4]))) == pytest.approx(1e4 + math.log(2))  # no underflow


def test_off_the_minimum_plain_frobenius_descends_the_gradient_norm():
    """E S = (½|g|² + ρ²(¼‖H‖²_F + ½ g·∇tr H))/ρ² + O(ρ²); paired, it is ¼‖H‖²_F + O(ρ²)."""
    w = torch.tensor([0.9, 1.3], dtype=torch.float64)
    gradient = torch.func.grad(bent)(w)
    hessian = torch.func.hessian(bent)(w)
    slope = gradient @ torch.func.grad(lambda v: torch.func.hessian(bent)(v).trace())(w)
    square = hessian.square().sum() / 4
    for rho in (0.01, 0.02):
        plain, paired = ((expected_objective(w, rho, 1.0, frobenius, p) - bent(w)) / rho**2 for p in (False, True))
        assert float(plain - gradient.square().sum() / 2 / rho**2) == pytest.approx(
            float(square + slope / 2), abs=60 * rho**2
        )
        assert float(paired) == pytest.approx(float(square), abs=60 * rho**2)
    assert abs(slope / 2) > 0.1


@pytest.mark.parametrize("name", SHARPNESS)
@pytest.mark.parametrize("seed", range(3))
def test_paired_variants_are_gradient_descent_on_any_quadratic(name, seed):
    hessian, w = symmetric(12, seed), normal(12, seed=seed + 10)
    straight = w
    for step in range(5):
        x = normal(4, 12, seed=100 * seed + step)
        w = universal_step(quadratic(hessian), w, 0.05, x, 0.3, 1.0, SHARPNESS[name])
        straight = straight - 0.05 * straight @ hessian
    torch.testing.assert_close(w, straight, rtol=0, atol=1e-12)


def mean_factors(sharpness, eigenvalues, w, strength, rho, n, copies):
    """One plain step on a quadratic from w: mean and standard error of w'/w over many copies."""
    x = normal(n, copies, len(w))
    after = universal_step(
        quadratic(torch.diag(eigenvalues)), w.expand(copies, -1), 0.1, x, rho, strength, sharpness, False
    )
    factors = after / w
    return factors.mean(0), factors.std(0) / copies**0.5


@pytest.mark.parametrize("n", [2, 5])
def test_plain_frobenius_has_the_edge_of_unnormalised_sam_in_the_mean(n):
    edge = sam_edge(1.0, 0.1, 0.3)
    eigenvalues = torch.tensor([edge, 3.0, 0.5], dtype=torch.float64)
    factors, error = mean_factors(frobenius, eigenvalues, normal(3, seed=3), 0.3, 1e-3, n, 50_000)
    expected = 1 - 0.1 * eigenvalues * (1 + 0.3 * eigenvalues)
    assert float(expected[0]) == pytest.approx(-1)
    assert bool(((factors - expected).abs() <= 3 * error).all())


def test_plain_determinant_rewards_the_gradient():
    """Many samples: 1 − ηλ(1 − sβλ/(1 + βλ)), an ascent where sβλ/(1 + βλ) > 1."""
    eigenvalues, w = torch.tensor([4.0, 1.0], dtype=torch.float64), torch.tensor([0.1, 0.2], dtype=torch.float64)
    factors, error = mean_factors(determinant(1.0), eigenvalues, w, 3.0, 0.5, 4000, 400)
    expected = 1 - 0.1 * eigenvalues * (1 - 3 * eigenvalues / (1 + eigenvalues))
    assert float(expected[0]) > 1
    assert bool(((factors - expected).abs() <= 3 * error + 1e-3).all())  # a weighted mean is biased by about 1/n


@pytest.mark.parametrize("n", [2, 5, 17])
def test_noise_kernel_of_plain_frobenius(n):
    """The second moments follow the stated recursion, and grow exactly where K > 1."""
    eta, strength, copies = 0.1, 0.2, 20_000
    values = torch.linspace(0.2, 4, 40, dtype=torch.float64)
    v = (eta * strength * values) ** 2 / (n - 1)
    a = (1 - eta * values * (1 + strength * values)) ** 2 + v * values**2
    w = normal(40, seed=n)
    x = normal(n, copies, 40)
    after = universal_step(
        quadratic(torch.diag(values)), w.expand(copies, 40), eta, x, 1e-4, strength, frobenius, False
    )
    squares = after.square()
    off = squares.mean(0) - (a * w**2 + v * (values * w).square().sum())
    assert float((off / (squares.std(0) / copies**0.5)).abs().max()) < 4

    def growth(strength):
        v = (eta * strength * values) ** 2 / (n - 1)
        a = (1 - eta * values * (1 + strength * values)) ** 2 + v * values**2
        return float(torch.linalg.eigvals(torch.diag(a) + torch.outer(v, values**2)).abs().max())

    low, high = 0.0, 50.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if frobenius_noise_kernel(values, eta, middle, n) < 1 else (low, middle)
    assert growth(low * (1 - 1e-6)) < 1 < growth(high * (1 + 1e-6))
    assert low < 20


def test_noise_kernel_leaves_flat_directions_out_and_is_infinite_beyond_the_mean_edge():
    assert frobenius_noise_kernel([0.0, 2.0], 0.1, 0.3, 2) == frobenius_noise_kernel([2.0], 0.1, 0.3, 2)
    assert frobenius_noise_kernel([2.0], 0.1, 0.0, 2) == 0
    assert frobenius_noise_kernel([1.001 * sam_edge(1.0, 0.1, 0.3)], 0.1, 0.3, 1000) == math.inf
    with pytest.raises(ValueError, match="samples"):
        frobenius_noise_kernel([2.0], 0.1, 0.3, 1)
    with pytest.raises(ValueError, match="strength"):
        frobenius_noise_kernel([2.0], 0.1, -0.3, 2)


@pytest.mark.parametrize("beta", [0.0, -1.0, math.inf, math.nan])
def test_beta_must_be_positive(beta):
    with pytest.raises(ValueError, match="beta must be positive and finite"):
        determinant(beta)
