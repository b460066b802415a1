import itertools

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from samlib import mean_square
from samlib.mean_square import exact_kernel_norm, sgd_sharpness
from samlib.noise import kernel_norm, noise_fraction
from samlib.tangent import MOST_ROWS

problems = st.tuples(
    st.integers(2, 6), st.integers(1, 3), st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 1000), st.integers(1, 6)
).filter(lambda p: p[4] <= p[0])  # examples, outputs, decay of the column scales, seed, batch size


def random_jacobian(examples, outputs, decay, seed, columns=None):
    columns = columns or 2 * examples * outputs
    scales = np.arange(1, columns + 1.0) ** -decay
    return np.random.default_rng(seed).normal(size=(examples * outputs, columns)) * scales


def kernel(jacobian):
    return torch.as_tensor(2 / len(jacobian) * jacobian @ jacobian.T)


def block_mask(examples, outputs):
    """1 where the row and the column of a matrix (NC, NC) belong to the same example."""
    return np.kron(np.eye(examples), np.ones((outputs, outputs)))


def covariance_map(theta, learning_rate, fraction, outputs):
    """Q, which maps the residual's covariance to that after a step, dense on vectorised matrices; and its noise."""
    theta, n = np.asarray(theta), len(theta)
    blocks = np.diag(block_mask(n // outputs, outputs).flatten())
    drift = np.eye(n) - learning_rate * theta
    both = learning_rate**2 * np.kron(theta, theta)
    return np.kron(drift, drift) - fraction * both, fraction * (n // outputs) * both @ blocks


def radius(matrix):
    return np.abs(np.linalg.eigvals(matrix)).max()


def dense_threshold(jacobian, fraction, outputs):
    """Mulayoff & Michaeli's λ_max(C†D), in the space of the parameters, from the Hessians of single examples."""
    examples, columns = len(jacobian) // outputs, jacobian.shape[1]
    single = [2 / outputs * part.T @ part for part in jacobian.reshape(examples, outputs, columns)]
    hessian, identity = sum(single) / examples, np.eye(columns)
    c = (np.kron(hessian, identity) + np.kron(identity, hessian)) / 2
    d = (1 - fraction) * np.kron(hessian, hessian) + fraction * sum(np.kron(h, h) for h in single) / examples
    return scipy.linalg.eigh(d, c, eigvals_only=True)[-1]


@settings(max_examples=25, deadline=None)
@given(problems)
def test_sharpness_is_the_dense_threshold(problem):
    """With as many parameters as outputs the Hessian is regular, and so is C."""
    examples, outputs, decay, seed, batch_size = problem
    jacobian = random_jacobian(examples, outputs, decay, seed, columns=examples * outputs)
    fraction = noise_fraction(examples, batch_size)
    found = sgd_sharpness(kernel(jacobian), fraction, outputs, tol=1e-8)
    assert found.value == pytest.approx(dense_threshold(jacobian, fraction, outputs), rel=1e-8)


@settings(max_examples=25, deadline=None)
@given(problems)
def test_at_the_sharpness_the_covariance_neither_grows_nor_shrinks(problem):
    examples, outputs, decay, seed, batch_size = problem
    theta = kernel(random_jacobian(examples, outputs, decay, seed))
    fraction = noise_fraction(examples, batch_size)
    edge = 2 / sgd_sharpness(theta, fraction, outputs, tol=1e-8).value
    assert radius(sum(covariance_map(theta, edge, fraction, outputs))) == pytest.approx(1, abs=1e-8)
    assert radius(sum(covariance_map(theta, 1.01 * edge, fraction, outputs))) > 1
    assert radius(sum(covariance_map(theta, 0.99 * edge, fraction, outputs))) < 1


@settings(max_examples=25, deadline=None)
@given(problems, st.floats(0.05, 0.95))
def test_exact_kernel_norm_is_the_radius_of_the_noise_seen_through_the_drift(problem, share):
    """K* is the spectral radius of (1 − A)⁻¹ B, where A moves the covariance without the noise and B adds it."""
    examples, outputs, decay, seed, batch_size = problem
    theta = kernel(random_jacobian(examples, outputs, decay, seed))
    fraction = noise_fraction(examples, batch_size)
    rate = share * 2 / float(torch.linalg.eigvalsh(theta)[-1])
    found = exact_kernel_norm(theta, rate, fraction, outputs, tol=1e-8)
    drift, noise = covariance_map(theta, rate, fraction, outputs)
    assert found.value == pytest.approx(radius(np.linalg.solve(np.eye(len(drift)) - drift, noise)), rel=1e-8, abs=1e-12)
    assert found.applies
    assert found.residual <= 1e-8 * found.value
    assert (found.weights >= -1e-9).all()
    assert float(found.weights.sum()) == pytest.approx(1)


@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.parametrize(("examples", "outputs", "batch_size"), [(4, 1, 2), (3, 2, 2), (4, 2, 3), (3, 1, 1), (3, 1, 3)])
def test_covariance_of_a_step_averaged_over_all_batches(examples, outputs, batch_size, replacement):
    """What every other formula rests on, by brute force: the mean over all mini-batches of (1 − η(N/B)ΘP_S) Σ (…)ᵀ."""
    theta = kernel(random_jacobian(examples, outputs, 0.5, 0)).numpy()
    n, rate = len(theta), 0.3
    half = np.random.default_rng(1).normal(size=(n, n))
    covariance = half @ half.T
    every = range(examples)
    batches = list(
        itertools.product(every, repeat=batch_size) if replacement else itertools.combinations(every, batch_size)
    )
    mean = 0
    for batch in batches:
        counts = np.repeat(np.bincount(batch, minlength=examples), outputs)
        step = np.eye(n) - rate * examples / batch_size * theta * counts
        mean = mean + step @ covariance @ step.T / len(batches)
    fraction = noise_fraction(examples, batch_size, replacement)
    found = sum(covariance_map(theta, rate, fraction, outputs)) @ covariance.flatten()
    np.testing.assert_allclose(found.reshape(n, n), mean, rtol=1e-10, atol=1e-10)


@settings(max_examples=100, deadline=None)
@given(problems, st.floats(1e-3, 1.2), st.booleans())
@example((6, 3, 0.0, 0, 6), 0.5, False)
def test_the_chain_of_kernel_norms(problem, share, singular):
    """K_tr ≤ K ≤ K*, infinite only beyond the edge of the drift alone."""
    examples, outputs, decay, seed, batch_size = problem
    columns = max(1, examples * outputs // 2) if singular else None
    theta = kernel(random_jacobian(examples, outputs, decay, seed, columns))
    fraction = noise_fraction(examples, batch_size)
    values = torch.linalg.eigvalsh(theta)
    rate = share * 2 / float(values[-1])
    distance = (1 - fraction) * rate * float(values[-1]) - 2
    assume(abs(distance) > 1e-6)  # at its pole K* is a quotient of rounding errors
    from_trace = fraction * rate * float(theta.trace()) / (2 * outputs)
    approximate = kernel_norm(values, rate, fraction, outputs)
    exact = exact_kernel_norm(theta, rate, fraction, outputs)
    assert from_trace <= approximate * (1 + 1e-9)
    assert approximate <= exact.value * (1 + 1e-9)
    assert exact.applies == (not singular and exact.value < np.inf)
    assert (exact.value == np.inf) == (distance > 0)


@settings(max_examples=60, deadline=None)
@given(problems)
def test_without_noise_it_is_the_sharpness(problem):
    examples, outputs, decay, seed, _ = problem
    theta = kernel(random_jacobian(examples, outputs, decay, seed))
    largest = float(torch.linalg.eigvalsh(theta)[-1])
    found = sgd_sharpness(theta, noise_fraction(examples, examples), outputs, tol=1e-7)
    assert found.value == pytest.approx(largest, rel=1e-10)
    assert found.applies
    assert exact_kernel_norm(theta, 1 / largest, 0.0, outputs).value == 0


@settings(max_examples=60, deadline=None)
@given(problems)
def test_it_does_not_grow_with_the_batch_and_is_never_below_the_sharpness(problem):
    examples, outputs, decay, seed, _ = problem
    theta = kernel(random_jacobian(examples, outputs, decay, seed))
    found = [
        sgd_sharpness(theta, noise_fraction(examples, batch_size), outputs, tol=1e-7).value
        for batch_size in range(1, examples + 1)
    ]
    assert all(after <= before * (1 + 1e-9) for before, after in itertools.pairwise(found))
    assert found[-1] >= float(torch.linalg.eigvalsh(theta)[-1]) * (1 - 1e-9)


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 12), st.integers(1, 3), st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 1000), st.data())
def test_both_find_the_same_edge(examples, outputs, decay, seed, data):
    """K* = 1 at η = 2/λ_gen. Near λ_max, where K* has its pole, errors grow with its slope."""
    fraction = noise_fraction(examples, data.draw(st.integers(1, examples - 1)))
    theta = kernel(random_jacobian(examples, outputs, decay, seed))
    edge = sgd_sharpness(theta, fraction, outputs, tol=1e-8).value
    assume(edge >= 1.01 * float(torch.linalg.eigvalsh(theta)[-1]))
    assert exact_kernel_norm(theta, 2 / edge, fraction, outputs, tol=1e-8).value == pytest.approx(1, abs=1e-6)


@settings(max_examples=50, deadline=None)
@given(problems)
def test_the_order_of_the_examples_does_not_matter(problem):
    examples, outputs, decay, seed, batch_size = problem
    jacobian = random_jacobian(examples, outputs, decay, seed)
    theta, order = kernel(jacobian), np.random.default_rng(seed + 1).permutation(examples)
    shuffled = kernel(jacobian.reshape(examples, outputs, -1)[order].reshape(jacobian.shape))
    fraction, rate = noise_fraction(examples, batch_size), 0.5 / float(theta.trace())
    a, b = (sgd_sharpness(t, fraction, outputs, tol=1e-8).value for t in (theta, shuffled))
    assert a == pytest.approx(b, rel=1e-9)
    first, second = (exact_kernel_norm(t, rate, fraction, outputs, tol=1e-10) for t in (theta, shuffled))
    assert first.value == pytest.approx(second.value, rel=1e-9)
    if fraction:
        torch.testing.assert_close(second.weights, first.weights[order], rtol=0, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(problems)
def test_fewer_parameters_than_outputs(problem):
    """Θ is singular, which is said; the value is that of the residuals in its range, in the parameters' space."""
    examples, outputs, decay, seed, batch_size = problem
    jacobian = random_jacobian(examples, outputs, decay, seed, columns=max(1, examples * outputs // 2))
    fraction = noise_fraction(examples, batch_size)
    found = sgd_sharpness(kernel(jacobian), fraction, outputs, tol=1e-8)
    assert not found.applies
    assert found.value == pytest.approx(dense_threshold(jacobian, fraction, outputs), rel=1e-8)
    if fraction:
        exact = exact_kernel_norm(kernel(jacobian), 2 / found.value, fraction, outputs, tol=1e-8)
        assert not exact.applies
        slope = 1 / (1 - (1 - fraction) * float(torch.linalg.eigvalsh(kernel(jacobian))[-1]) / found.value)
        assert exact.value == pytest.approx(1, abs=1e-8 * max(slope, 1) ** 2)


@pytest.mark.parametrize("batch_size", [1, 4, 16, 64, 128])
def test_examples_that_are_alike_obey_the_closure(batch_size):
    """White Jacobian, 400 examples: η* is .987–.992 of the rate at which K = 1."""
    theta = kernel(random_jacobian(400, 1, 0.0, 0))
    fraction, values = noise_fraction(400, batch_size), torch.linalg.eigvalsh(theta)
    low, high = 0.0, 2 / float(values[-1]) / max(1 - fraction, 1e-9)
    for _ in range(60):
        rate = (low + high) / 2
        low, high = (rate, high) if kernel_norm(values, rate, fraction) < 1 else (low, rate)
    ratio = 2 / sgd_sharpness(theta, fraction).value / low
    assert 0.987 - 0.005 <= ratio <= 0.992 + 0.005


def test_weights_name_the_examples_that_carry_the_noise():
    """Decoupled examples: the one with the largest gradient alone is the first to become unstable."""
    theta = torch.diag(torch.tensor([1.0, 4.0, 2.0]))
    found = exact_kernel_norm(theta, 0.1, 1.0, tol=1e-10)
    assert found.value == pytest.approx(0.1 * 3 * 4 / 2)  # W_aa = N η λ_a/2
    torch.testing.assert_close(found.weights, torch.tensor([0.0, 1.0, 0.0]).double(), rtol=0, atol=1e-8)


def test_beyond_the_deterministic_edge_the_norm_is_infinite():
    theta = torch.diag(torch.tensor([1.0, 3.0]))
    found = exact_kernel_norm(theta, 0.7, 0.0)
    assert found.value == np.inf
    assert not found.applies
    assert found.weights.tolist() == [0.5, 0.5]
    assert exact_kernel_norm(theta, 0.7, 0.5).value < np.inf  # the edge of the drift alone moves with p


def test_a_network_without_gradients_has_no_edge():
    assert sgd_sharpness(torch.zeros(4, 4), 0.5, 2) == (0.0, 0.0, False)
    assert exact_kernel_norm(torch.zeros(4, 4), 0.1, 0.5, 2).value == 0


def test_not_converged_is_said(monkeypatch):
    theta = kernel(random_jacobian(30, 1, 0.0, 0))
    monkeypatch.setattr(mean_square._largest, "__defaults__", (3,))
    with pytest.warns(RuntimeWarning, match="not converged after 3 products"):
        found = sgd_sharpness(theta, 0.1, tol=1e-9)
    assert found.residual > 1e-9 * found.value


@pytest.mark.parametrize(
    ("theta", "outputs", "message"),
    [
        (torch.ones(3, 2), 1, r"NC × NC with C = 1 outputs, got \(3, 2\)"),
        (torch.eye(4), 3, r"NC × NC with C = 3 outputs, got \(4, 4\)"),
        (torch.ones(()), 1, "NC × NC"),
        (torch.eye(0), 1, "NC × NC"),
        (torch.zeros(1).expand(MOST_ROWS + 1, MOST_ROWS + 1), 1, "4,001 rows; at most 4,000 are allowed"),
        (torch.tensor([[1.0, 0.5], [0.0, 1.0]]), 1, "finite symmetric"),
        (torch.full((2, 2), float("nan")), 1, "finite symmetric"),
        (torch.tensor([[1.0, 2.0], [2.0, 1.0]]), 1, "no negative eigenvalues, found -1"),
        (torch.eye(2), 0, "outputs must be a positive integer, got 0"),
    ],
)
def test_matrices_that_are_no_tangent_kernel_are_refused(theta, outputs, message):
    with pytest.raises(ValueError, match=message):
        sgd_sharpness(theta, 0.5, outputs)
    with pytest.raises(ValueError, match=message):
        exact_kernel_norm(theta, 0.1, 0.5, outputs)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"fraction must lie between 0 and 1, got 1\.5"):
        sgd_sharpness(torch.eye(2), 1.5)
    with pytest.raises(ValueError, match="learning_rate must be positive and finite, got 0"):
        exact_kernel_norm(torch.eye(2), 0, 0.5)
    with pytest.raises(ValueError, match="tol must be positive"):
        sgd_sharpness(torch.eye(2), 0.5, tol=0)
