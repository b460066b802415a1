import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from samlib import MLP, Objective
from samlib import tangent as module
from samlib.experiments import mean_squared_error
from samlib.gauss_newton import GaussNewtonOperator
from samlib.objective import flatten_parameters
from samlib.tangent import _Jacobian, ntk_blocks, ntk_matrix, require_squared_error

from .conftest import problem
from .test_gauss_newton import dense, dense_jacobian


class Scaled(nn.Module):
    """A parameter that belongs to no linear layer."""

    def __init__(self):
        super().__init__()
        self.inner, self.scale = nn.Linear(5, 3), nn.Parameter(torch.tensor([1.0, 2.0, -0.5]))

    def forward(self, x):
        return self.inner(x) * self.scale


class Faint(nn.Module):
    """A parameter outside of the layer that hardly matters, and a layer called by keyword."""

    def __init__(self):
        super().__init__()
        self.inner, self.shift = nn.Linear(5, 3), nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.inner(input=x) + 1e-7 * self.shift


class Tied(nn.Module):
    """A layer that is called twice."""

    def __init__(self):
        super().__init__()
        self.inner, self.out = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.out(self.inner(torch.tanh(self.inner(x))))


class Bypassed(nn.Module):
    """A layer whose weights are used without calling it."""

    def __init__(self):
        super().__init__()
        self.inner, self.out = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.out(torch.tanh(x @ self.inner.weight.T))


class Residual(nn.Module):
    """Works in place on what linear layers have returned."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.out = nn.Linear(5, 5), nn.Linear(5, 5, bias=False), nn.Linear(5, 3)

    def forward(self, x):
        x = self.first(x).relu_()
        return self.out(self.second(x).add_(x)).view(-1, 3)


class Tokens(nn.Module):
    """Linear layers on sequences, and outputs that are matrices."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(5, 3)

    def forward(self, x):
        return torch.tanh(self.inner(torch.stack([x, 2 * x.flip(1)], 1)))


BY_LAYERS = {
    "mlp": lambda: MLP(5, 6, 3, 3),
    "without bias": lambda: nn.Sequential(nn.Linear(5, 4, bias=False), nn.Tanh(), nn.Linear(4, 3, bias=False)),
    "in place": lambda: nn.Sequential(nn.Linear(5, 4), nn.ReLU(inplace=True), nn.Linear(4, 3), nn.Tanh()),
    "residual": Residual,
    "one output": lambda: nn.Sequential(nn.Linear(5, 1), nn.Flatten(0)),
}
BY_OUTPUTS = {"scaled": Scaled, "faint": Faint, "tied": Tied, "bypassed": Bypassed, "tokens": Tokens}


def objective_of(make, examples=9, seed=0, dtype=torch.float64, **settings):
    torch.manual_seed(seed)
    model = make().to(dtype)
    x = torch.randn(examples, 5, dtype=dtype)
    y = torch.randn_like(model(x))
    params = flatten_parameters(model)
    params = params + 0.3 * torch.randn_like(params)
    return Objective(model, mean_squared_error, x, y, **settings), params


def expected_matrix(objective, params):
    jacobian = dense_jacobian(objective, params)
    return 2 / len(jacobian) * jacobian @ jacobian.T


def expected_blocks(objective, params):
    """N times the blocks on the diagonal."""
    theta, examples = expected_matrix(objective, params), len(objective.inputs)
    outputs = len(theta) // examples
    return examples * torch.stack([theta[i : i + outputs, i : i + outputs] for i in range(0, len(theta), outputs)])


@pytest.mark.parametrize("name", [*BY_LAYERS, *BY_OUTPUTS])
@pytest.mark.parametrize("settings", [{}, {"chunk_size": 4}, {"retain_graph": False, "chunk_size": 1}])
def test_kernel_is_that_of_the_dense_jacobian(name, settings):
    objective, params = objective_of((BY_LAYERS | BY_OUTPUTS)[name], **settings)
    before = flatten_parameters(objective.model)
    blocks, matrix = ntk_blocks(objective, params), ntk_matrix(objective, params)
    assert blocks.dtype == matrix.dtype == torch.float64
    torch.testing.assert_close(matrix, expected_matrix(objective, params))
    torch.testing.assert_close(blocks, expected_blocks(objective, params))
    assert torch.equal(matrix, matrix.T)
    assert torch.equal(before, flatten_parameters(objective.model))
    assert not any(m._forward_hooks for m in objective.model.modules())


@pytest.mark.parametrize("name", ["cnn", "transformer"])
def test_networks_with_samlibs_own_layers(name):
    objective, params = problem(name)
    with torch.no_grad():
        targets = torch.randn_like(objective.forward(params, objective.inputs))
    objective = Objective(objective.model, mean_squared_error, objective.inputs[:3], targets[:3])
    torch.testing.assert_close(ntk_matrix(objective, params), expected_matrix(objective, params))
    torch.testing.assert_close(ntk_blocks(objective, params), expected_blocks(objective, params))


