"""What a run can be: modes, losses, paths, schedules, warm-up; each with a stop in the middle, and all together."""

import textwrap

import numpy as np
import pandas as pd
import pytest
import torch

from samlib import RunConfig, RunStore, train
from samlib.experiments.task import Task
from samlib.runs import load_published, publish
from samlib.trajectory import OutOfTime

from .conftest import small_config, small_language_config

NORMED = textwrap.dedent(
    """
    import torch
    from torch import nn

    def build(dropout: float = 0.0):
        draw = torch.Generator().manual_seed(0)
        x = torch.randn(80, 3, generator=draw)
        y = (x.sin().sum(1, keepdim=True) > 0).float()
        layers = [nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 1)]
        return {
            "model": nn.Sequential(*layers),
            "loss": lambda outputs, targets: (outputs - targets).square().mean(),
            "train": (x[:64], y[:64]),
            "test": (x[64:], y[64:]),
        }
    """
)


@pytest.fixture
def normed(tmp_path):
    path = tmp_path / "normed.py"
    path.write_text(NORMED, encoding="utf-8")

    def config(**settings):
        usual = {"learning_rate": 0.1, "rho": 0.05, "steps": 20, "measure_every": 5, "batch_size": 16}
        return RunConfig(experiment=str(path), **usual | settings)

    return config


def values(run):
    return run.measurements.drop(columns=[c for c in run.measurements if c.endswith("seconds")])


def in_pieces(config, folder):
    store = RunStore(folder)
    while True:
        try:
            return train(config, store, deadline=0.0)
        except OutOfTime:
            continue


def assert_same(first, second):
    pd.testing.assert_frame_equal(values(first), values(second), check_exact=True)
    assert (first.path is None) == (second.path is None)
    if first.path is not None:
        pd.testing.assert_frame_equal(first.path, second.path, check_exact=True)
    keys = ("gradients", "matvecs", "levels_not_reached")
    assert all(first.provenance.get(key) == second.provenance.get(key) for key in keys)


POWERS = {
    "levels": {"measure_at_losses": [0.12, 0.1, 0.095, 1e-6], "loss_every": 3},
    "stop": {"stop_at_loss": 0.1, "loss_every": 2},
    "path": {"path": ["loss", "grad_norm", "projection", "gradient_cosine"]},
    "test metric": {"test_every": 7},
    "one cycle": {"schedule": "one_cycle"},
    "cosine": {"schedule": "cosine", "momentum": 0.5},
    "warm-up": {"warmup_steps": 9},
    "mini-batches": {"batch_size": 20},
    "measured on all": {"batch_size": 20, "measure_on": "all"},
}


@pytest.mark.parametrize("power", POWERS)
def test_a_stop_in_the_middle_changes_nothing(power, tmp_path):
    config = small_config(**POWERS[power], steps=24, measure_every=6)
    assert_same(train(config), in_pieces(config, tmp_path / "store"))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_all_together_with_batch_normalisation(normed, dropout, tmp_path):
    config = normed(
        momentum=0.9, learning_rate=0.02, schedule="one_cycle", measure_on="all", dropout=dropout, steps=30,
        measure_at_losses=[0.22, 0.2, 0.18], loss_every=2, path=["loss", "projection"], test_every=10, warmup_steps=3,
    )  # fmt: skip
    whole = train(config)
    assert_same(whole, in_pieces(config, tmp_path / "store"))
    assert len(whole.path) == 30
    assert whole.path.test_metric.notna().sum() == 3


def test_levels_are_measured_where_the_full_loss_first_passes_them():
    config = small_config(measure_at_losses=[0.12, 0.1, 0.095, 1e-6], loss_every=3, steps=60, measure_every=60)
    run = train(config)
    rows = run.measurements
    dense = train(small_config(steps=60, measure_every=1)).measurements.loss
    looked_at = dense[dense.index % 3 == 0]
    for level in (0.12, 0.1, 0.095):
        [row] = rows[rows.loss_level == level].to_dict("records") or rows[rows.loss_level < level][:1].to_dict(
            "records"
        )
        assert row["step"] == looked_at.index[looked_at <= level][0]
    assert run.provenance["levels_not_reached"] == [1e-6]


def test_a_run_stops_at_a_loss_and_measures_there():
    run = train(small_config(stop_at_loss=0.1, loss_every=2, steps=60, measure_every=60))
    assert run.outcome == "finished"
    assert run.last.loss <= 0.1 < train(small_config(steps=int(run.last.step) - 2, measure_every=60)).last.loss
    assert run.last.step < 60
    assert np.isfinite(run.last.test_metric)


