import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from samlib.lowrank import LowRank, correction, least_change, values_beside

from .matrices import low_rank, with_spectrum


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


def test_the_least_change_of_a_hermitian_matrix():
    torch.manual_seed(0)
    matrix = torch.randn(20, 20, dtype=torch.complex128)
    matrix = matrix + matrix.mH
    basis, _ = torch.linalg.qr(torch.randn(20, 4, dtype=torch.complex128))
    vectors, _ = torch.linalg.qr(torch.randn(20, 5, dtype=torch.complex128))
    old = LowRank(vectors, torch.arange(5.0, 0, -1).double())
    new = least_change(old, basis, matrix @ basis, lambda count: list(range(count)))
    found = new.vectors @ torch.diag(new.values).to(new.vectors) @ new.vectors.mH
    inside = basis @ basis.mH
    outside = torch.eye(20) - inside
    before = vectors @ torch.diag(old.values).to(vectors) @ vectors.mH
    expected = inside @ matrix + matrix @ inside - inside @ matrix @ inside + outside @ before @ outside
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_the_correction_is_that_of_the_shifted_model(dtype):
    """θ (θ − M)⁻¹ r by a dense solve, where no value of the model is too close."""
    torch.manual_seed(0)
    vectors, _ = torch.linalg.qr(torch.randn(12, 3, dtype=dtype))
    model = LowRank(vectors, torch.tensor([2.0, 1.0, -1.0], dtype=torch.float64))
    dense = vectors @ torch.diag(model.values).to(dtype) @ vectors.mH
    residual = torch.randn(12, dtype=dtype)
    for theta, upper in ((3.0, True), (-2.0, False)):
        expected = theta * torch.linalg.solve(theta * torch.eye(12, dtype=dtype) - dense, residual)
        torch.testing.assert_close(correction(residual, theta, upper, model, 0.01), expected)
    # A value of the model that θ ought to be above is taken to be just below it.
    shifted = LowRank(vectors[:, :1], torch.tensor([1.0 - 0.01], dtype=torch.float64))
    expected = correction(residual, 1.0, True, shifted, 0.01) - residual
    close = LowRank(vectors[:, :1], torch.tensor([1.2], dtype=torch.float64))
    torch.testing.assert_close(correction(residual, 1.0, True, close, 0.01) - residual, expected * 1.2 / 0.99)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_values_beside_some_vectors(dtype):
    torch.manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(15, 6, dtype=dtype))
    model = LowRank(basis[:, :4], torch.tensor([3.0, 2.0, 1.0, -4.0], dtype=torch.float64))
    # The first vector is one of the model's, the second lies across two of them and beyond.
    vectors = torch.stack([basis[:, 0], 0.6 * basis[:, 1] + 0.8 * basis[:, 5]], 1)
    outside = torch.eye(15) - vectors @ vectors.mH
    matrix = outside @ model.vectors @ torch.diag(model.values).to(dtype) @ model.vectors.mH @ outside
    expected = torch.linalg.eigvalsh(matrix)
    torch.testing.assert_close(values_beside(model, vectors), expected[expected.abs() > 1e-9].flip(0))


def test_the_least_change_when_all_is_known():
    """Products with a basis of the whole space leave nothing beside it, and rounding is not taken for a direction."""
    matrix = with_spectrum([-3.0, 2.0, 1.0], 0)
    basis = low_rank(3, 3, torch.Generator().manual_seed(0)).vectors
    old = low_rank(3, 2, torch.Generator().manual_seed(1))
    new = least_change(old, basis, matrix @ basis, lambda count: list(range(count)))
    torch.testing.assert_close(new.values, torch.tensor([2.0, 1.0, -3.0], dtype=torch.float64))
    torch.testing.assert_close(new.vectors.T @ new.vectors, torch.eye(3, dtype=torch.float64))
