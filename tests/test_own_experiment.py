"""A reader's own experiment: a Python file in place of a name."""

import json
import textwrap

import pytest
import torch
from typer.testing import CliRunner

from samlib import RunConfig, RunStore, train
from samlib.cli import app

TASK = textwrap.dedent(
    """
    import torch
    from torch import nn

    def build(width: int = 8, noise: float = 0.1):
        draw = torch.Generator().manual_seed(0)
        x = torch.randn(60, 3, generator=draw)
        y = x.sin().sum(1, keepdim=True) + noise * torch.randn(60, 1, generator=draw)
        return {
            "model": nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 1)),
            "loss": lambda outputs, targets: (outputs - targets).square().mean(),
            "train": (x[:40], y[:40]),
            "test": (x[40:], y[40:]),
            "metric": lambda outputs, targets: (outputs - targets).abs().max(),
        }
    """
)


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "my_task.py"
    path.write_text(TASK, encoding="utf-8")
    return path


def call(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def test_a_file_is_trained_from_the_command_line(own, tmp_path):
    command = ("run", own, "--learning-rate", 0.1, "--rho", 0.05, "--steps", 20, "--store", tmp_path / "runs", "--json")
    result = call(*command)
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["status"] == "finished"
    assert record["config"]["width"] == 8
    run = RunStore(tmp_path / "runs").load(record["id"])
    namespace = {}
    exec(TASK, namespace)
    parts = namespace["build"]()
    config = run.config
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model = namespace["build"]()["model"]
    first = float(parts["loss"](model(parts["train"][0]), parts["train"][1]).detach())
    assert run.measurements.loss[0] == pytest.approx(first, rel=1e-6)
    assert json.loads(call(*command).stdout)["id"] == record["id"]
    other = call(*command[:-2], tmp_path / "runs", "--set", "width=9", "--json")
    assert json.loads(other.stdout)["id"] != record["id"]


def test_its_source_and_its_data_enter_the_identity_and_its_folder_does_not(own, tmp_path):
    def identity(path, **settings):
        config = RunConfig(experiment=str(path), learning_rate=0.1, rho=0.0, **settings)
        return config.identity(config.load_dataset().fingerprint)

    first = identity(own)
    elsewhere = tmp_path / "elsewhere" / own.name
    elsewhere.parent.mkdir()
    elsewhere.write_text(TASK, encoding="utf-8")
    assert identity(elsewhere) == first
    assert identity(own, noise=0.2) != first
    own.write_text(TASK.replace("Tanh", "ReLU"), encoding="utf-8")
    assert identity(own) != first


def test_a_record_is_read_where_the_file_is_gone(own, tmp_path):
    store = RunStore(tmp_path / "runs")
    run = train(RunConfig(experiment=str(own), learning_rate=0.1, rho=0.05, steps=4), store)
    own.unlink()
    loaded = store.load(run.id)
    assert loaded.config == run.config
    assert loaded.config.noise == 0.1


def test_a_function_of_a_module(own, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    run = train(RunConfig(experiment="my_task:build", learning_rate=0.1, rho=0.05, steps=4, batch_size=10))
    assert run.outcome == "finished"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "there is no file"),
        ("def build(:", "cannot be read: SyntaxError"),
        ("raise OSError('no')", "cannot be read: OSError: no"),
        ("x = 1", "there is no function build in it"),
        ("def build():\n    raise ValueError('on purpose')", "raised ValueError: on purpose"),
        ("def build():\n    return 3", "must return a dictionary with model, loss, train, test, got int"),
        ("def build():\n    return {'model': 1}", "must return a dictionary with model, loss, train, test"),
        ("def build(width):\n    pass", "width has no default"),
        (
            TASK.replace('"loss": lambda outputs, targets: (outputs - targets).square().mean()', '"loss": 3'),
            "loss must",
        ),
        (TASK.replace('"train": (x[:40], y[:40])', '"train": (x[:40], y[:39])'), "as many targets as inputs"),
        (TASK.replace('"train": (x[:40], y[:40])', '"train": (x[:40] / 0, y[:40])'), "not finite"),
        (TASK.replace('"train": (x[:40], y[:40])', '"train": ([1], y[:40])'), "train must hold tensors, got int"),
    ],
)
def test_bad_files_are_named_and_nothing_is_written(change, message, tmp_path):
    path = tmp_path / "my_task.py"
    if change is not None:
        path.write_text(change, encoding="utf-8")
    result = call("run", path, "--learning-rate", 0.1, "--rho", 0.05, "--store", tmp_path / "runs")
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output
    assert not (tmp_path / "runs").exists()
