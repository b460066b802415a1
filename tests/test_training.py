import random
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pandas as pd
import psutil
import pytest
import torch

from samlib import (
    MLP,
    SAM,
    HessianOperator,
    RunStore,
    gd_edge,
    sam_edge,
    sam_step,
    top_eigenpairs,
    train,
    train_grid,
    trajectory,
)
from samlib.experiments import cross_entropy, mean_squared_error
from samlib.experiments.task import Task
from samlib.observables import measure
from samlib.training import OutOfTime

from .conftest import ROOT, needs_compiler, small_config, small_language_config

RECORDED = {
    "loss": [0.1253677588, 0.09032041029, 0.08257662597],
    "grad_norm": [0.1626363419, 0.057241408, 0.04016357516],
    "operator_norm": [0.8460602965, 0.7060557031, 0.6794355281],
}
CONFIGS = {"full batch": small_config, "mini-batches": small_language_config}


def values(run):
    """Measurements without the wall clock."""
    return run.measurements.drop(columns=[c for c in run.measurements if c.endswith("seconds")])


def test_the_loop_trains_as_a_plain_pytorch_loop_does():
    config = small_config(dtype="float64", steps=20, measure_every=5)
    run = train(config)
    dataset = config.load_dataset()
    torch.manual_seed(config.seed)
    model = MLP(64, 16, 3).double()
    optimizer = SAM(model.parameters(), rho=config.rho, lr=config.learning_rate)
    x, y = dataset.train_inputs.double(), dataset.train_targets.double()

    def closure():
        optimizer.zero_grad()
        loss = mean_squared_error(model(x), y)
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure).detach()) for _ in range(21)]
    np.testing.assert_allclose(run.measurements.loss, losses[::5], rtol=1e-6)  # float32 initial weights


def test_each_row_agrees_with_a_dense_hessian():
    config = small_config(dtype="float64", width=4, depth=2, eigenvalues=3, tolerance=1e-8, steps=10, measure_every=10)
    run = train(config)
    experiment = Task(config)
    w = experiment.initial_parameters()
    objective = experiment.objective(0)
    hessian = torch.autograd.functional.hessian(lambda w: sum(objective.chunk_losses(w)), w)
    eigenvalues, vectors = torch.linalg.eigh(hessian)
    grad = objective.gradient(w)
    sam_grad = objective.gradient(w + config.rho * grad / (grad.norm() + 1e-5))
    row = run.measurements.iloc[0]
    for i in range(3):
        assert row[f"eigenvalue_{i + 1}"] == pytest.approx(float(eigenvalues[-1 - i]), rel=1e-6)
    assert abs(row.smallest_eigenvalue - float(eigenvalues[0])) <= row.smallest_residual
    principal = vectors[:, eigenvalues.abs().argmax()]
    assert row.operator_norm == pytest.approx(float(eigenvalues.abs().max()), rel=1e-6)
    assert row.grad_norm == pytest.approx(float(grad.norm()))
    assert row.sam_grad_norm == pytest.approx(float(sam_grad.norm()))
    assert row.grad_alignment == pytest.approx(float((grad @ principal).abs() / grad.norm()), abs=1e-6)
    assert row.sam_grad_alignment == pytest.approx(float((sam_grad @ principal).abs() / sam_grad.norm()), abs=1e-6)
    assert row.gd_edge == gd_edge(0.3)
    assert row.sam_edge == pytest.approx(sam_edge(row.grad_norm + 1e-5, 0.3, 0.1))
    assert row.edge_ratio == pytest.approx(row.operator_norm / row.sam_edge)


