"""Any experiment × any rule × any observable: what a run is, and that the three know nothing of each other."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from pydantic import ValidationError

from samlib import RunConfig, RunStore, published_runs, train
from samlib.config import default_of, known_settings
from samlib.experiments import EXPERIMENTS, mean_squared_error
from samlib.experiments.task import Task
from samlib.hessian import HessianOperator
from samlib.observables import OBSERVABLES, Observable, measure
from samlib.optim import SAM
from samlib.rules import BASES, RULES, Rule
from samlib.settings import NonNegative, Settings
from samlib.trajectory import OutOfTime

from .conftest import small_config, small_language_config

# Rules and bases with the settings that a battery runs them at; a new entry is tested by standing here.
STEPS = {
    "gd": {"rho": 0.0},
    "sam": {},
    "usam": {"rule": "usam"},
    "heavy ball": {"rho": 0.0, "momentum": 0.9, "learning_rate": 0.05},
    "nesterov": {"rho": 0.0, "momentum": 0.9, "nesterov": True, "learning_rate": 0.05},
    "decay": {"rho": 0.0, "weight_decay": 0.01},
    "sam with momentum": {"momentum": 0.9, "learning_rate": 0.05},
    "adam": {"rho": 0.0, "base": "adam", "learning_rate": 0.003},
    "sam around adam": {"base": "adam", "learning_rate": 0.003},
    "graphsam": {"rule": "graphsam", "every": 3, "cache_beta": 0.9},
    "graphsam around adam": {"rule": "graphsam", "every": 4, "base": "adam", "learning_rate": 0.003},
    "frobenius_sam": {"rule": "frobenius_sam", "strength": 1.0, "rho": 0.01},
    "trace_sam": {"rule": "trace_sam", "strength": 1.0, "samples": 1, "paired": False, "rho": 0.01},
    "determinant_sam": {"rule": "determinant_sam", "strength": 1.0, "rho": 0.01},
    "published_determinant_sam": {"rule": "published_determinant_sam", "rho": 1.0},
    "layer_sam": {"rule": "layer_sam", "layers": ["1"]},
    "weights_sam": {"rule": "weights_sam"},
    "jacobian_sam": {"rule": "jacobian_sam"},
}
NETWORKS = {
    "mlp": small_config,
    "cnn": lambda **more: small_config(
        **{"experiment": "cifar10", "learning_rate": 0.02, "width": 4, "examples": 60, **more}
    ),
    "transformer": small_language_config,
}


def values(run):
    """Measurements without the wall clock."""
    return run.measurements.drop(columns=[c for c in run.measurements if c.endswith("seconds")])


def in_pieces(config, folder):
    """The run, stopped after each step and continued from its checkpoint by an object that knows nothing of before."""
    store = RunStore(folder)
    while True:
        try:
            return train(config, store, deadline=0.0)
        except OutOfTime:
            continue


def test_all_registered_rules_and_bases_are_tried():
    assert {s.get("rule", "sam") for s in STEPS.values()} == set(RULES)
    assert {s.get("base", "sgd") for s in STEPS.values()} == set(BASES)


@pytest.mark.parametrize("step", STEPS)
def test_a_run_in_pieces_is_the_whole_one_to_the_bit(step, tmp_path):
    config = small_config(**STEPS[step], steps=12, measure_every=5)
    whole, pieces = train(config), in_pieces(config, tmp_path / "store")
    pd.testing.assert_frame_equal(values(whole), values(pieces), check_exact=True)
    assert whole.provenance["gradients"] == pieces.provenance["gradients"]


def test_levels_of_the_loss_are_seen_with_the_statistics_of_their_step(tmp_path):
    """BatchNorm's running statistics move in each step: the look at the loss and the row must be of the same ones."""
    config = RunConfig(
        **{"experiment": "digits_on_cifar", "learning_rate": 0.05, "rho": 0.1, "data": "standin", "tile": 8},
        **{"classes": ["cat", "dog"], "images_per_class": 20, "batch_size": 8, "momentum": 0.0, "steps": 30},
        **{"measure_every": 1, "loss_every": 1, "measure_at_losses": [0.69, 0.6, 0.5], "observables": ["probes"]},
    )
    whole, pieces = train(config), in_pieces(config, tmp_path / "store")
    pd.testing.assert_frame_equal(values(whole), values(pieces), check_exact=True)
    rows = whole.measurements
    assert rows.loss_level.notna().sum() >= 2
    for level in rows.loss_level.dropna():
        assert rows.step[rows.loss <= level].iloc[0] == rows.step[rows.loss_level <= level].iloc[0]


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("step", ["gd", "sam"])
def test_measuring_does_not_change_the_path(network, step):
    """At measured steps the gradient comes with the Hessian's graph: it must be the plain one to the bit."""
    often, seldom = (NETWORKS[network](**STEPS[step], steps=12, measure_every=n) for n in (1, 12))
    often, seldom = train(often), train(seldom)
    for column in ("loss", "grad_norm", "sam_grad_norm", "test_metric"):
        assert often.last[column] == seldom.last[column]


