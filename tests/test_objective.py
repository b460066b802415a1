import pytest
import torch
from torch import nn

from samlib import HessianOperator, Objective
from samlib.objective import compiled_kernel, flatten_parameters

from .conftest import PROBLEMS, WithBatchNorm, needs_compiler, problem


def plain_loss(objective, params):
    """The loss of an ordinary module that carries the parameters, all examples at once."""
    torch.nn.utils.vector_to_parameters(params, objective.model.parameters())
    return objective.loss(objective.model(objective.inputs), objective.targets)


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("chunk_size", [None, 1, 4])
def test_value_and_gradient_are_those_of_the_module(name, chunk_size):
    objective, params = problem(name, chunk_size=chunk_size)
    value, gradient = objective.value_and_gradient(params)
    loss = plain_loss(objective, params)
    loss.backward()
    expected = torch.cat([p.grad.reshape(-1) for p in objective.model.parameters()])
    torch.testing.assert_close(value, loss.detach())
    torch.testing.assert_close(objective.value(params), loss.detach())
    torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(objective.gradient(params), expected)


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize(("chunk_size", "retain"), [(None, True), (4, True), (4, False)])
def test_hessian_products_equal_finite_differences_and_are_symmetric(name, chunk_size, retain):
    objective, params = problem(name, chunk_size=chunk_size, retain_graph=retain)
    operator = HessianOperator(objective, params)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        u, v = torch.randn(2, objective.size, dtype=torch.float64, generator=generator)
        u, v = u / u.norm(), v / v.norm()
        step = 1e-6
        difference = (objective.gradient(params + step * v) - objective.gradient(params - step * v)) / (2 * step)
        torch.testing.assert_close(operator @ v, difference, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(u @ (operator @ v), v @ (operator @ u))
    assert operator.matvecs == 9
    torch.testing.assert_close(operator.value, objective.value(params))
    torch.testing.assert_close(operator.gradient, objective.gradient(params))


def test_dense_hessian_of_a_linear_model_in_closed_form():
    # ℓ = mean over examples and outputs of (x·w − y)²: H = 2/(N·K) · I_K ⊗ XᵀX.
    torch.manual_seed(0)
    x, y = torch.randn(7, 3, dtype=torch.float64), torch.randn(7, 2, dtype=torch.float64)
    model = nn.Linear(3, 2, bias=False, dtype=torch.float64)
    objective = Objective(model, lambda a, b: (a - b).square().mean(), x, y, chunk_size=2)
    operator = HessianOperator(objective, flatten_parameters(model))
    dense = torch.stack([operator @ e for e in torch.eye(6, dtype=torch.float64)])
    torch.testing.assert_close(dense, 2 / 14 * torch.kron(torch.eye(2, dtype=torch.float64), x.T @ x))


@needs_compiler
def test_a_compiled_kernel_gives_the_same_value_and_gradient():
    objective, params = problem("mlp")
    kernel = compiled_kernel(objective.model, objective.loss)
    compiled = Objective(
        objective.model, objective.loss, objective.inputs, objective.targets, chunk_size=8, kernel=kernel
    )
    for w in (params, params + 0.1):
        for got, expected in zip(compiled.value_and_gradient(w), objective.value_and_gradient(w), strict=True):
            torch.testing.assert_close(got, expected)
    torch.testing.assert_close(HessianOperator(compiled, params) @ params, HessianOperator(objective, params) @ params)


def test_a_linear_loss_has_no_hessian():
    model = nn.Linear(3, 1, dtype=torch.float64)
    x = torch.randn(5, 3, dtype=torch.float64)
    objective = Objective(model, lambda a, b: (a - b).mean(), x, torch.zeros(5, 1, dtype=torch.float64))
    operator = HessianOperator(objective, flatten_parameters(model))
    assert (operator @ torch.ones(4, dtype=torch.float64)).abs().max() == 0


def test_the_module_is_left_alone():
    objective, params = problem("mlp")
    before = flatten_parameters(objective.model)
    objective.gradient(params)
    HessianOperator(objective, params) @ params
    assert torch.equal(before, flatten_parameters(objective.model))
    assert all(p.grad is None for p in objective.model.parameters())


def test_layers_that_make_the_loss_random_are_refused():
    x, y = torch.randn(6, 3), torch.randn(6, 2)
    model = WithBatchNorm()
    with pytest.raises(ValueError, match=r"module '1' \(BatchNorm1d\) is in training mode"):
        Objective(model, nn.functional.mse_loss, x, y)
    Objective(model.eval(), nn.functional.mse_loss, x, y)
    with pytest.raises(ValueError, match="Dropout"):
        Objective(nn.Sequential(nn.Linear(3, 2), nn.Dropout()), nn.functional.mse_loss, x, y)
    with pytest.raises(ValueError, match="as many targets as inputs"):
        Objective(model, nn.functional.mse_loss, x, y[:3])


class KeepsItsWeights(nn.Module):
    """Computes its weights once after a switch of mode, as modules do that are merged for use."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, dtype=torch.float64))
        self.kept = None

    def train(self, mode=True):
        self.kept = None
        return super().train(mode)

    def forward(self, x):
        if self.kept is None:
            self.kept = torch.tanh(self.weight)
        return x @ self.kept.T


def small_data():
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(9, n, dtype=torch.float64, generator=generator) for n in (3, 4))


def test_tensors_that_modules_keep_do_not_outlive_an_evaluation():
    x, y = small_data()
    model = KeepsItsWeights()
    objective = Objective(model, nn.functional.mse_loss, x, y)
    assert model.kept is None
    for w in (flatten_parameters(model), torch.ones(12, dtype=torch.float64)):
        weights = w.view(4, 3).requires_grad_()
        loss = nn.functional.mse_loss(x @ torch.tanh(weights).T, y)
        expected = torch.autograd.grad(loss, weights)[0].flatten()
        torch.testing.assert_close(objective.value(w.detach()), loss.detach())
        torch.testing.assert_close(objective.gradient(w.detach()), expected)
    assert model.kept is None


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
@pytest.mark.parametrize("how", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_what_a_hook_makes_of_the_weights_is_put_back(how):
    x, y = small_data()
    model = nn.Sequential(how(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 4)).double().eval()
    model(x)
    before = model[0].weight.detach().clone()
    objective = Objective(model, nn.functional.mse_loss, x, y)
    objective.value(flatten_parameters(model) + 1)
    assert torch.equal(model[0].weight, before)


def test_modes_are_those_of_the_construction():
    x, y = small_data()
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 4)).double().eval()
    objective = Objective(model, nn.functional.mse_loss, x, y)
    w = flatten_parameters(model)
    expected, mean = objective.value(w), model[1].running_mean.clone()
    model.train()
    assert torch.equal(objective.value(w), expected)
    assert torch.equal(model[1].running_mean, mean)
    assert all(module.training for module in model.modules())


def test_a_hessian_stays_where_it_was_taken():
    """The module goes on training: its running statistics and its other layers move."""
    x, y = small_data()
    for retain in (True, False):
        for block in (None, ["0"]):
            model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)).double().eval()
            objective = Objective(model, nn.functional.mse_loss, x, y, retain_graph=retain, parameters=block)
            operator = HessianOperator(objective, flatten_parameters(model, block))
            vector = torch.linspace(-1, 1, objective.size, dtype=torch.float64)
            expected = operator @ vector
            model.train()(x)
            with torch.no_grad():
                model[2].weight.add_(1.0)
            torch.testing.assert_close(operator @ vector, expected, rtol=1e-12, atol=0)


def test_what_is_no_vector_of_parameters_is_refused():
    objective, params = problem("mlp")
    calls = (objective.value, objective.gradient, lambda w: HessianOperator(objective, w))
    for call in calls:
        with pytest.raises(TypeError, match="params must be a vector"):
            call(params.numpy())
        with pytest.raises(ValueError, match="in float64"):
            call(params.float())
    with pytest.raises(TypeError, match=r"torch\.func"):
        torch.func.grad(objective.value)(params)
    with pytest.raises(TypeError, match=r"torch\.func"):
        torch.vmap(objective.gradient)(torch.stack([params, params]))
    with pytest.raises(TypeError, match="as_linear_operator"):
        HessianOperator(objective, params) @ params.numpy()
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module"):
        Objective(lambda x: x, nn.functional.mse_loss, *small_data())
    with pytest.raises(TypeError, match="chunk_size must be a whole number"):
        Objective(nn.Linear(3, 4).double(), nn.functional.mse_loss, *small_data(), chunk_size=4.0)
