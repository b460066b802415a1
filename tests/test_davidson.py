"""What the eigen-solver costs, what its check sees, and what a warm start is worth."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from samlib import MLP, HessianOperator, Objective, load_dataset, top_eigenpairs
from samlib.eigen import extreme_eigenpairs
from samlib.lowrank import LowRank
from samlib.objective import flatten_parameters

from .matrices import Diagonal, lanczos, like_mnist, low_rank, spectra, with_spectrum
from .test_eigen import ENDS, check, expected_values


def allowed(steps, size):
    """Products that a cold solve may take where plain Lanczos takes so many steps, and does not check its answer."""
    return min(1.3 * steps + 6, size)


@pytest.mark.parametrize("k", [1, 3, 5, 10])
@pytest.mark.parametrize("seed", range(3))
def test_cold_solves_cost_little_more_than_lanczos(k, seed):
    operator = Diagonal(like_mnist())
    result = top_eigenpairs(operator, k, tol=3e-3, generator=torch.Generator().manual_seed(seed))
    assert result.matvecs == operator.products <= allowed(lanczos(operator, k, 3e-3, seed), 5000)
    assert result.missed <= 1e-3
    np.testing.assert_allclose(result.values, np.sort(like_mnist())[::-1][:k], atol=3e-3 * 1.886)


@pytest.mark.data
@pytest.mark.usefixtures("real_data")
@pytest.mark.parametrize("k", [1, 3, 5, 10])
def test_cold_solves_of_a_real_hessian_cost_little_more_than_lanczos(k):
    torch.manual_seed(0)
    dataset, model = load_dataset("mnist", 1000, "real"), MLP(width=200)
    loss = torch.nn.MSELoss()
    objective = Objective(model, loss, dataset.train_inputs, dataset.train_targets)
    operator = HessianOperator(objective, flatten_parameters(model))
    result = top_eigenpairs(operator, k, tol=3e-3)
    steps = lanczos(operator, k, 3e-3)
    assert result.converged
    assert result.missed <= 1e-3
    assert result.matvecs <= allowed(steps, objective.size)


@pytest.mark.parametrize("size", [32, 40, 60])
@pytest.mark.parametrize("k", [1, 3, 5, 10])
@pytest.mark.parametrize("tol", [1e-3, 1e-8])
def test_small_matrices_cost_little_more_than_lanczos(size, k, tol):
    for seed in range(3):
        matrix = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for symmetric in (matrix + matrix.T, matrix @ matrix.T):
            result = check(symmetric, k, "LA", tol)
            assert result.converged
            assert result.matvecs <= allowed(lanczos(symmetric, k, tol), size)


@pytest.mark.parametrize(
    ("outliers", "copies"),
    [
        ((2.0, 2.0, 2.0, 1.9, 1.5), 1),
        ((2.0, 2.0 - 1e-6, 2.0 - 2e-6, 1.99, 1.5), 1),
        ((2.0, 1.5, 1.5, 1.45, 1.44), 1),
        ((1.312, 1.28, 1.241, 1.231, 1.203), 2),
        ((1.129, 1.114, 1.1005, 1.0927, 1.0908), 3),
    ],
)
@pytest.mark.parametrize("k", [2, 3, 5])
def test_copies_and_clusters_are_found(outliers, copies, k):
    """Which no Lanczos sequence sees; within the tolerance, whatever the start."""
    values = like_mnist(outliers, copies)
    for seed in range(5):
        result = top_eigenpairs(Diagonal(values), k, tol=3e-3, generator=torch.Generator().manual_seed(seed))
        assert result.converged
        np.testing.assert_allclose(result.values, np.sort(values)[::-1][:k], atol=3e-3 * max(outliers))


@pytest.mark.parametrize("which", ENDS)
def test_the_check_looks_beyond_every_end(which):
    """A start that is orthogonal to the extreme eigenvectors."""
    values = np.concatenate([[3.0, -3.5], np.linspace(-1, 1, 2000), [2.0, -2.0]])
    start = torch.zeros(len(values), dtype=torch.float64)
    start[-2:] = 1
    result = top_eigenpairs(Diagonal(values), 2, which, v0=start, tol=1e-6)
    expected = expected_values(torch.as_tensor(np.sort(values)), 2, which)
    torch.testing.assert_close(result.values, expected)
    assert result.missed <= 0.1
    unchecked = top_eigenpairs(Diagonal(values), 2, which, v0=start, tol=1e-6, explore=0)
    assert unchecked.missed == 1


def test_what_may_have_been_missed_is_said():
    """Where eigenvalues lie as close as the tolerance, nothing can be ruled out at a bearable price."""
    bare = Diagonal(np.linspace(0, 1, 20_000))
    assert top_eigenpairs(bare, 2, tol=1e-2).missed > 0.1
    assert top_eigenpairs(torch.eye(5), 2).missed == 0


def test_more_exploring_makes_a_miss_less_likely():
    values = np.linspace(0, 1, 3000) ** 2
    short, long = (top_eigenpairs(Diagonal(values), 2, tol=1e-2, explore=n) for n in (3, 60))
    assert short.matvecs < long.matvecs
    assert long.missed < short.missed


@settings(max_examples=40, deadline=None)
@given(spectra, st.integers(0, 3), st.sampled_from(ENDS), st.integers(1, 10), st.sampled_from([1e-3, 1e-12]))
def test_never_more_products_than_the_size_of_the_matrix(values, seed, which, k, tol):
    check(with_spectrum(values, seed), min(k, len(values)), which, tol, max_matvecs=10_000)


def test_a_large_whole_space_is_not_restarted():
    matrix = with_spectrum(np.linspace(0, 1, 500), 0)
    result = check(matrix, 3, "LA", 1e-9, max_matvecs=10_000)
    assert result.converged
    assert result.matvecs <= allowed(lanczos(matrix, 3, 1e-9), 500)


def test_restarts_keep_the_basis_small_and_the_answer_right():
    values = np.linspace(0, 1, 30_000)
    result = top_eigenpairs(Diagonal(values), 1, tol=1e-3)
    assert result.converged
    assert result.matvecs > 40  # more than one basis full
    assert len(result.others) < 40 + 12  # Ritz values, and those of the model
    assert float(result.values) == pytest.approx(1, abs=1e-3)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([1e-2, 1e-3, 1e-6]), st.floats(0, 0.3))
def test_warm_starts_along_a_moving_matrix(seed, tol, drift):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(50, 50, dtype=torch.float64, generator=generator)
    matrix = matrix @ matrix.T / 50
    model = None
    for _ in range(5):
        model = check(matrix, 1, "LA", tol, v0=model).model
        noise = torch.randn(50, 50, dtype=torch.float64, generator=generator)
        matrix = matrix + drift * (noise + noise.T) / 50


@settings(max_examples=100, deadline=None)
@given(spectra, st.integers(0, 10), st.sampled_from(ENDS), st.integers(1, 4), st.integers(1, 12))
def test_a_wrong_model_does_no_harm(values, seed, which, k, rank):
    """Right or honest, whatever the warm start says of the matrix."""
    matrix = with_spectrum(values, seed)
    wrong = low_rank(len(values), rank, torch.Generator().manual_seed(seed + 100))
    wrong = wrong._replace(values=wrong.values * (1 + matrix.abs().max()))
    check(matrix, min(k, len(values)), which, v0=wrong)


@pytest.mark.parametrize("which", ENDS)
def test_a_model_of_the_matrix_itself_leaves_nothing_to_do(which):
    matrix = with_spectrum([*np.linspace(-1, 1, 40), 5.0, 4.0, -4.5, -3.0], 0)
    values, vectors = torch.linalg.eigh(matrix)
    exact = LowRank(vectors.flip(1), values.flip(0))
    result = top_eigenpairs(matrix, 2, which, v0=exact, tol=1e-9, explore=0)
    torch.testing.assert_close(result.values, expected_values(values, 2, which))
    assert result.matvecs <= 6  # two pairs and a spare, or four for both ends, and what the random direction disturbs


def test_a_model_saves_products_along_a_moving_matrix():
    """Against the same vectors without their values, which cannot precondition; the moves mix close eigenvectors."""
    generator = torch.Generator().manual_seed(0)
    values = torch.cat([torch.linspace(1.5, 2, 8), torch.linspace(-0.2, 0.5, 292)]).double()
    basis, _ = torch.linalg.qr(torch.randn(300, 300, generator=generator, dtype=torch.float64))
    first = top_eigenpairs(basis @ torch.diag(values) @ basis.T).model
    spent = {"model": 0, "vectors": 0, "cold": 0}
    starts = {"model": first, "vectors": first.vectors[:, :2], "cold": None}
    for _ in range(10):
        matrix = basis @ torch.diag(values) @ basis.T
        for kind in spent:
            result = top_eigenpairs(matrix, v0=starts[kind], tol=1e-3, explore=0)
            assert result.values[0] == pytest.approx(2, rel=1e-4)
            spent[kind] += result.matvecs
            starts[kind] = {"model": result.model, "vectors": result.model.vectors[:, :2], "cold": None}[kind]
        turn = (
            torch.eye(300).double() + 0.1 * torch.randn(300, 300, generator=generator, dtype=torch.float64) / 300**0.5
        )
        basis, _ = torch.linalg.qr(turn @ basis)
    assert spent["model"] < 0.9 * spent["vectors"]
    assert spent["vectors"] < 0.9 * spent["cold"]


@pytest.mark.parametrize(
    ("spectrum", "start", "k", "expected"),
    [
        ([10.0, 9.0, *[0.0] * 18], [1], 1, [10.0]),
        ([1.0, 1.0, 1.0, *[0.0] * 17], [0], 3, [1.0, 1.0, 1.0]),
        ([10.0, 5.0, *np.linspace(0, 1, 400), 14.0], [0, 1], 1, [14.0]),
    ],
)
def test_a_warm_start_does_not_hide_the_other_eigenvectors(spectrum, start, k, expected):
    matrix = torch.diag(torch.as_tensor(spectrum, dtype=torch.float64))
    v0 = torch.eye(len(spectrum), dtype=torch.float64)[:, start]
    result = top_eigenpairs(matrix, k, v0=v0)
    np.testing.assert_allclose(result.values.numpy(), expected, rtol=1e-3)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1000), st.floats(0, 0.1))
@example(492, 0.0)  # where the Ritz values' gap is wider than the eigenvalues'
def test_values_alone_cost_less_and_are_as_close_as_asked(seed, drift):
    """Along a moving matrix with separated ends, λ is about as right as value_tol asks, though its residual is far
    from tol.
    """
    generator = torch.Generator().manual_seed(seed)
    values = torch.cat([torch.tensor([2.0, 1.4]), torch.linspace(-0.5, 0.9, 58)]).double()
    basis, _ = torch.linalg.qr(torch.randn(60, 60, generator=generator, dtype=torch.float64))
    loose = tight = None
    saved = 0
    for _ in range(4):
        matrix = basis @ torch.diag(values) @ basis.T
        loose = top_eigenpairs(matrix, v0=loose and loose.model, tol=1e-9, value_tol=1e-4)
        tight = top_eigenpairs(matrix, v0=tight and tight.model, tol=1e-9)
        assert loose.converged
        # The gap between Ritz values may be as wide as the spectrum, 2.5; that of the eigenvalues is 0.6.
        assert abs(loose.values[0] - 2) <= 2.5 / 0.6 * 1e-4 * 2
        saved += tight.matvecs - loose.matvecs
        turn = torch.eye(60).double() + drift * torch.randn(60, 60, generator=generator, dtype=torch.float64) / 60**0.5
        basis, _ = torch.linalg.qr(turn @ basis)
    assert saved > 0


def test_a_warm_start_saves_products():
    matrix = with_spectrum(np.linspace(0, 1, 300) ** 4, 0)
    cold = top_eigenpairs(matrix, tol=1e-4)
    warm = top_eigenpairs(matrix + 1e-4 * with_spectrum(np.linspace(-1, 1, 300), 1), tol=1e-4, v0=cold.model)
    assert warm.converged
    assert warm.matvecs < cold.matvecs


@pytest.mark.parametrize(("high", "products"), [(1, 5.6), (2, 9.2), (3, 13.2)])
def test_warm_solves_along_a_drifting_matrix(high, products):
    """Mean products along 20 moves that turn the leading eigenvectors by some 0.2 each, at residual 3e-3."""
    generator = torch.Generator().manual_seed(0)
    values = torch.as_tensor(np.sort(like_mnist())[::-1].copy())[[*range(150), *range(-100, 0)]]
    basis, _ = torch.linalg.qr(torch.randn(250, 250, generator=generator, dtype=torch.float64))
    model, spent = None, []
    for _ in range(21):
        matrix = basis @ torch.diag(values) @ basis.T
        result = extreme_eigenpairs(matrix, high, 1, model, tol=3e-3, explore=0 if model else 6)
        model = result.model
        spent.append(result.matvecs)
        np.testing.assert_allclose(result.values[:high], values[:high], atol=3e-3 * 1.886)
        turn = torch.randn(250, 250, generator=generator, dtype=torch.float64) * 0.2 / 250**0.5
        basis, _ = torch.linalg.qr((torch.eye(250) + turn) @ basis)
    assert np.mean(spent[1:]) <= products