def test_the_test_metric_is_the_fraction_of_wrong_labels_or_the_mean_loss():
    config = small_config()
    experiment = Task(config)
    params = experiment.initial_parameters()
    outputs = experiment.model(experiment.dataset.test_inputs).argmax(1)
    wrong = (outputs != experiment.dataset.test_targets).float().mean().item()
    assert experiment.test_metric(params) == pytest.approx(wrong)
    config = small_language_config()
    experiment = Task(config)
    inputs, targets = experiment.dataset.test_inputs, experiment.dataset.test_targets
    expected = cross_entropy(experiment.model(inputs), targets).item()
    assert experiment.test_metric(experiment.initial_parameters()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", CONFIGS)
def test_tracked_values_are_those_of_a_cold_start(kind):
    """Warm starts along a run hide no eigenvalue: at each measured step an independent solve finds the same norm."""
    config = CONFIGS[kind](steps=40, measure_every=10)
    rows = train(config).measurements.set_index("step")
    experiment = Task(config)
    w = experiment.initial_parameters()
    for step in range(41):
        if step in rows.index:
            operator = HessianOperator(experiment.objective(step), w)
            cold = top_eigenpairs(operator, 1, "LM", tol=1e-4)
            assert rows.operator_norm[step] == pytest.approx(cold.values.abs().item(), rel=2e-3)
        w = sam_step(experiment.objective(step).gradient, w, config.learning_rate, config.rho)


def test_gradient_descent_has_the_gd_edge():
    run = train(small_config(rho=0))
    assert (run.measurements.sam_edge == gd_edge(0.3)).all()
    assert (run.measurements.sam_grad_norm == run.measurements.grad_norm).all()
    assert run.provenance["gradients"] == 30


def test_measuring_does_not_change_the_path():
    often, rarely = (train(small_config(measure_every=n)).last for n in (1, 30))
    assert often.loss == rarely.loss
    assert often.grad_norm == rarely.grad_norm


def test_first_and_last_points_are_measured_and_eigenvalues_counted():
    run = train(small_config(steps=25, measure_every=10, eigenvalues=3))
    assert run.measurements.step.tolist() == [0, 10, 20, 25]
    assert {"eigenvalue_1", "eigenvalue_2", "eigenvalue_3"} <= set(run.measurements)
    assert (run.measurements.eigenvalue_1 >= run.measurements.eigenvalue_2).all()


def test_mini_batches_differ_by_step_and_cover_an_epoch():
    config = small_language_config()
    experiment = Task(config)
    batches = [experiment.objective(step).inputs for step in range(12)]
    seen, times = torch.cat(batches).unique(dim=0, return_counts=True)
    for sequence, count in zip(seen, times, strict=True):  # a sequence may occur several times in the text itself
        assert count <= (experiment.dataset.train_inputs == sequence).all(1).sum()
    assert times.sum() == 96
    assert not torch.equal(batches[0], experiment.objective(12).inputs)
    assert torch.equal(batches[3], experiment.objective(3).inputs)
    with pytest.raises(ValueError, match="batch_size must be at most the 100 training examples, got 200"):
        train(small_language_config(batch_size=200))


def test_mini_batch_runs_also_measure_a_larger_batch():
    run = train(small_language_config())
    wider = run.measurements.eval_operator_norm
    assert wider.notna().tolist() == [i % 4 == 0 for i in range(len(wider))]
    assert run.last.test_metric > 0


def test_a_diverging_run_is_a_result(store):
    run = train(small_config(learning_rate=1000.0, rho=0.0), store)
    assert run.outcome == "diverged"
    assert 0 < run.last.step <= 30
    assert np.isnan(run.last.operator_norm)
    assert "diverged at step" in str(run)
    assert values(train(small_config(learning_rate=1000.0, rho=0.0), store)).equals(values(run))


def test_a_finished_run_is_loaded_not_trained(store, monkeypatch):
    run = train(small_config(), store)

    def forbidden(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr("samlib.training.Trajectory", forbidden)
    again = train(small_config(), store)
    pd.testing.assert_frame_equal(again.measurements, run.measurements)


@pytest.mark.parametrize("kind", CONFIGS)
def test_stopping_at_a_deadline_and_continuing_changes_nothing(kind, store):
    config = CONFIGS[kind]()
    with pytest.raises(OutOfTime):
        train(config, store, deadline=0.0)
    stops = 0
    while True:
        try:
            run = train(config, store, deadline=0.0)
            break
        except OutOfTime:
            stops += 1
    assert stops == config.steps - 1
    assert values(run).equals(values(train(config)))


SCRIPT = """
import sys
from samlib import RunStore, train, trajectory
from tests.conftest import small_config, small_language_config
trajectory.CHECKPOINT_SECONDS = 0.0
config = {config}
def report(config, row):
    print(int(row["step"]), flush=True)
train(config, RunStore(sys.argv[1]), report)
print("done", flush=True)
"""


@pytest.mark.parametrize(
    "config",
    ["small_config(steps=60, measure_every=2)", "small_language_config(steps=40, measure_every=2)"],
)
def test_killed_at_random_moments_and_continued_bit_for_bit(config, store):
    """SIGKILL after a random number of further measurements, five times; then let it finish."""
    randomness = random.Random(config)
    started = []
    for attempt in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT.format(config=config), str(store.path)],
            cwd=ROOT, stdout=subprocess.PIPE, encoding="utf-8",
        )  # fmt: skip
        lines = []
        limit = randomness.randint(1, 4) if attempt < 5 else None
        for line in process.stdout:
            lines.append(line.strip())
            if len(lines) == limit:
                process.send_signal(signal.SIGKILL)
                break
        process.stdout.close()
        process.wait()
        started.append(lines[0])
    assert lines[-1] == "done"
    assert started == sorted(started, key=int)  # each continued where the one before had been, none from scratch
    assert int(started[-1]) > 0
    expected = eval(config, {"small_config": small_config, "small_language_config": small_language_config})
    undisturbed = train(expected)
    assert values(store.load(undisturbed.id)).equals(values(undisturbed))


