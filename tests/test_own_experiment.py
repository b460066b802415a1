"""A reader's own experiment: a Python file in place of a name."""

import json
import textwrap
from contextlib import nullcontext

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


METRIC = '"metric": lambda outputs, targets: (outputs - targets).abs().max(),'
MODEL = '"model": nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 1))'
LOSS = '"loss": lambda outputs, targets: (outputs - targets).square().mean()'


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("import sys\nsys.exit(0)", "cannot be read: SystemExit: 0"),
        ("def build():\n    raise SystemExit", "raised SystemExit"),
        (TASK.replace(METRIC, '"metric": lambda outputs, targets: None,'), "the metric on test cannot be evaluated"),
        (TASK.replace('"test": (x[40:], y[40:])', '"test": (x[40:, :2], y[40:])'), "the metric on test cannot be"),
        (TASK.replace(LOSS, '"loss": lambda outputs, targets: outputs - targets'), "must be one real number"),
        (TASK.replace(LOSS, '"loss": lambda outputs: outputs'), "model and loss cannot be evaluated: TypeError"),
        (TASK.replace('"train": (x[:40]', '"train": (x[:40].long()'), "model and loss cannot be evaluated"),
        (TASK.replace('"train": (x[:40]', '"train": (()'), "must hold inputs and targets"),
        (TASK.replace('"train": (x[:40]', '"train": (x.sum()'), "with the examples first"),
        (TASK.replace("noise: float = 0.1", "noise=float('nan')"), "noise is a setting of the run, which must be"),
        (TASK.replace("noise: float = 0.1", "noise=0.1, sizes=[3]"), "sizes is a setting of the run, which must be"),
        (TASK.replace("noise: float = 0.1", "noise=0.1, momentum=0.5"), "momentum is a name that a run has already"),
        (TASK.replace("noise: float = 0.1", "noise=0.1, steps=7"), "steps is a name that a run has already"),
    ],
)
def test_what_would_fail_at_the_last_step_is_refused_before_the_first(change, message, tmp_path):
    test_bad_files_are_named_and_nothing_is_written(change, message, tmp_path)


def trained(path, store=None, **settings):
    run = train(RunConfig(experiment=str(path), learning_rate=0.1, rho=0.05, steps=4, **settings), store)
    return run.id, run.last.loss


def test_a_file_that_changes_before_its_run_is_trained_is_refused(own, tmp_path):
    config = RunConfig(experiment=str(own), learning_rate=0.1, rho=0.05, steps=4)
    own.write_text(TASK.replace("Tanh", "ReLU"), encoding="utf-8")
    with pytest.raises(ValueError, match="has changed since this run was planned"):
        train(config, RunStore(tmp_path / "runs"))
    own.write_text(TASK, encoding="utf-8")
    assert train(config).outcome == "finished"


def test_a_run_does_not_hang_on_the_runs_before_it(tmp_path):
    """The network is made when the file is read, and has running statistics; data are drawn from all sources."""
    kept = TASK.replace(
        "def build", "net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))\n\ndef build"
    )
    drawn = TASK.replace("import torch", "import random\nimport numpy as np\nimport torch")
    drawn = drawn.replace(
        "x = torch.randn(60, 3, generator=draw)",
        "x = torch.randn(60, 3) + random.random() + torch.as_tensor(np.random.randn(60, 3)).float()",
    )
    said = pytest.warns(UserWarning, match="one and the same model at each call, so the run's seed does not change")
    for name, text, seen in (
        ("kept.py", kept.replace(MODEL, '"model": net'), said),
        ("drawn.py", drawn, nullcontext()),
    ):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        with seen:
            alone = trained(path, seed=1)
            trained(path, seed=0, noise=0.2)
            assert trained(path, seed=1) == alone
            other = tmp_path / "copy" / name
            other.parent.mkdir(exist_ok=True)
            other.write_text(text, encoding="utf-8")
            assert trained(other, seed=1) == alone


def test_arguments_are_what_their_annotations_say(tmp_path):
    path = tmp_path / "my_task.py"
    signature = (
        "from typing import Literal\n\ndef build(width: int | None = None, act: Literal['Tanh', 'ReLU'] = 'Tanh', "
    )
    text = TASK.replace("def build(width: int = 8, ", signature + "seed: int = 5, ")
    model = MODEL.replace("nn.Tanh()", "getattr(nn, act)()").replace("width", "width or 8")
    path.write_text(text.replace(MODEL, model), encoding="utf-8")

    def configured(**settings):
        return RunConfig(experiment=str(path), learning_rate=0.1, rho=0.05, **settings)

    assert (configured().width, configured().act, configured().noise) == (None, "Tanh", 0.1)
    assert (configured(width="64").width, configured(act="ReLU").act, configured(noise="1e-3").noise) == (
        64,
        "ReLU",
        1e-3,
    )
    assert configured(seed=3).seed == 3
    for bad in ({"act": "foo"}, {"width": 0.5}, {"noise": "nan"}, {"noise": True}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            configured(**bad)


def test_only_the_books_experiments_are_published(own, tmp_path):
    result = call("run", own, "--learning-rate", 0.1, "--rho", 0.05, "--publish", "--store", tmp_path / "runs")
    assert result.exit_code == 2
    assert "--publish is for the book's experiments" in result.output
    assert list(tmp_path.iterdir()) == [own]
