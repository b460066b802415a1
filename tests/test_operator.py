import sys

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from samlib import HessianOperator, Objective
from samlib.objective import flatten_parameters

from .conftest import PROBLEMS, problem
from .plain import Function, dense


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("settings", [{}, {"chunk_size": 3}, {"chunk_size": 3, "retain_graph": False}])
def test_value_and_gradient_are_the_objectives_to_the_bit(name, settings):
    objective, params = problem(name, dtype=torch.float32, **settings)
    operator = HessianOperator(objective, params)
    for ours, theirs in zip((operator.value, operator.gradient), objective.value_and_gradient(params), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(operator.value, objective.value(params))
    assert not operator.gradient.requires_grad
    assert not operator.value.requires_grad


def test_a_kernels_value_and_gradient_are_the_operators_too():
    plain, params = problem("mlp")

    def kernel(params, x, y):
        value, gradient = Objective(plain.model, plain.loss, x, y, check=False).value_and_gradient(params)
        return gradient * (1 + 1e-9), value

    objective = Objective(plain.model, plain.loss, plain.inputs, plain.targets, chunk_size=8, kernel=kernel)
    operator = HessianOperator(objective, params)
    assert torch.equal(operator.gradient, objective.gradient(params))
    assert not torch.equal(operator.gradient, plain.gradient(params))


@pytest.mark.parametrize("retain", [True, False])
def test_the_operator_keeps_its_own_parameters(retain):
    objective, params = problem("mlp", retain_graph=retain)
    operator = HessianOperator(objective, params)
    vector = torch.linspace(-1, 1, objective.size, dtype=torch.float64)
    before = operator @ vector
    params.mul_(2)
    assert torch.equal(operator @ vector, before)
    assert (operator.dtype, operator.device, operator.shape) == (
        params.dtype,
        params.device,
        (len(params), len(params)),
    )


@pytest.mark.parametrize("name", PROBLEMS)
def test_scipy_solves_it(name):
    operator = HessianOperator(*problem(name))
    linear = operator.as_linear_operator()
    matrix = dense(operator).numpy()
    np.testing.assert_allclose(linear @ np.eye(len(matrix)), matrix, atol=1e-12)
    np.testing.assert_allclose(linear.H @ matrix[:, :1], matrix.T @ matrix[:, :1], atol=1e-12)
    values = scipy.sparse.linalg.eigsh(linear, 2, which="LA", return_eigenvectors=False)
    np.testing.assert_allclose(values, np.linalg.eigvalsh(matrix)[-2:], rtol=1e-8)
    single = HessianOperator(*problem(name, dtype=torch.float32)).as_linear_operator()
    assert single.dtype == (single @ np.ones(len(matrix))).dtype == np.float32


def test_without_scipy_it_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.sparse.linalg", None)
    with pytest.raises(ImportError, match="pip install scipy"):
        HessianOperator(*problem("mlp")).as_linear_operator()


class CutOff(torch.autograd.Function):
    """x·y with a gradient by x that autograd takes to be independent of y: half of the second derivative is missing."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return x * y

    @staticmethod
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        return g * y.detach(), g * x


def network(middle, dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), middle, nn.Linear(5, 3)).to(dtype)


def operator_of(model, dtype=torch.float64, **settings):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(9, 4, generator=generator).to(dtype), torch.randint(0, 3, (9,), generator=generator)
    return HessianOperator(Objective(model, F.cross_entropy, x, y), flatten_parameters(model), **settings)


def test_a_hessian_that_is_not_symmetric_is_refused_where_asked():
    model = network(Function(lambda self, x: CutOff.apply(x, self.inner(x)), inner=nn.Linear(5, 5)))
    operator = operator_of(model)
    matrix = dense(operator)
    assert (matrix - matrix.T).norm() > 1e-2 * matrix.norm()
    v = torch.randn(len(matrix), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    square = (matrix @ v).square().sum()
    assert operator.asymmetry() == pytest.approx(float(abs(square - v @ matrix @ matrix @ v) / square))
    with pytest.raises(ValueError, match="the Hessian is not symmetric"):
        operator_of(model, check=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_hessian_that_is_symmetric_passes(dtype):
    for middle in (nn.GELU(), nn.ReLU(), nn.LayerNorm(5), nn.GroupNorm(1, 5), nn.Linear(5, 5)):
        operator = operator_of(network(middle, dtype), dtype, check=True)
        assert operator.matvecs == 2
    for name in PROBLEMS:
        HessianOperator(*problem(name, dtype=dtype), check=True)


def test_weight_norm_is_right_or_refused():
    """Its second derivative is wrong in PyTorch 2.13, and may be mended later."""
    model = network(parametrizations.weight_norm(nn.Linear(5, 5)))
    operator = operator_of(model)
    params, step = flatten_parameters(model), 1e-5
    gradient = operator.objective.gradient
    eye = torch.eye(len(params), dtype=torch.float64)
    true = torch.stack([(gradient(params + step * e) - gradient(params - step * e)) / (2 * step) for e in eye], 1)
    if (dense(operator) - true).norm() > 1e-4 * true.norm():
        with pytest.raises(ValueError, match="not symmetric"):
            operator_of(model, check=True)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


@pytest.mark.parametrize("retain", [True, False])
def test_what_has_no_second_derivative_is_named(retain):
    """Where PyTorch raises an error, and where it takes the derivative for zero."""
    model = network(Function(lambda self, x: Once.apply(x)))
    x, y = torch.randn(9, 4, dtype=torch.float64), torch.randint(0, 3, (9,))
    objective = Objective(model, F.cross_entropy, x, y, retain_graph=retain)
    params = flatten_parameters(model)
    objective.gradient(params)
    with pytest.raises(RuntimeError, match=r"module '2' \(Function\) has no second derivative"):
        HessianOperator(objective, params) @ params
    ctc = lambda o, y: F.ctc_loss(o[:, None].log_softmax(-1), y[None, :2], (len(o),), (2,))  # noqa: E731
    objective = Objective(network(nn.Tanh()), ctc, x, y.clamp(1), retain_graph=retain)
    with pytest.raises(RuntimeError, match=r"the loss function has no second derivative .*ctc_loss"):
        HessianOperator(objective, params) @ params


def test_vectors_of_another_shape():
    operator = HessianOperator(*problem("mlp"))
    for wrong in (torch.ones(3), torch.ones(1, operator.shape[0])):
        with pytest.raises(ValueError, match="expected a vector of shape"):
            operator @ wrong
    assert operator.matvecs == 0
