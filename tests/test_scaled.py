import pytest
import torch

from samlib import top_eigenpairs
from samlib.scaled import ScaledOperator


def symmetric(size, seed):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(size, size, dtype=torch.float64, generator=generator)
    return matrix + matrix.T, torch.rand(size, dtype=torch.float64, generator=generator) + 0.1, generator


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("shift", "sign"), [(0.0, 1), (0.7, 1), (0.0, -1), (0.7, -1)])
def test_it_is_the_dense_product(seed, shift, sign):
    matrix, scale, generator = symmetric(9, seed)
    operator = ScaledOperator(matrix, scale, shift, sign)
    root = torch.diag(scale**0.5)
    dense = root @ (sign * matrix + shift * torch.eye(9, dtype=torch.float64)) @ root
    vector = torch.randn(9, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(operator @ vector, dense @ vector, rtol=1e-13, atol=1e-13)
    assert (operator.shape, operator.dtype, operator.device) == ((9, 9), torch.float64, matrix.device)


def test_its_eigenvalues_are_those_of_the_step_and_its_vectors_live_in_the_scaled_coordinates():
    matrix, scale, _ = symmetric(9, 0)
    result = top_eigenpairs(ScaledOperator(matrix, scale), tol=1e-10)
    values, vectors = torch.linalg.eig(torch.diag(scale) @ matrix)
    leading = values.real.argmax()
    torch.testing.assert_close(result.values[0], values.real[leading], rtol=1e-9, atol=0)
    # w = D^½ u
    direction = scale**0.5 * result.vectors[:, 0]
    cosine = torch.nn.functional.cosine_similarity(direction, vectors.real[:, leading], dim=0)
    assert abs(cosine) == pytest.approx(1, abs=1e-9)


def test_coordinates_that_do_not_move_have_no_part():
    matrix, scale, _ = symmetric(6, 1)
    scale[:2] = 0
    found = top_eigenpairs(ScaledOperator(matrix, scale), tol=1e-10).values[0]
    rest = scale[2:] ** 0.5
    expected = torch.linalg.eigvalsh(rest * matrix[2:, 2:] * rest[:, None])[-1]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


def test_it_has_the_precision_of_the_operator_and_a_copy_of_the_scale():
    scale = torch.ones(2, dtype=torch.float64)
    operator = ScaledOperator(torch.eye(2), scale)
    scale.mul_(4)
    product = operator @ torch.ones(2)
    assert (product.dtype, product.tolist()) == (torch.float32, [1, 1])


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (torch.ones(3), r"of shape \(2,\), got \(3,\)"),
        (torch.ones(2, 2), r"of shape \(2,\), got \(2, 2\)"),
        (torch.tensor([1.0, -1.0]), "non-negative and finite"),
        (torch.tensor([1.0, float("inf")]), "non-negative and finite"),
        (torch.tensor([1.0, float("nan")]), "non-negative and finite"),
    ],
)
def test_scales_that_do_not_fit_are_refused(scale, message):
    with pytest.raises(ValueError, match=message):
        ScaledOperator(torch.eye(2), scale)