def test_two_processes_asked_for_one_run_train_it_once(store):
    script = textwrap.dedent(
        """
        import sys
        from samlib import RunStore, train
        from tests.conftest import small_config
        steps = []
        train(small_config(steps=200, measure_every=1), RunStore(sys.argv[1]), lambda c, row: steps.append(row))
        print(len(steps))
        """
    )
    both = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(store.path)],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="utf-8",
        )
        for _ in range(2)
    ]  # fmt: skip
    counts = sorted(int(process.communicate()[0]) for process in both)
    assert counts == [0, 201]


def test_a_grid_in_processes_equals_one_after_the_other(store, tmp_path):
    torch.set_num_threads(1)
    configs = [small_config(rho=rho, seed=seed) for rho in (0.0, 0.1) for seed in (0, 1)]
    seen = []
    alone = train_grid(configs, store, jobs=1, progress=lambda config, row: seen.append(config))
    assert set(seen) == set(configs)
    done = []
    beside = train_grid(configs, RunStore(tmp_path / "other"), jobs=2, done=lambda run: done.append(run.id))
    assert [run.id for run in beside] == [run.id for run in alone] == done
    for first, second in zip(alone, beside, strict=True):
        pd.testing.assert_frame_equal(values(first), values(second), rtol=1e-3)
    assert train_grid([small_config(seed=9)], store, time_budget=1e-9) == []


def test_processes_that_train_for_another_end_when_that_one_is_killed(store):
    script = """
import sys
from samlib import RunStore, train_grid
from tests.conftest import small_config
train_grid([small_config(seed=seed, steps=10**6) for seed in (0, 1)], RunStore(sys.argv[1]), jobs=2)
"""
    process = subprocess.Popen([sys.executable, "-c", script, str(store.path)], cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(store.path.glob("*/checkpoint.pt"))) < 2:  # both are training
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    started = psutil.Process(process.pid).children(recursive=True)
    assert len(started) >= 2
    process.kill()
    process.wait()
    assert psutil.wait_procs(started, timeout=60)[1] == []


