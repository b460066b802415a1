"""MNIST's network and loss as settings of a run: off by default, out of the identity then."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy.special import erf, log_softmax
from torch import nn
from typer.testing import CliRunner

from samlib import MLP, HessianOperator, RunConfig, published_runs, train
from samlib.cli import app
from samlib.experiments.task import Task
from samlib.figures import command

from .conftest import small_config

OFF = {"widths": (), "activation": "relu", "initial_weights": "glorot", "loss": "squared_error"}
FUNCTIONS = {
    "relu": lambda x: np.maximum(x, 0),
    "tanh": np.tanh,
    "gelu": lambda x: x * (1 + erf(x / np.sqrt(2))) / 2,
}


def test_defaults_leave_the_ids_as_they_are():
    config = small_config()
    assert small_config(**OFF).identity("f") == config.identity("f")
    for name, value in {
        "widths": "16,16",
        "activation": "tanh",
        "initial_weights": "pytorch",
        "loss": "cross_entropy",
    }.items():
        assert small_config(**{name: value}).identity("f") != config.identity("f"), name
    for run in published_runs("mnist")[:20]:
        assert run.config.identity(run.provenance["fingerprint"], run.record) == run.id


def test_widths_stand_in_place_of_width_and_depth():
    torch.manual_seed(0)
    usual = MLP(12, 8, 3, 4)
    torch.manual_seed(0)
    same = MLP(12, 1, 1, 4, widths=(8, 8))
    for a, b in zip(usual.parameters(), same.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    shapes = [tuple(p.shape) for p in MLP(12, widths=(7, 5), classes=4).parameters() if p.dim() == 2]
    assert shapes == [(7, 12), (5, 7), (4, 5)]


@pytest.mark.parametrize("activation", FUNCTIONS)
def test_outputs_are_those_of_numpy(activation):
    model = MLP(6, widths=(5, 4), classes=3, activation=activation).double()
    x = np.random.default_rng(0).normal(size=(7, 6))
    weights = [p.detach().numpy() for p in model.parameters()]
    value = x
    for i in range(0, 6, 2):
        value = value @ weights[i].T + weights[i + 1]
        value = FUNCTIONS[activation](value) if i < 4 else value
    np.testing.assert_allclose(model(torch.tensor(x)).detach().numpy(), value, rtol=1e-12)


def test_pytorch_weights_are_those_of_linear_layers():
    torch.manual_seed(3)
    model = MLP(30, widths=(20,), initial_weights="pytorch")
    torch.manual_seed(3)
    for layer in (model[1], model[3]):
        fresh = nn.Linear(layer.in_features, layer.out_features)
        assert torch.equal(layer.weight, fresh.weight)
        assert torch.equal(layer.bias, fresh.bias)


def test_cross_entropy_of_one_hot_targets():
    task = Task(small_config(loss="cross_entropy", dtype="float64"))
    objective = task.everything()
    w = task.initial_parameters()
    logits = objective.forward(w, objective.inputs).detach().numpy()
    by_hand = -(log_softmax(logits, axis=1) * objective.targets.numpy()).sum(1).mean()
    assert float(objective.value(w)) == pytest.approx(by_hand, rel=1e-12)


def test_products_are_differences_of_gradients_for_smooth_activations():
    for activation, loss in (("tanh", "squared_error"), ("gelu", "cross_entropy")):
        task = Task(small_config(activation=activation, loss=loss, widths="6,5", dtype="float64"))
        w, objective = task.initial_parameters(), task.everything()
        v = torch.randn(w.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        v /= v.norm()
        numeric = (objective.gradient(w + 1e-5 * v) - objective.gradient(w - 1e-5 * v)) / 2e-5
        torch.testing.assert_close(HessianOperator(objective, w) @ v, numeric, rtol=1e-6, atol=1e-8)


def test_a_run_with_all_of_them(store):
    config = small_config(widths=[12, 6], activation="gelu", loss="cross_entropy", initial_weights="pytorch")
    run = train(config, store)
    assert run.outcome == "finished"
    assert run.last.loss < run.measurements.loss[0]
    assert store.load(run.id).config == config
    assert "--set widths=12,6" in command(run)
    assert "--set activation=gelu" in command(run)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("activation", "swish", "'relu', 'tanh' or 'gelu'"),
        ("loss", "hinge", "'squared_error' or 'cross_entropy'"),
        ("initial_weights", "zeros", "'glorot' or 'pytorch'"),
        ("widths", "12,0", "greater than or equal to 1"),
        ("widths", "12,many", "valid integer"),
    ],
)
def test_what_is_not_known_is_refused(name, value, message, tmp_path):
    with pytest.raises(ValidationError, match=message):
        small_config(**{name: value})
    given = [
        "run",
        "mnist",
        "--learning-rate",
        "1",
        "--rho",
        "0",
        "--set",
        f"{name}={value}",
        "--store",
        tmp_path / "s",
    ]
    assert CliRunner().invoke(app, list(map(str, given))).exit_code == 2
    assert not (tmp_path / "s").exists()


def test_the_network_itself_refuses_too():
    with pytest.raises(ValueError, match="activation must be one of relu, tanh, gelu, got 'sine'"):
        MLP(activation="sine")
    with pytest.raises(ValueError, match="initial_weights must be glorot or pytorch, got 'ones'"):
        MLP(initial_weights="ones")


def test_other_experiments_do_not_take_them():
    with pytest.raises(ValidationError, match="activation belongs to the experiment mnist"):
        RunConfig(experiment="cifar10", learning_rate=0.1, rho=0, activation="tanh", data="standin")
