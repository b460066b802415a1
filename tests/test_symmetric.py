import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
import torch

from samlib import top_eigenpairs
from samlib.symmetric import as_operator

torch.manual_seed(0)
MATRIX = torch.randn(30, 30, dtype=torch.float64)
MATRIX = MATRIX + MATRIX.T
ARRAY = MATRIX.numpy()


class Own:
    """What the solver needs and no more: float64 inside, without saying so."""

    shape = (30, 30)

    def __matmul__(self, vector):
        return MATRIX @ vector


class Column:
    """A product that gives a column, and NumPy's dtype."""

    shape, dtype = (30, 30), np.dtype("float64")

    def __matmul__(self, vector):
        return ARRAY @ vector[:, None]


KINDS = {
    "tensor": MATRIX,
    "tensor that requires gradients": MATRIX.clone().requires_grad_(),
    "sparse tensor": MATRIX.to_sparse(),
    "array": ARRAY,
    "array in reverse": ARRAY[::-1, ::-1],
    "array that cannot be written": np.broadcast_to(ARRAY, (1, 30, 30))[0],
    "array of the other byte order": ARRAY.astype(">f8"),
    "numpy matrix": np.asmatrix(ARRAY),
    "scipy array": scipy.sparse.csr_array(ARRAY),
    "scipy matrix": scipy.sparse.coo_matrix(ARRAY),
    "LinearOperator": scipy.sparse.linalg.aslinearoperator(ARRAY),
    "LinearOperator of a function": scipy.sparse.linalg.LinearOperator((30, 30), lambda v: ARRAY @ v),
    "own": Own(),
    "own column": Column(),
    "function": as_operator(lambda v: MATRIX @ v, size=30),
    "function of arrays": as_operator(lambda v: ARRAY @ v, size=30, dtype=np.float64),
    "function that tells its dtype": as_operator(lambda v: MATRIX @ v, size=30, dtype=torch.float64),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", ["LA", "SA"])
def test_every_kind_of_operator(kind, which):
    expected = scipy.sparse.linalg.eigsh(ARRAY, 2, which=which)[0]
    result = top_eigenpairs(KINDS[kind], 2, which, tol=1e-9)
    np.testing.assert_allclose(result.values.numpy(), expected[::-1] if which == "LA" else expected)
    assert result.values.dtype == result.vectors.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, np.int32, np.bool_])
def test_whole_numbers_count_as_float64(dtype):
    numbers = (MATRIX > 1).int()
    operator = numbers.to(dtype) if isinstance(dtype, torch.dtype) else numbers.numpy().astype(dtype)
    result = top_eigenpairs(operator, tol=1e-9)
    torch.testing.assert_close(result.values, torch.linalg.eigvalsh(numbers.double())[-1:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_for_products_only(dtype):
    result = top_eigenpairs(MATRIX.to(dtype), tol=0.03)
    assert result.values.dtype == result.vectors.dtype == torch.float32
    exact = torch.linalg.eigvalsh(MATRIX.to(dtype).double())[-1]
    assert float(result.values) == pytest.approx(float(exact), rel=0.03)


def test_hermitian_arrays():
    generator = np.random.default_rng(0)
    matrix = generator.normal(size=(20, 20)) + 1j * generator.normal(size=(20, 20))
    matrix = matrix + matrix.conj().T
    result = top_eigenpairs(scipy.sparse.csr_array(matrix), 3, tol=1e-9)
    np.testing.assert_allclose(result.values.numpy(), np.linalg.eigvalsh(matrix)[::-1][:3])


def test_a_start_tells_dtype_where_the_operator_does_not():
    seen = set()

    def product(vector):
        seen.add(vector.dtype)
        return MATRIX.to(vector) @ vector

    operator = type("Any", (), {"shape": (30, 30), "__matmul__": lambda self, v: product(v)})()
    top_eigenpairs(operator, v0=torch.ones(30, dtype=torch.float64))
    assert seen == {torch.float64}
    seen.clear()
    assert top_eigenpairs(operator, tol=1e-2).values.dtype == torch.float32
    assert seen == {torch.float32}


@pytest.mark.parametrize(
    "thing",
    [lambda v: v, None, 3, "matrix", [[1.0, 0.0], [0.0, 1.0]], np.array([["a", "b"]] * 2), np.array([[None] * 2] * 2)],
)
def test_what_is_no_operator_is_said_once_and_clearly(thing):
    with pytest.raises(TypeError, match="operator must be a square tensor, NumPy array or SciPy matrix of numbers"):
        as_operator(thing)
    with pytest.raises(TypeError, match=r"a function of a vector needs its size: as_operator\(function, size\)"):
        top_eigenpairs(thing)


@pytest.mark.parametrize("shape", [(3, 4), (3,), (0, 0), (2, 2, 2)])
def test_what_is_not_square_is_said(shape):
    for operator in (torch.ones(shape), np.ones(shape)):
        with pytest.raises(ValueError, match="operator must be square"):
            top_eigenpairs(operator)


def test_a_product_of_the_wrong_size_is_said():
    with pytest.raises(ValueError, match=r"must map a vector \(4,\) to one, got a result of shape \(3,\)"):
        top_eigenpairs(as_operator(lambda v: v[:3], 4, torch.float64))