def test_cuda_where_there_is_none_is_refused(store, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device='cuda' was asked for, but PyTorch sees no CUDA device"):
        train(small_config(device="cuda"), store)
    assert not store.path.exists()


def test_the_trajectory_is_the_recorded_one():
    """A fixed run in float64: a change of the training path or of a measurement shows here."""
    run = train(small_config(dtype="float64", steps=20, measure_every=10, tolerance=1e-8))
    for name, expected in RECORDED.items():
        np.testing.assert_allclose(run.measurements[name], expected, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("settings", [{"learning_rate": 30.0, "rho": 0.0}, {"learning_rate": 12.0, "rho": 0.5}, {}])
def test_looking_at_the_loss_less_often_changes_no_record(settings, monkeypatch):
    """On a GPU each look waits for the device."""
    config = small_config(**settings, steps=60)
    often = train(config)
    monkeypatch.setattr(trajectory, "CHECK_EVERY", {"cpu": 50})
    seldom = train(config)
    assert often.outcome == seldom.outcome == ("diverged" if settings else "finished")
    pd.testing.assert_frame_equal(values(often), values(seldom), check_exact=True)


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
NETWORKS = {
    "mlp": small_config,
    "cnn": lambda **more: small_config(experiment="cifar10", learning_rate=0.02, width=4, examples=30, **more),
    "transformer": small_language_config,
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("network", NETWORKS)
def test_float32_sees_the_sharpness_of_float64(network, device):
    """At ten points of a trajectory, each from its own precision's measurement before, as in training."""
    config = NETWORKS[network](dtype="float64", tolerance=1e-6)
    exact = Task(config)
    rough = Task(NETWORKS[network](dtype="float32", device=device), config.load_dataset())
    params, memories = exact.initial_parameters(), ({}, {})
    for step in range(50):
        if step % 5 == 0:
            pair = []
            for i, experiment in enumerate((exact, rough)):
                w = params.to(rough.initial_parameters()) if experiment is rough else params
                row = measure(experiment, w, step, memories[i])
                pair.append(row["operator_norm"])
            assert pair[1] == pytest.approx(pair[0], rel=1e-3)
        params = sam_step(exact.objective(step).gradient, params, config.learning_rate, config.rho)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("network", NETWORKS)
def test_a_run_repeats_bit_for_bit_on_its_device(network, device):
    first, second = (train(NETWORKS[network](device=device, steps=10)) for _ in range(2))
    pd.testing.assert_frame_equal(values(first), values(second), check_exact=True)


@needs_compiler
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("network", NETWORKS)
def test_a_compiled_run_is_the_plain_one_up_to_rounding_and_repeats_bit_for_bit(network, device):
    # Of the CNN every step of SAM multiplies a difference by some 30, also one of rounding between two plain runs.
    steps = 3 if network == "cnn" else 10
    settings = {"device": device, "dtype": "float64", "steps": steps, "tolerance": 1e-6}
    plain, *twice = (train(NETWORKS[network](**settings, compiled=c)) for c in (False, True, True))
    assert plain.id == twice[0].id
    assert twice[0].config.compiled
    pd.testing.assert_frame_equal(values(twice[0]), values(twice[1]), check_exact=True)
    for name in ("loss", "grad_norm", "operator_norm", "sam_edge"):
        np.testing.assert_allclose(twice[0].measurements[name], plain.measurements[name], rtol=1e-6, err_msg=name)


@pytest.mark.gpu
def test_gpu_agrees_with_cpu():
    cpu, gpu = (train(small_config(device=d, dtype="float64", steps=10)) for d in ("cpu", "cuda"))
    np.testing.assert_allclose(cpu.measurements.operator_norm, gpu.measurements.operator_norm, rtol=1e-3)


def test_deadline_is_absolute_time():
    started = time.time()
    with pytest.raises(OutOfTime):
        train(small_config(), deadline=started - 1)
