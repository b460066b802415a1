import warnings

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from samlib import HessianOperator, power_iteration, top_eigenpairs
from samlib.eigen import extreme_eigenpairs
from samlib.lowrank import LowRank, least_change
from samlib.layers import plain
from samlib.spectrum import hutchinson_trace, spectral_density

from .conftest import PROBLEMS, problem

ENDS = ("LA", "SA", "LM", "BE")


def dense(operator):
    return torch.stack([operator @ e for e in torch.eye(operator.shape[0], dtype=torch.float64)])


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


@pytest.mark.parametrize("name", PROBLEMS)
def test_agrees_with_curvlinops_and_scipy(name):
    from curvlinops import HessianLinearOperator

    objective, params = problem(name)
    torch.nn.utils.vector_to_parameters(params, objective.model.parameters())
    plain(objective.model)  # so that the oracle shares no derivative
    loss = torch.nn.CrossEntropyLoss() if name == "transformer" else torch.nn.MSELoss()

    class Flat(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x).flatten(0, -2)

    targets = objective.targets.flatten() if name == "transformer" else objective.targets
    peer = HessianLinearOperator(
        Flat(objective.model), loss, list(objective.model.parameters()), [(objective.inputs, targets)]
    )
    ours = HessianOperator(problem(name)[0], params)
    torch.manual_seed(1)
    vector = torch.randn(objective.size, dtype=torch.float64)
    torch.testing.assert_close(ours @ vector, peer @ vector)
    values, _ = scipy.sparse.linalg.eigsh(
        scipy.sparse.linalg.LinearOperator(
            ours.shape, lambda v: (peer @ torch.as_tensor(v, dtype=torch.float64).flatten()).numpy(), dtype=np.float64
        ),
        k=2,
        which="LA",
        tol=1e-10,
    )
    result = top_eigenpairs(ours, 2, tol=1e-9, max_matvecs=600)
    np.testing.assert_allclose(result.values.numpy(), values[::-1], rtol=1e-6)


def with_spectrum(values, seed):
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64, generator=generator))
    matrix = q @ torch.diag(torch.as_tensor(values, dtype=torch.float64)) @ q.T
    return (matrix + matrix.T) / 2


spectra = st.one_of(
    st.lists(st.floats(-1e3, 1e3, allow_subnormal=False), min_size=1, max_size=60),
    st.lists(st.floats(-1e3, 0, allow_subnormal=False), min_size=1, max_size=30),  # nothing positive
    st.lists(st.sampled_from([0.0, 1.0, 1.0 + 1e-7, 2.0, -2.0]), min_size=1, max_size=60),  # clustered
    st.integers(1, 40).map(lambda n: [0.0] * n),
    st.floats(-1e3, 1e3, allow_subnormal=False).map(lambda v: [v]),
    st.tuples(st.integers(1, 40), st.floats(-10, 10, allow_subnormal=False)).map(lambda nv: [nv[1]] * nv[0]),
)


@settings(max_examples=100, deadline=None)
@given(spectra, st.integers(0, 10), st.sampled_from(ENDS), st.integers(1, 4))
@example([-1.0, -1.0, -268.0, -6.103515625e-05, -1.0, 0.0, -1.0], 1, "LA", 1)  # a start that nearly misses the largest
def test_right_or_honest_on_awkward_spectra(values, seed, which, k):
    check(with_spectrum(values, seed), min(k, len(values)), which)


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


def low_rank(size, rank, generator):
    vectors, _ = torch.linalg.qr(torch.randn(size, rank, dtype=torch.float64, generator=generator))
    return LowRank(
        vectors, torch.randn(vectors.shape[1], dtype=torch.float64, generator=generator).sort().values.flip(0)
    )


@settings(max_examples=100, deadline=None)
@given(spectra, st.integers(0, 10), st.sampled_from(ENDS), st.integers(1, 4), st.integers(1, 12))
def test_a_wrong_model_does_no_harm(values, seed, which, k, rank):
    """Right or honest, whatever the warm start says of the matrix."""
    matrix = with_spectrum(values, seed)
    wrong = low_rank(len(values), rank, torch.Generator().manual_seed(seed + 100))
    wrong = wrong._replace(values=wrong.values * (1 + matrix.abs().max()))
    check(matrix, min(k, len(values)), which, v0=wrong)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 8), st.sampled_from([None, 1, 5, 20]))
@example(593, 5, 20)  # vectors that are nearly dependent
def test_the_least_change_that_explains_the_products(seed, columns, rank):
    """Against the textbook's formula, and as the nearest of all symmetric matrices with the same products.

    Directions shorter than eps^⅓ = 6e-6 are dropped; hence the tolerance.
    """
    generator = torch.Generator().manual_seed(seed)
    matrix = with_spectrum(np.linspace(-1, 2, 30) ** 3, seed)
    basis = low_rank(30, columns, generator).vectors
    old = rank and low_rank(30, rank, generator)
    new = least_change(old, basis, matrix @ basis, lambda count: list(range(count)))
    found = new.vectors * new.values @ new.vectors.T
    before = old.vectors * old.values @ old.vectors.T if old else torch.zeros_like(matrix)
    inside, outside = basis @ basis.T, torch.eye(30).double() - basis @ basis.T
    expected = inside @ matrix + matrix @ inside - inside @ matrix @ inside + outside @ before @ outside
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(found @ basis, matrix @ basis, rtol=0, atol=1e-4)
    free = torch.randn(30, 30, generator=generator, dtype=torch.float64)
    another = found + outside @ (free + free.T) @ outside
    assert (another - before).norm() >= (found - before).norm() - 1e-4
    assert (new.vectors.T @ new.vectors - torch.eye(len(new.values)).double()).abs().max() < 1e-4


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


