import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from samlib import HessianOperator, Objective, top_eigenpairs
from samlib.experiments import mean_squared_error
from samlib.gauss_newton import GaussNewtonOperator, TangentKernelOperator
from samlib.layers import plain
from samlib.objective import Layout, flatten_parameters
from samlib.tangent import ntk_matrix

from .conftest import PROBLEMS, problem


def functional(model):
    """A module's outputs as a function of its flat parameters and inputs."""
    layout = Layout(model)
    return lambda w, x: torch.func.functional_call(model, layout.split(w), (x,))


def dense(operator):
    return torch.stack([operator @ e for e in torch.eye(operator.shape[0], dtype=torch.float64)])


def dense_jacobian(objective, params):
    """∂f/∂w (NC, P) by forward differentiation of a network of PyTorch's own operations."""
    forward = functional(plain(copy.deepcopy(objective.model)))
    return torch.func.jacfwd(lambda w: forward(w, objective.inputs).flatten())(params)


def output_hessian(objective, params):
    """∂²ℓ/∂f² (NC, NC) of the loss alone."""
    f = objective.forward(params, objective.inputs).detach()
    return torch.autograd.functional.hessian(
        lambda flat: objective.loss(flat.view_as(f), objective.targets), f.flatten()
    )


@pytest.mark.parametrize("name", PROBLEMS)  # the Transformer's loss is cross-entropy
@pytest.mark.parametrize(("chunk_size", "retain"), [(None, True), (4, True), (4, False)])
def test_products_are_those_of_the_dense_matrix(name, chunk_size, retain):
    objective, params = problem(name, chunk_size=chunk_size, retain_graph=retain)
    operator = GaussNewtonOperator(objective, params)
    jacobian, curvature = dense_jacobian(objective, params), output_hessian(objective, params)
    vectors = torch.randn(3, objective.size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for v in vectors:
        torch.testing.assert_close(operator @ v, jacobian.T @ (curvature @ (jacobian @ v)))
    assert operator.matvecs == 3


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("retain", [True, False])
def test_leading_eigenpairs_through_the_solver(name, retain):
    objective, params = problem(name, chunk_size=4, retain_graph=retain)
    jacobian, curvature = dense_jacobian(objective, params), output_hessian(objective, params)
    expected = torch.linalg.eigvalsh(jacobian.T @ curvature @ jacobian)
    result = top_eigenpairs(GaussNewtonOperator(objective, params), 3, tol=1e-9, max_matvecs=600)
    assert result.converged
    assert result.values.dtype == torch.float64  # the operator says what it is
    torch.testing.assert_close(result.values, expected.flip(0)[:3], rtol=1e-7, atol=0)


def test_agrees_with_curvlinops():
    from curvlinops import GGNLinearOperator

    objective, params = problem("mlp")
    torch.nn.utils.vector_to_parameters(params, objective.model.parameters())
    peer = GGNLinearOperator(
        objective.model, nn.MSELoss(), list(objective.model.parameters()), [(objective.inputs, objective.targets)]
    )
    vector = torch.randn(objective.size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(GaussNewtonOperator(objective, params) @ vector, peer @ vector)


def test_a_model_linear_in_its_parameters_has_the_gauss_newton_matrix_as_its_hessian():
    torch.manual_seed(0)
    x, y = torch.randn(6, 5, dtype=torch.float64), torch.randint(3, (6,))
    model = nn.Linear(5, 3, dtype=torch.float64)
    for loss, targets in ((nn.functional.cross_entropy, y), (mean_squared_error, torch.randn(6, 3).double())):
        objective = Objective(model, loss, x, targets, chunk_size=4)
        params = flatten_parameters(model)
        gauss_newton, hessian = (kind(objective, params) for kind in (GaussNewtonOperator, HessianOperator))
        torch.testing.assert_close(dense(gauss_newton), dense(hessian))
        assert torch.linalg.matrix_rank(dense(gauss_newton)) > 1


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 3), st.integers(1, 7), st.integers(0, 1000))
def test_tangent_kernel_and_gauss_newton_share_their_eigenvalues(examples, outputs, chunk_size, seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs)).double()
    x, y = torch.randn(examples, 3).double(), torch.randn(examples, outputs).double()
    objective = Objective(model, mean_squared_error, x, y, chunk_size=chunk_size)
    params = flatten_parameters(model)
    kernel = dense(TangentKernelOperator(objective, params))
    torch.testing.assert_close(kernel, ntk_matrix(objective, params))
    small, large = torch.linalg.eigvalsh(kernel), torch.linalg.eigvalsh(dense(GaussNewtonOperator(objective, params)))
    count = min(len(small), len(large))
    torch.testing.assert_close(small.flip(0)[:count], large.flip(0)[:count], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("retain", [True, False])
def test_tangent_kernel_products_with_samlibs_own_layers(retain):
    objective, params = problem("cnn", chunk_size=4, retain_graph=retain)
    operator = TangentKernelOperator(objective, params)
    jacobian = dense_jacobian(objective, params)
    assert operator.shape == (36, 36)
    torch.testing.assert_close(dense(operator), 2 / 36 * jacobian @ jacobian.T)


def test_losses_and_outputs_without_curvature():
    x, params = torch.randn(5, 3, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    model = nn.Linear(3, 1, dtype=torch.float64)
    linear = Objective(model, lambda f, y: (f - y).mean(), x, torch.zeros(5, 1).double(), check=False)
    assert torch.equal(GaussNewtonOperator(linear, params) @ params, torch.zeros(4).double())

    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.unused = nn.Parameter(torch.ones(4, dtype=torch.float64))

        def forward(self, x):
            return x

    constant = Objective(Constant(), mean_squared_error, x, torch.zeros(5, 3).double(), check=False)
    assert torch.equal(GaussNewtonOperator(constant, params) @ params, torch.zeros(4).double())
    assert torch.equal(TangentKernelOperator(constant, params) @ torch.ones(15).double(), torch.zeros(15).double())


def test_the_tangent_kernel_refuses_other_losses():
    objective, params = problem("transformer")
    with pytest.raises(ValueError, match="needs squared error"):
        TangentKernelOperator(objective, params)