def test_the_path_is_what_the_steps_did():
    config = small_config(dtype="float64", path=["loss", "grad_norm", "gradient_cosine", "projection"], steps=9)
    config = config.model_copy(update={"measure_every": 4})
    run = train(config)
    every = train(small_config(dtype="float64", steps=9, measure_every=1)).measurements
    np.testing.assert_allclose(run.path.loss, every.loss[:9], rtol=1e-6)
    np.testing.assert_allclose(run.path.grad_norm, every.grad_norm[:9], rtol=1e-6)
    assert list(run.path.step) == list(range(9))
    assert run.path.projection[0] == run.path.projection[4] == run.path.projection[8] == 0
    assert (run.path.projection[[1, 2, 3]] != 0).all()
    # By hand, in the plain loop of the paper: projections on the principal eigenvector at step 0.
    task = Task(config)
    w0 = task.initial_parameters()
    hessian = torch.autograd.functional.hessian(lambda w: sum(task.everything().chunk_losses(w)), w0)
    lam, v = torch.linalg.eigh(hessian)
    v, w = v[:, lam.abs().argmax()], w0
    for step in range(3):
        g = task.everything().gradient(w)
        u = task.everything().gradient(w + 0.1 * g / (g.norm() + 1e-5))
        assert abs(run.path.projection[step]) == pytest.approx(abs(float((w - w0) @ v)), rel=1e-2, abs=1e-7)
        assert run.path.gradient_cosine[step] == pytest.approx(float(g @ u / g.norm() / u.norm()), rel=1e-5)
        w = w - 0.3 * u


def test_the_edge_follows_the_schedule():
    run = train(small_config(schedule="one_cycle", steps=20, measure_every=5))
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.3, total_steps=21, cycle_momentum=False)
    rates = []
    for _ in range(21):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step() if len(rates) < 21 else None
    np.testing.assert_allclose(run.measurements.gd_edge, 2 / np.array(rates)[::5], rtol=1e-12)


def test_warm_up_is_the_base_alone():
    warm = train(small_config(warmup_steps=10, steps=20, measure_every=10))
    plain = train(small_config(rho=0.0, steps=20, measure_every=10))
    assert warm.measurements.loss[1] == plain.measurements.loss[1]
    assert warm.measurements.edge[0] == plain.measurements.edge[0]
    assert warm.last.loss != plain.last.loss
    assert warm.provenance["gradients"] == 10 + 2 * 10


def test_buffers_move_once_a_step_and_at_w(normed):
    """As a plain loop does that freezes the statistics for SAM's second pass; measured in evaluation mode."""
    config = normed(steps=6, measure_every=6, measure_on="all")
    run, task = train(config), Task(config)
    model = task.training.model
    optimizer_params = list(model.parameters())
    for step in range(6):
        batch = task.objective(step)

        def gradient(freeze, batch=batch):
            running = {n: b.clone() for n, b in model.named_buffers()}
            loss = (model(batch.inputs) - batch.targets).square().mean()
            grads = torch.autograd.grad(loss, optimizer_params)
            if freeze:
                for name, buffer in model.named_buffers():
                    buffer.copy_(running[name])
            return grads

        grads = gradient(False)
        norm = torch.cat([g.flatten() for g in grads]).norm() + 1e-5
        saved = [p.detach().clone() for p in optimizer_params]
        with torch.no_grad():
            for p, g in zip(optimizer_params, grads, strict=True):
                p.add_(0.05 * g / norm)
        uphill = gradient(True)
        with torch.no_grad():
            for p, s, g in zip(optimizer_params, saved, uphill, strict=True):
                p.copy_(s - 0.1 * g)
    x, y = task.everything().inputs, task.everything().targets
    expected = float((model.eval()(x) - y).square().mean().detach())
    assert run.last.loss == pytest.approx(expected, rel=1e-4)


def test_a_network_without_modes_is_trained_on_what_is_measured():
    assert Task(small_config()).training is None
    assert Task(small_language_config()).training is None


def test_paths_are_published_beside_the_measurements(tmp_path):
    run = train(small_config(path=["loss"], steps=5))
    run.provenance["standin"] = False
    plain = train(small_config(rho=0.0, steps=5))
    plain.provenance["standin"] = False
    publish([run, plain], tmp_path / "x.parquet")
    loaded = {r.id: r for r in load_published(tmp_path / "x.parquet")}
    pd.testing.assert_frame_equal(loaded[run.id].path, run.path)
    assert loaded[plain.id].path is None
    publish([plain], tmp_path / "x.parquet")
    assert {r.id for r in load_published(tmp_path / "x.parquet") if r.path is not None} == {run.id}