@pytest.mark.parametrize("scale", [1e-300, 1e-46, 1e42, 1e300])
def test_the_scale_does_not_matter(scale):
    matrix = with_spectrum(np.linspace(-1, 1, 50), 0)
    result = top_eigenpairs(matrix * scale, tol=1e-6)
    assert result.converged
    assert result.values[0].item() / scale == pytest.approx(1, rel=1e-5)


def test_products_that_rebuild_the_graph_work_in_the_solver():
    objective, params = problem("mlp", chunk_size=4, retain_graph=False)
    kept, _ = problem("mlp")
    rebuilt, whole = (top_eigenpairs(HessianOperator(o, params), tol=1e-8) for o in (objective, kept))
    torch.testing.assert_close(rebuilt.values, whole.values)


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


@pytest.mark.parametrize("name", PROBLEMS)
def test_trace_of_small_nets(name):
    operator = HessianOperator(*problem(name))
    exact = float(dense(operator).diagonal().sum())
    estimate, error = hutchinson_trace(operator, probes=400)
    assert abs(estimate - exact) <= 4 * error
    offdiagonal = dense(operator) - torch.diag(dense(operator).diagonal())
    assert error == pytest.approx(
        float((2 * offdiagonal.square().sum() / 400) ** 0.5), rel=0.3
    )  # Hutchinson's variance


@pytest.mark.parametrize("name", PROBLEMS)
def test_spectral_density_has_the_moments_of_the_spectrum(name):
    operator = HessianOperator(*problem(name))
    eigenvalues = torch.linalg.eigvalsh(dense(operator))
    density = spectral_density(operator, probes=200, steps=12)
    torch.testing.assert_close(density.weights.sum(1), torch.ones(200, dtype=torch.float64))
    for power in (1, 2, 3):
        expected = float((eigenvalues**power).mean())
        samples = (density.nodes**power * density.weights).sum(1)
        assert abs(density.moment(power) - expected) <= 4 * float(samples.std()) / 200**0.5
    low, high = float(eigenvalues[0]), float(eigenvalues[-1])
    at = torch.linspace(2 * low - high, 2 * high - low, 4001, dtype=torch.float64)
    assert float(torch.trapezoid(density(at, (high - low) / 50), at)) == pytest.approx(1, abs=1e-6)


def test_spectral_density_is_exact_where_lanczos_ends_early():
    """Three different eigenvalues end every Lanczos sequence after three steps, with the spectrum as nodes."""
    values = torch.tensor([3.0, 1.0, -2.0], dtype=torch.float64).repeat_interleave(20)
    density = spectral_density(torch.diag(values), probes=3, steps=10)
    assert (density.weights > 1e-12).sum(1).tolist() == [3, 3, 3]
    torch.testing.assert_close(density.weights[density.weights > 1e-12], torch.full((9,), 1 / 3).double())
    assert sorted(set(density.nodes[density.weights > 1e-12].round(decimals=9).tolist())) == [-2, 1, 3]


@pytest.mark.parametrize("call", [lambda m: hutchinson_trace(m, 1), lambda m: spectral_density(m, 0)])
def test_too_few_probes_are_refused(call):
    with pytest.raises(ValueError, match="probes"):
        call(torch.eye(3))


def test_a_warm_start_saves_products():
    matrix = with_spectrum(np.linspace(0, 1, 300) ** 4, 0)
    cold = top_eigenpairs(matrix, tol=1e-4)
    warm = top_eigenpairs(matrix + 1e-4 * with_spectrum(np.linspace(-1, 1, 300), 1), tol=1e-4, v0=cold.model)
    assert warm.converged
    assert warm.matvecs < cold.matvecs


def test_not_converged_is_said():
    matrix = with_spectrum(np.linspace(0, 1, 200), 0)
    with pytest.warns(RuntimeWarning, match="not converged after 5 products"):
        result = top_eigenpairs(matrix, tol=1e-8, max_matvecs=5)
    assert not result.converged
    assert result.matvecs == 5
    true_residual = (matrix @ result.vectors[:, 0] - result.values[0] * result.vectors[:, 0]).norm()
    assert true_residual <= result.residuals[0]


def test_restarts_keep_the_basis_small_and_the_answer_right():
    matrix = with_spectrum(np.linspace(0, 1, 400), 3)
    result = check(matrix, 1, "LA", 1e-6, max_matvecs=400)
    assert result.converged
    assert result.matvecs > 40  # more than one basis full


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