@pytest.mark.parametrize("step", [name for name, s in STEPS.items() if s.get("rule", "sam") in ("sam", "usam")])
def test_a_step_is_that_of_the_optimizer_on_the_module(step):
    """The flat vector is stepped as PyTorch steps a module's own parameters."""
    config = small_config(**STEPS[step], dtype="float64", steps=8, measure_every=8)
    run, task = train(config), Task(config)
    model = task.model.train()
    base = BASES[config.base]
    options = {"lr": config.learning_rate, **base.options(config)}
    if config.sharpness_aware:
        normalize = {"normalize": False} if config.rule == "usam" else {}
        optimizer = SAM(model.parameters(), base.kind, rho=config.rho, **normalize, **options)
    else:
        optimizer = base.kind(model.parameters(), **options)
    x, y = task.everything().inputs, task.everything().targets

    def closure():
        optimizer.zero_grad()
        loss = mean_squared_error(model(x), y)
        loss.backward()
        return loss

    for _ in range(8):
        optimizer.step(closure)
    assert float(mean_squared_error(model(x), y).detach()) == pytest.approx(run.last.loss, rel=1e-9)


def test_the_rows_gradients_are_those_of_the_step():
    """Taken from the step where they are the same numbers, computed where they are not: the same row."""
    config = small_config(dtype="float64", tolerance=1e-8)
    task, params = Task(config), Task(config).initial_parameters()
    row = train(config).measurements.iloc[0]
    for name, value in measure(task, params).items():
        assert row[name] == pytest.approx(value, rel=1e-6), name


def test_every_published_id_recomputes():
    runs = [run for name in EXPERIMENTS for run in published_runs(name)]
    assert len(runs) > 100
    for run in runs:
        assert run.config.identity(run.provenance["fingerprint"], run.record) == run.id


def test_a_setting_at_its_default_is_the_run_without_it():
    base = small_config()
    for name in known_settings() - {"experiment", "learning_rate", "rho", "source"}:
        if name in base.model_dump() and name not in ("data", "compiled"):
            same = small_config(**{name: getattr(base, name)})
            assert same.identity("x") == base.identity("x"), name
    assert small_config(momentum=0.5).identity("x") != base.identity("x")
    assert default_of(base, "momentum") == 0.0


def test_rho_zero_is_the_base_alone_whatever_the_rule():
    plain = small_config(rho=0.0)
    for rho in (0, 0.0, -0.0, "0", "-0.0"):
        other = small_config(rule="usam", rho=rho)
        assert other == plain
        assert other.identity("x") == plain.identity("x")
        assert not other.sharpness_aware
    assert small_config(rule="usam").identity("x") != small_config().identity("x")
    assert small_config(rule="usam").sharpness_aware


class _Pull(Settings):
    pull: NonNegative = 0.1


class Towards(torch.optim.SGD):
    """Gradient descent that is also pulled towards the origin."""

    def __init__(self, params, lr, pull):
        super().__init__(params, lr=lr, weight_decay=pull)


def test_an_experiment_a_rule_and_an_observable_are_added_from_outside(monkeypatch):
    """Each is one entry; nothing else knows of it."""
    square = dataclasses.replace(
        EXPERIMENTS["mnist"],
        name="squares",
        model=lambda config, data: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)),
        settings=Settings,
        profiles={"quick": {"examples": 50, "steps": 4, "measure_every": 2}},
    )
    rule = Rule(
        "pulled",
        "pulled descent",
        lambda making: Towards(making.params, making.config.learning_rate, making.config.pull),
        _Pull,
        off=lambda config: config.pull == 0,
    )
    frobenius = Observable("frobenius", lambda point: {"frobenius": float((point.operator @ point.principal).norm())})
    monkeypatch.setitem(EXPERIMENTS, "squares", square)
    monkeypatch.setitem(RULES, "pulled", rule)
    monkeypatch.setitem(OBSERVABLES, "frobenius", frobenius)
    given = {"experiment": "squares", "learning_rate": 0.1, "rho": 0.1, "rule": "pulled", "data": "standin"}
    run = train(RunConfig(**given, pull=0.5, observables=["edge", "frobenius"]))
    np.testing.assert_allclose(run.measurements.frobenius, run.measurements.operator_norm, rtol=1e-2)
    assert run.config.pull == 0.5
    assert list(run.measurements.step) == [0, 2, 4]
    assert RunConfig(**given, pull=0).rule == "sam"
    with pytest.raises(ValidationError, match="width belongs to the experiment"):
        RunConfig(**given, width=3)
    with pytest.raises(ValidationError, match="pull belongs to the rule pulled; leave it out for experiment mnist"):
        small_config(pull=0.5)


def test_adam_is_measured_against_its_own_edge():
    """λ of the preconditioned Hessian with the state before the step: dense, on a small network."""
    config = small_config(
        rho=0.0, base="adam", learning_rate=0.01, dtype="float64", width=4, depth=2, steps=6, measure_every=3,
        tolerance=1e-8,
    )  # fmt: skip
    rows = train(config).measurements
    assert np.isnan(rows.edge[0])  # no state yet, no law
    assert np.isnan(rows.edge_ratio[0])
    task = Task(config)
    params = torch.nn.Parameter(task.initial_parameters())
    optimizer = torch.optim.Adam([params], lr=0.01)
    for step in range(6):
        if step == 3:
            v = optimizer.state[params]["exp_avg_sq"] / (1 - 0.999**step)
            scale = 1 / (v.sqrt() + 1e-8)
            operator = HessianOperator(task.everything(), params.detach())
            dense = torch.stack([operator @ e for e in torch.eye(len(params), dtype=torch.float64)])
            norm = torch.linalg.eigvalsh(scale.sqrt()[:, None] * dense * scale.sqrt()).abs().max()
        params.grad = task.everything().gradient(params.detach())
        optimizer.step()
    assert rows.preconditioned_norm[1] == pytest.approx(float(norm), rel=1e-6)
    assert rows.edge[1] == pytest.approx((2 + 2 * 0.9) / ((1 - 0.9) * 0.01))
    assert rows.edge_ratio[1] == pytest.approx(float(norm) / rows.edge[1], rel=1e-6)
