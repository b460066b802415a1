import warnings

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from samlib import HessianOperator, power_iteration, top_eigenpairs
from samlib.eigen import alignment, extreme_eigenpairs

from .conftest import PROBLEMS, problem
from .matrices import Diagonal, dense, spectra, with_spectrum

ENDS = ("LA", "SA", "LM", "BE")


def expected_values(values, k, which):
    """The k wanted ones of all eigenvalues, ascending as eigvalsh gives them."""
    if which == "LA":
        return values.flip(0)[:k]
    if which == "SA":
        return values[:k]
    if which == "LM":
        return values[values.abs().argsort(descending=True)][:k]
    return torch.cat([values.flip(0)[: (k + 1) // 2], values[: k // 2].flip(0)])


def check(matrix, k, which, tol=1e-8, **more):
    """Right, within what the residuals allow, or honest about not having converged."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        result = top_eigenpairs(matrix, k, which, tol=tol, **more)
    assert len(result.values) == k
    assert result.matvecs <= len(matrix)
    true_residuals = (matrix @ result.vectors - result.vectors * result.values).norm(dim=0)
    assert (true_residuals <= result.residuals).all()
    identity = torch.eye(k, dtype=matrix.dtype)
    torch.testing.assert_close(result.vectors.T @ result.vectors, identity, rtol=0, atol=1e-8)
    eigenvalues = torch.linalg.eigvalsh(matrix)
    nearest = (result.values[:, None] - eigenvalues).abs().min(1).values
    assert (nearest <= result.residuals + 1e-12 * eigenvalues.abs().max()).all()
    # A loose tolerance bounds the distance to *some* eigenvalue: it cannot tell two apart that are closer than itself.
    if result.converged and tol <= 1e-6:
        expected = expected_values(eigenvalues, k, which)
        error = (result.values.abs() - expected.abs() if which == "LM" else result.values - expected).abs()
        # Two eigenvalues that are closer than the tolerance may stand for each other.
        assert (error <= result.residuals + 10 * tol * eigenvalues.abs().max()).all()
    return result


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("which", ENDS)
def test_agrees_with_a_dense_eigendecomposition_of_small_nets(name, which):
    objective, params = problem(name)
    operator = HessianOperator(objective, params)
    matrix = dense(operator)
    for k in (1, 3):
        result = top_eigenpairs(operator, k, which, tol=1e-9, max_matvecs=600)
        assert result.converged
        expected = expected_values(torch.linalg.eigvalsh(matrix), k, which)
        torch.testing.assert_close(result.values, expected, rtol=1e-6, atol=0)
        true_residuals = (matrix @ result.vectors - result.vectors * result.values).norm(dim=0)
        assert (true_residuals <= result.residuals).all()


@settings(max_examples=100, deadline=None)
@given(spectra, st.integers(0, 10), st.sampled_from(ENDS), st.integers(1, 4))
@example([-1.0, -1.0, -268.0, -6.103515625e-05, -1.0, 0.0, -1.0], 1, "LA", 1)  # a start that nearly misses the largest
def test_right_or_honest_on_awkward_spectra(values, seed, which, k):
    check(with_spectrum(values, seed), min(k, len(values)), which)


@pytest.mark.parametrize("scale", [1e-300, 1e-46, 1e42, 1e300])
def test_the_scale_does_not_matter(scale):
    matrix = with_spectrum(np.linspace(-1, 1, 50), 0)
    result = top_eigenpairs(matrix * scale, tol=1e-6)
    assert result.converged
    assert result.values[0].item() / scale == pytest.approx(1, rel=1e-5)


def test_the_looser_lower_end_still_bounds_its_error():
    matrix = with_spectrum([*np.linspace(-3, 1, 100), 10.0], 0)
    result = extreme_eigenpairs(matrix, 1, 1, tol=1e-6)
    assert result.values[0] == pytest.approx(10, abs=float(result.residuals[0]))
    assert abs(result.values[1] + 3) <= 10 * 0.1 + result.residuals[1]
    # Where the lower end carries the norm, it has the tight tolerance.
    result = extreme_eigenpairs(-matrix, 1, 1, tol=1e-6)
    assert result.values[1] == pytest.approx(-10, rel=1e-5)


def test_float32_reaches_what_float32_can():
    matrix = with_spectrum([*np.linspace(0, 1, 100), 3.0], 0)
    result = top_eigenpairs(matrix.float(), tol=1e-4)
    assert result.converged
    assert float(result.values[0]) == pytest.approx(3, rel=1e-5)


def test_not_converged_is_said():
    matrix = with_spectrum(np.linspace(0, 1, 200), 0)
    with pytest.warns(RuntimeWarning, match="not converged after 5 products"):
        result = top_eigenpairs(matrix, tol=1e-8, max_matvecs=5)
    assert not result.converged
    assert result.matvecs == 5
    true_residual = (matrix @ result.vectors[:, 0] - result.values[0] * result.vectors[:, 0]).norm()
    assert true_residual <= result.residuals[0]


def test_a_hessian_that_is_not_finite_is_an_error():
    with pytest.raises(FloatingPointError, match="not finite"):
        top_eigenpairs(torch.full((4, 4), float("nan")))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k must lie between 1 and the operator's size 3, got 0"),
        ({"k": 4}, "got 4"),
        ({"which": "XX"}, "which must be"),
        ({"tol": 0.0}, "tol must be positive"),
        ({"max_matvecs": 0}, "max_matvecs must be at least 1"),
        ({"v0": (torch.ones(3, 2), torch.ones(3))}, "one value for each vector"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        top_eigenpairs(torch.eye(3), **arguments)
    for shape in ((4,), (1, 3), (3, 1, 1)):
        with pytest.raises(ValueError, match="v0 must have shape"):
            top_eigenpairs(torch.eye(3), v0=torch.ones(shape))
    with pytest.raises(ValueError, match="iterations must be at least 1"):
        power_iteration(lambda w: w, torch.ones(3), iterations=0)
    with pytest.raises(ValueError, match="high"):
        extreme_eigenpairs(torch.eye(3), 3, 1)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 100), st.integers(1, 12), st.integers(1, 30), st.sampled_from(ENDS))
def test_as_many_pairs_as_asked_for_whatever_the_budget(seed, k, budget, which):
    """With a flag where they are not known well, and never with NaN; k products are spent in any case."""
    matrix = with_spectrum(np.linspace(-1, 2, 20), seed)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        result = top_eigenpairs(matrix, k, which, tol=1e-6, max_matvecs=budget)
    assert result.values.shape == result.residuals.shape == (k,)
    assert result.vectors.shape == (20, k)
    assert all(t.isfinite().all() for t in (result.values, result.vectors, result.residuals))
    assert result.matvecs <= min(max(budget, k), 20)
    assert result.converged == (not said)
    # The norm that residuals are relative to is the largest |θ| of the search space, the other end's perhaps.
    largest = torch.cat([result.values, result.others]).abs().max()
    assert not result.converged or (result.residuals <= 1e-6 * largest).all()
    assert result.converged or (result.residuals > 1e-6 * result.values.abs().max()).any()


@pytest.mark.parametrize("which", ENDS)
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_hermitian_matrices(which, dtype):
    torch.manual_seed(0)
    matrix = torch.randn(40, 40, dtype=torch.complex128)
    matrix = matrix + matrix.mH
    expected = expected_values(torch.linalg.eigvalsh(matrix), 3, which)
    tol = 1e-9 if dtype is torch.complex128 else 1e-4
    result = top_eigenpairs(matrix.to(dtype), 3, which, tol=tol)
    assert result.converged
    assert not result.values.is_complex()
    torch.testing.assert_close(result.values.double(), expected, rtol=tol, atol=0)
    vectors = result.vectors.to(torch.complex128)
    assert ((matrix @ vectors - vectors * expected).norm(dim=0) <= 2 * tol * expected.abs().max()).all()
    warm = top_eigenpairs(matrix.to(dtype), 3, which, v0=result.model, tol=tol, explore=0)
    torch.testing.assert_close(warm.values.double(), expected, rtol=tol, atol=0)
    assert warm.matvecs < result.matvecs


@pytest.mark.parametrize("share", [0.1, 1e-3])
def test_products_that_are_not_symmetric_are_told_as_such(share):
    """And not answered by a request for more of them; the symmetric part's values are found as far as that goes."""
    torch.manual_seed(0)
    matrix, twist = with_spectrum([*np.linspace(-1, 1, 300), 2.0], 0), torch.randn(301, 301, dtype=torch.float64)
    twisted = matrix + share * (twist - twist.T) / 301**0.5
    with pytest.warns(RuntimeWarning, match=r"not symmetric: its products differ from symmetric ones by [\d.]+%"):
        result = top_eigenpairs(twisted, tol=1e-6)
    assert not result.converged
    assert result.matvecs < 100
    assert float(result.values) == pytest.approx(2, abs=3 * share)


def test_what_the_tolerance_cannot_see_of_asymmetry_is_not_told():
    torch.manual_seed(0)
    matrix, twist = with_spectrum([*np.linspace(-1, 1, 300), 2.0], 0), torch.randn(301, 301, dtype=torch.float64)
    result = top_eigenpairs(matrix + 1e-5 * (twist - twist.T) / 301**0.5, tol=1e-3)
    assert result.converged


@pytest.mark.parametrize("name", PROBLEMS)
def test_rounding_is_not_taken_for_asymmetry(name):
    """In float32, asked for more than it can give, budget is what is missing."""
    objective, params = problem(name, dtype=torch.float32)
    with pytest.warns(RuntimeWarning, match="raise max_matvecs or tol"):
        top_eigenpairs(HessianOperator(objective, params), tol=1e-12, max_matvecs=60)


@pytest.mark.parametrize("threads", [1, 2])
def test_values_of_long_float32_vectors(threads):
    """Unit vectors, values and residual bounds hold at millions of parameters."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        values = torch.linspace(-0.5, 0.5, 4_000_000, dtype=torch.float64)
        values[:3] = torch.tensor([3.0, 2.0, 1.0])
        result = top_eigenpairs(Diagonal(values, torch.float32), 2, tol=1e-4)
    finally:
        torch.set_num_threads(before)
    vectors = result.vectors.double()
    torch.testing.assert_close(vectors.norm(dim=0), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-6)
    assert result.values.tolist() == pytest.approx([3.0, 2.0], rel=1e-6)
    true_residuals = (values[:, None] * vectors - vectors * result.values.double()).norm(dim=0)
    assert (true_residuals <= result.residuals).all()


def near_degenerate(gap, size=60, apart=1.0, seed=0):
    """Two or three leading values within a gap, the next at a distance; its eigenvectors."""
    values = [2.0, 2.0 - gap, 2.0 - apart, *np.linspace(-0.5, 0.5, size - 3)]
    matrix = with_spectrum(values, seed)
    return matrix, torch.linalg.eigh(matrix).eigenvectors.flip(1)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1000), st.floats(-6, -0.5), st.sampled_from([1e-2, 1e-3, 1e-6]), st.sampled_from([1, -1]))
def test_alignment_is_that_with_a_span_that_the_residuals_tell_apart(seed, decade, tol, sign):
    """Within the bound of Davis and Kahan, for the eigenvectors of a dense solve; of either end."""
    matrix, eigenvectors = near_degenerate(10**decade, seed=seed)
    result = extreme_eigenpairs(sign * matrix, *((3, 0) if sign > 0 else (0, 3)), tol=tol, low_tol=tol)
    vector = eigenvectors @ torch.randn(60, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = alignment(vector, result)
    assert found.separate
    assert found.pairs <= 2
    exact = float((eigenvectors[:, : found.pairs].T @ vector).norm() / vector.norm())
    true_gap = 10**decade if found.pairs == 1 else 1 - 10**decade
    residuals = result.residuals if sign > 0 else result.residuals.flip(0)
    bound = float(residuals[: found.pairs].norm()) / (true_gap - float(residuals[0]))
    assert abs(found.cosine - exact) <= bound
    assert bound < 0.5
    assert found.gap == pytest.approx(true_gap, abs=2 * float(residuals.max()))


def test_alignment_with_one_of_two_that_are_alike_would_be_chance():
    """With the first computed vector alone it may be anything up to that with the span."""
    matrix, eigenvectors = near_degenerate(1e-9)
    vector = eigenvectors[:, 0] + eigenvectors[:, 1] + eigenvectors[:, 2]
    alone, together = [], []
    for seed in range(10):
        result = top_eigenpairs(matrix, 2, tol=1e-3, generator=torch.Generator().manual_seed(seed))
        alone.append(float((vector @ result.vectors[:, 0]).abs() / vector.norm()))
        together.append(alignment(vector, result))
    assert max(alone) - min(alone) > 0.2
    assert [a.pairs for a in together] == [2] * 10
    np.testing.assert_allclose([a.cosine for a in together], (2 / 3) ** 0.5, atol=2e-3)
    assert min(a.gap for a in together) > 0.9
    assert result.gap < 1e-3


def test_alignment_says_when_a_pair_beside_was_not_computed():
    """A warm start holds both vectors; only one pair is asked for."""
    matrix, eigenvectors = near_degenerate(1e-4)
    model = top_eigenpairs(matrix, 2, tol=1e-8).model
    moved = matrix + 1e-4 * with_spectrum(np.linspace(-1, 1, 60), 5)
    result = extreme_eigenpairs(moved, 1, 1, v0=model, tol=1e-2, explore=0)
    found = alignment(eigenvectors[:, 0], result)
    assert found.pairs == 1
    assert not found.separate
    assert found.gap == result.gap < 1e-3
    assert alignment(eigenvectors[:, 0], top_eigenpairs(matrix, 1, v0=model, tol=1e-8)).separate


def test_alignment_with_the_larger_end_and_of_plain_matrices():
    matrix = torch.diag(torch.tensor([-3.0, 2.0, 1.0], dtype=torch.float64))
    result = extreme_eigenpairs(matrix, 1, 1, tol=1e-6, low_tol=1e-6)
    assert result.principal == 1
    found = alignment(torch.tensor([3.0, 4.0, 0.0]), result)
    assert found == (pytest.approx(0.6), 1, pytest.approx(4), True)
    assert alignment(torch.ones(1), top_eigenpairs(torch.ones(1, 1)))[1:] == (1, float("inf"), True)
    assert np.isnan(alignment(torch.zeros(3), result).cosine)
    zero = alignment(torch.ones(4), top_eigenpairs(torch.zeros(4, 4), 2))
    assert zero.pairs == 2
    assert not zero.separate


def quadratic(values, seed=0):
    """The gradient of ½ wᵀ H w."""
    matrix = with_spectrum(values, seed)
    return lambda w: matrix @ w


def test_power_iteration_returns_the_norm_of_a_product():
    """With eigenvalues ±10, vᵀHv has any value between; ‖Hv‖ is 10, read 0.5 % low by the divisor."""
    gradient, norms = quadratic([10.0, -10.0] * 20), []
    for seed in range(20):
        start = torch.randn(40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        norms.append(float(power_iteration(gradient, torch.zeros(40).double(), v0=start).values))
    np.testing.assert_allclose(norms, 10 * 2e-3 / (2e-3 + 1e-5), rtol=1e-9)
    assert np.median(norms) / 10 == pytest.approx(0.995, abs=1e-4)


def reference_rule(matrix, vector, iterations, tol):
    """The published loop, in NumPy: the norm starts at 1, and stands when it changes little or is small."""
    norm, spent = 1.0, 0
    vector = vector / np.linalg.norm(vector)
    while spent < iterations:
        before, product = norm, matrix @ vector * 2e-3 / (2e-3 + 1e-5)
        norm, spent = np.linalg.norm(product), spent + 1
        vector = product / norm
        if abs(norm - before) <= norm * tol or norm <= tol:
            break
    return norm, vector, spent


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.floats(-4, 3), st.sampled_from([1e-2, 1e-3, 1e-5]))
def test_power_iteration_follows_the_reference_rule(seed, decade, tol):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=12) * 10**decade
    start = rng.normal(size=12)
    matrix = with_spectrum(values, seed).numpy()
    norm, vector, spent = reference_rule(matrix, start, 50, tol)
    v0, origin = torch.as_tensor(start), torch.zeros(12, dtype=torch.float64)
    result = power_iteration(quadratic(values, seed), origin, 50, tol, v0=v0)
    assert result.matvecs == spent
    assert float(result.values) == pytest.approx(norm, rel=1e-9)
    np.testing.assert_allclose(result.vectors[:, 0].numpy(), vector, atol=1e-9)
    # Some eigenvalue of the differences lies within the residual of ±θ.
    assert np.abs(np.abs(values) * 2e-3 / (2e-3 + 1e-5) - norm).min() <= float(result.residuals) * (1 + 1e-9) + 1e-15


def test_power_iteration_reads_low_by_its_divisor():
    objective, params = problem("mlp")
    matrix = dense(HessianOperator(objective, params))
    norm = torch.linalg.eigvalsh(matrix).abs().max().item()
    result = power_iteration(objective.gradient, params, 5000, tol=1e-9)
    assert result.converged
    assert result.values.abs().item() == pytest.approx(norm * 2e-3 / (2e-3 + 1e-5), rel=2e-3)
    assert not power_iteration(objective.gradient, params, 2, tol=1e-9).converged
    flat = power_iteration(lambda w: torch.ones_like(w), params)
    assert flat.values.item() == 0
