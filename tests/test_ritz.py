import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from samlib.ritz import SearchSpace, inner, miss_probability, norms, orthonormal
from samlib.symmetric import as_operator

from .matrices import Diagonal, with_spectrum


@pytest.fixture
def _one_thread():
    """Where ``norm`` of long float32 vectors is worst."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_one_thread")
def test_norms_and_inner_products_of_long_vectors_keep_their_digits():
    torch.manual_seed(0)
    rows = torch.randn(2, 8_000_000)
    exact = rows.double() @ rows.double().mT
    assert float((rows[0].norm().double() / exact[0, 0].sqrt() - 1).abs()) > 1e-4  # what this guards against
    torch.testing.assert_close(norms(rows), exact.diagonal().sqrt(), rtol=1e-7, atol=0)
    torch.testing.assert_close(inner(rows, rows), exact, rtol=0, atol=1e-5 * float(exact[0, 0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
def test_norms_where_squares_leave_the_range(dtype):
    small, large = (1e-300, 1e300) if dtype in (torch.float64, torch.complex128) else (1e-35, 1e35)
    for scale in (small, 1.0, large):
        row = torch.tensor([[3.0, 0.0, -4.0, 12.0]], dtype=dtype) * scale
        assert float(norms(row)) / scale == pytest.approx(13, rel=1e-6)
    assert float(norms(torch.zeros(1, 3, dtype=dtype))) == 0
    assert norms(torch.full((1, 3), torch.nan, dtype=dtype)).isnan().all()


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1000), st.integers(0, 5), st.sampled_from([1.0, 1e-4, 1e-10]), st.booleans())
def test_what_is_beside_a_space_is_orthogonal_to_it(seed, count, share, hermitian):
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.complex128 if hermitian else torch.float64
    rows, _ = torch.linalg.qr(torch.randn(9, count + 1, generator=generator, dtype=dtype))
    basis, new = rows.mT[:count], rows.mT[count]
    vector = torch.randn(count, generator=generator, dtype=dtype) @ basis + share * new
    found, length = orthonormal(basis, vector)
    assert length == pytest.approx(share, rel=1e-4)
    assert float(norms(found[None])) == pytest.approx(1, abs=1e-14)
    assert count == 0 or float(inner(basis, found[None]).abs().max()) < 1e-14
    assert float((new.conj() @ found).abs()) == pytest.approx(1, abs=1e-9)


def test_nothing_beside_a_space_is_said():
    basis = torch.eye(4)[:2]
    for vector in (basis[0] - 3 * basis[1], torch.zeros(4)):
        assert orthonormal(basis, vector)[0] is None


@pytest.mark.parametrize("hermitian", [False, True])
def test_the_search_space_keeps_its_projection(hermitian):
    torch.manual_seed(0)
    matrix = torch.randn(30, 30, dtype=torch.complex128 if hermitian else torch.float64)
    matrix = matrix + matrix.mH
    space = SearchSpace(as_operator(matrix), 20, 100)
    assert space.extend(torch.randn(3, 30, dtype=matrix.dtype)) == 3
    space.append(space.krylov()[0])
    rotation, _ = torch.linalg.qr(torch.randn(4, 2, dtype=matrix.dtype))
    space.rotate(rotation.mT)
    assert space.extend([*space.basis, torch.randn(30, dtype=matrix.dtype)]) == 1  # the first two are there already
    identity = torch.eye(3, dtype=matrix.dtype)
    torch.testing.assert_close(inner(space.basis, space.basis), identity)
    torch.testing.assert_close(space.image.mT, matrix @ space.basis.mT)
    torch.testing.assert_close(space.projected, space.basis.conj() @ matrix @ space.basis.mT)
    assert space.asymmetry < 1e-14
    assert space.matvecs == 5


def test_the_search_space_keeps_to_its_room_and_budget():
    space = SearchSpace(as_operator(torch.eye(30)), 6, 5)
    assert space.extend(torch.randn(9, 30)) == 5
    assert space.matvecs == 5
    space = SearchSpace(as_operator(torch.eye(30)), 6, 50)
    assert space.extend(torch.randn(9, 30)) == 6


def sequence(values, start, steps):
    """A Lanczos sequence: its projected matrix, the next β and the next vector."""
    space = SearchSpace(as_operator(Diagonal(values)), steps, steps)
    space.extend([start])
    while len(space) < steps:
        space.append(space.krylov()[0])
    vector, beside = space.krylov()
    return space.projected, beside, vector


def test_the_probability_of_a_miss_is_that_of_a_random_start():
    """The share of random starts that are orthogonal enough to the largest eigenvector to hide it, as bounded from
    sequences that do not see it. The next vector's component is exactly |p(λ)| times the start's.
    """
    values = torch.cat([torch.linspace(-1, 1, 199), torch.tensor([1.5])]).double()
    torch.manual_seed(0)
    bounds = []
    for _ in range(20):
        start = torch.randn(200, dtype=torch.float64)
        start[-1] = 0
        projected, beside, _ = sequence(values, start, 5)
        bounds.append(miss_probability(projected, beside, (1.5, -math.inf), 200))
        growth = (2 * 200 / math.pi) ** 0.5 / bounds[-1]
        # A start that has 1/|p| of the hidden vector gives a next vector that is half made of it.
        start[-1] = start.norm() / growth
        assert abs(float(sequence(values, start, 5)[2][-1])) == pytest.approx(0.5, abs=0.35)
        components = torch.randn(20_000, 200, dtype=torch.float64)
        share = float((components[:, -1].abs() / components.norm(dim=1) < 1 / growth).double().mean())
        assert share <= 1.1 * bounds[-1]
        assert share >= 0.7 * bounds[-1]
    assert max(bounds) < 0.5


def test_the_probability_of_a_miss_of_both_ends_and_of_none():
    projected = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)  # Ritz values ±1
    above = miss_probability(projected, 0.5, (3.0, -math.inf), 10)
    assert above == pytest.approx((20 / math.pi) ** 0.5 * 0.5 / 8)  # p(3) = (3² − 1)/(1 · ½)
    assert miss_probability(projected, 0.5, (3.0, -3.0), 10) == pytest.approx(2 * above)
    assert miss_probability(projected, 0.5, (1.01, -math.inf), 10) == 1
    assert miss_probability(projected, 0.5, (0.9, -math.inf), 10) == math.inf
    assert miss_probability(projected, 0.0, (3.0, -math.inf), 10) == 0


@pytest.mark.parametrize("share", [0.0, 1e-6, 0.3])
def test_asymmetry_is_measured(share):
    torch.manual_seed(0)
    matrix, twist = with_spectrum(np.linspace(-1, 1, 30), 0), torch.randn(30, 30, dtype=torch.float64)
    space = SearchSpace(as_operator(matrix + share * (twist - twist.T) / 30**0.5), 20, 20)
    space.extend(torch.randn(8, 30, dtype=torch.float64))
    assert space.asymmetry == pytest.approx(5 * share, rel=0.8, abs=1e-13)