@pytest.mark.parametrize(("kinds", "way"), [(BY_LAYERS, "_by_layers"), (BY_OUTPUTS, "_by_outputs")])
def test_which_networks_are_seen_through_their_layers(kinds, way):
    """It is what keeps the trace at the price of a few gradients."""
    for make in kinds.values():
        objective, params = objective_of(make)
        assert _Jacobian(objective, params, require_squared_error(objective, params))._factors.__name__ == way


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 8), st.integers(0, 1000), st.sampled_from([*BY_LAYERS, *BY_OUTPUTS]))
def test_trace_and_permutation_of_the_examples(examples, seed, name):
    objective, params = objective_of((BY_LAYERS | BY_OUTPUTS)[name], examples, seed)
    blocks, matrix = ntk_blocks(objective, params), ntk_matrix(objective, params)
    trace = float(blocks.diagonal(dim1=1, dim2=2).sum(1).mean())
    assert trace == pytest.approx(float(matrix.trace()), rel=1e-10)
    assert trace == pytest.approx(float(dense(GaussNewtonOperator(objective, params)).trace()), rel=1e-10)
    order = torch.randperm(examples)
    shuffled = Objective(objective.model, mean_squared_error, objective.inputs[order], objective.targets[order])
    rows = torch.arange(len(matrix)).view(examples, -1)[order].flatten()
    torch.testing.assert_close(ntk_matrix(shuffled, params), matrix[rows][:, rows], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(ntk_blocks(shuffled, params), blocks[order], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["mlp", "tied"])
def test_little_memory_means_more_chunks_and_the_same_kernel(name, monkeypatch):
    objective, params = objective_of((BY_LAYERS | BY_OUTPUTS)[name], examples=11)
    whole = ntk_matrix(objective, params)
    monkeypatch.setattr(module, "MOST_BYTES", 2 * 8 * 3 * objective.size)
    assert _Jacobian(objective, params, 3).length < 11
    torch.testing.assert_close(ntk_matrix(objective, params), whole)
    torch.testing.assert_close(ntk_blocks(objective, params), expected_blocks(objective, params))


def test_a_network_in_single_precision_has_its_matrix_in_double():
    objective, params = objective_of(BY_LAYERS["mlp"], dtype=torch.float32)
    double = Objective(
        copy.deepcopy(objective.model).double(), mean_squared_error, objective.inputs.double(), objective.targets
    )
    expected = expected_matrix(double, params.double())
    torch.testing.assert_close(ntk_matrix(objective, params), expected, rtol=1e-12, atol=1e-12)
    blocks = ntk_blocks(objective, params)
    torch.testing.assert_close(blocks, expected_blocks(double, params.double()), rtol=1e-5, atol=1e-5)
    assert objective.model[1].weight.dtype == torch.float32


@pytest.mark.parametrize(
    "loss",
    [
        lambda f, y: (f - y).square().mean() / 2,
        lambda f, y: (f - y).square().sum(),
        lambda f, y: (f - y).square().sum(-1).mean(),
        lambda f, y: (f - y).abs().mean(),
        lambda f, y: (f - y).square().mean() + f.square().mean(),
        lambda f, y: 2 * nn.functional.huber_loss(f, y, delta=8.0),  # the same for residuals below 8
        nn.functional.cross_entropy,
        lambda f, y: y.mean(),
    ],
)
@pytest.mark.parametrize("interpolates", [False, True])
def test_other_losses_are_refused(loss, interpolates):
    """Also where the residual is zero, and with it the derivative of most losses."""
    objective, params = objective_of(BY_LAYERS["mlp"])
    targets = objective.forward(params, objective.inputs) if interpolates else objective.targets
    other = Objective(objective.model, loss, objective.inputs, targets, check=False)
    for call in (ntk_blocks, ntk_matrix, require_squared_error):
        with pytest.raises(ValueError, match="needs squared error, the mean over examples and outputs"):
            call(other, params)
    same = Objective(objective.model, nn.functional.mse_loss, objective.inputs, targets)
    assert require_squared_error(same, params) == 3


def test_targets_of_another_shape_are_refused():
    objective, params = problem("transformer")
    with pytest.raises(ValueError, match=r"outputs shaped \(6, 11\) and targets shaped \(6,\)"):
        ntk_blocks(objective, params)


def test_outputs_that_are_not_finite_are_an_error():
    objective, params = objective_of(BY_LAYERS["mlp"])
    with pytest.raises(FloatingPointError, match="outputs are not finite"):
        ntk_matrix(objective, params * float("inf"))


def test_what_would_not_fit_is_refused_with_its_size(monkeypatch):
    model, x = nn.Linear(2, 10), torch.zeros(401, 2)
    objective = Objective(model, mean_squared_error, x, torch.zeros(401, 10))
    with pytest.raises(ValueError, match=r"401 examples × 10 outputs has 4,010 rows \(0.1 GB\).* take 400 examples"):
        ntk_matrix(objective, flatten_parameters(model))
    monkeypatch.setattr(module, "MOST_BYTES", 8 * 401 * 100 - 1)
    with pytest.raises(ValueError, match="401 blocks of 10 × 10 numbers need"):
        ntk_blocks(objective, flatten_parameters(model))
    objective, params = objective_of(BY_OUTPUTS["tied"])
    monkeypatch.setattr(module, "MOST_BYTES", 8 * 3 * objective.size - 1)
    with pytest.raises(ValueError, match="derivatives of 3 outputs by 48 parameters"):
        ntk_matrix(objective, params)
