import json

import pytest
from typer.testing import CliRunner

from samlib import RunStore
from samlib.cli import app

SMALL = ["--set", "examples=50", "--set", "width=8", "--set", "depth=2", "--set", "measure_every=5"]
RUN = ["run", "mnist", "--learning-rate", "0.3", "--rho", "0.1", "--steps", "10", "--data", "standin", *SMALL]


def call(*arguments):
    return CliRunner().invoke(app, list(arguments))


def with_instead(command, *arguments):
    """A command with further arguments, without the options for what these give: a setting is given once."""
    given = {a for a in arguments if a.startswith("--")} - {"--set", "--grid"}
    given |= {"--" + a.partition("=")[0].replace("_", "-") for a in arguments if "=" in a}
    kept = [pair for pair in zip(command[2::2], command[3::2], strict=True) if pair[0] not in given]
    return [*command[:2], *(word for pair in kept for word in pair), *arguments]


def test_a_run_prints_a_summary_and_is_found_again(tmp_path):
    store = ["--store", str(tmp_path / "store")]
    first = call(*RUN, *store)
    assert first.exit_code == 0, first.output
    assert "finished" in first.output
    assert "edge ratio" in first.output
    again = call(*RUN, *store)
    assert again.output == first.output
    [run_id] = [p.name for p in (tmp_path / "store").iterdir() if not p.name.startswith(".")]
    assert run_id in first.output
    assert str(RunStore(tmp_path / "store").load(run_id)) in first.output


def test_json_output(tmp_path):
    result = call(*RUN, "--store", str(tmp_path / "store"), "--json")
    record = json.loads(result.stdout)
    assert record["status"] == "finished"
    assert record["config"]["rho"] == 0.1
    assert record["last"]["step"] == 10
    assert record["provenance"]["standin"] is True


def test_what_cannot_be_published_is_not_trained_first(tmp_path):
    result = call(*RUN, "--publish", "--store", str(tmp_path / "store"))
    assert (result.exit_code, "only runs on real data can be published" in result.output) == (2, True)
    assert not (tmp_path / "store").exists()


def test_a_diverged_run_is_not_an_error(tmp_path):
    arguments = ["run", "mnist", "--learning-rate", "1000", "--rho", "0", "--steps", "50", "--data", "standin", *SMALL]
    result = call(*arguments, "--store", str(tmp_path / "store"))
    assert result.exit_code == 0
    assert "diverged at step" in result.output
    text = call(*arguments, "--store", str(tmp_path / "store"), "--json").stdout
    assert "Infinity" not in text
    assert "NaN" not in text
    assert json.loads(text)["last"]["operator_norm"] is None


def test_a_grid_and_a_time_budget(tmp_path):
    store = ["--store", str(tmp_path / "store")]
    result = call(*with_instead(RUN, "--grid", "rho=0,0.1", "--grid", "seed=0,1"), *store)
    assert result.exit_code == 0
    assert result.output.count("finished") == 4
    assert "left" not in call(*with_instead(RUN, "--grid", "rho=0.1,1e-1"), *store).output
    none = call(*RUN, "--seed", "7", "--time-budget", "0.000001s", *store)
    assert none.exit_code == 0
    assert "1 run is left; the same command continues" in none.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning-rate", "-0.1"], "learning_rate must be greater than 0, got -0.1"),
        (["--learning-rate", "0"], "learning_rate must be greater than 0, got 0.0"),
        (["--learning-rate", "nan"], "learning_rate must be"),
        (["--learning-rate", "inf"], "learning_rate must be"),
        (["--rho", "-0.1"], "rho must be greater than or equal to 0, got -0.1"),
        (["--rho", "nan"], "rho must be"),
        (["--steps", "0"], "steps must be greater than or equal to 1, got 0"),
        (["--profile", "huge"], "profile must be 'quick', 'reduced' or 'paper', got 'huge'"),
        (["--data", "fake"], "data must be 'auto', 'real' or 'standin', got 'fake'"),
        (["--set", "hue=3"], "hue is not a setting of a run; there are experiment, profile"),
        (["--set", "width"], "--set takes NAME=VALUE, got 'width'"),
        (["--set", "examples=1e9"], "asked for 1000000000 training examples"),
        (["--set", "experiment=cifar10"], "the experiment is the first argument"),
        (["--grid", "device=cpu,tpu"], "device must be 'cpu' or 'cuda'"),
        (["--set", "heads=3"], "heads belongs to the experiment shakespeare"),
        (["--set", "strength"], "--set takes NAME=VALUE, got 'strength'"),
        (["--rule", "layer_sam", "--set", "layers=hue"], "layers must name parts of the network (1.weight"),
        (["--rule", "mas"], "rule must be one of sam, usam"),
        (["--base", "lion"], "base must be one of sgd, adam, got 'lion'"),
        (["--set", "observables=edge,hue"], "observables must be some of edge"),
        (["--set", "momentum=1"], "momentum must be less than 1, got '1'"),
        (["--set", "weight_decay=-1"], "weight_decay must be greater than or equal to 0, got '-1'"),
        (["--base", "adam", "--set", "momentum=0.9"], "momentum belongs to the base sgd; leave it out for"),
        (["--set", "nesterov=true"], "nesterov needs a momentum above 0"),
        (["--set", "measure_at_losses=0.1,0.2"], "measure_at_losses must fall from value to value"),
        (["--set", "measure_at_losses=0.1,-0.2"], "measure_at_losses.1 must be greater than 0, got '-0.2'"),
        (["--set", "schedule=cyclic"], "schedule must be 'constant', 'one_cycle' or 'cosine'"),
        (["--set", "warmup_steps=600"], "warmup_steps must be less than the 10 steps, got 600"),
        (["--set", "batch_size=10000"], "batch_size must be at most the"),
        (["--grid", "rho=0,x"], "rho must be a valid number"),
        (["--grid", "rho=0", "--grid", "rho=1"], "--grid names rho twice"),
        (["--time-budget", "soon"], "--time-budget takes a positive time"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(arguments, message, tmp_path):
    base = RUN[: RUN.index("--set")]
    result = call(*with_instead(base, *arguments), "--store", str(tmp_path / "store"))
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output
    assert not (tmp_path / "store").exists()


def test_unknown_experiment_and_missing_values(tmp_path):
    store = ["--store", str(tmp_path / "store")]
    result = call("run", "imagenet", "--learning-rate", "0.1", "--rho", "0", *store)
    assert result.exit_code == 2
    output = " ".join(result.output.split())
    assert "experiment must be one of mnist, cifar10, shakespeare" in output
    assert "the path of a Python file or package.module:function, got 'imagenet'" in output
    result = call("run", "mnist", "--rho", "0", *store)
    assert result.exit_code == 2
    assert "learning_rate is required (--learning-rate)" in result.output
    assert not (tmp_path / "store").exists()


def test_all_problems_are_reported_at_once(tmp_path):
    result = call(
        "run", "mnist", "--learning-rate", "-1", "--rho", "-1", "--steps", "0", "--store", str(tmp_path / "s")
    )
    assert all(name in result.output for name in ("learning_rate", "rho", "steps"))


def test_unusable_stores(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    for store, message in (
        (tmp_path / "file", "is a file; give a folder"),
        (tmp_path / "nowhere", "is a file; give a folder"),
        ("/proc/x", "is not writable"),
        (tmp_path / ("x" * 300), "is not writable"),
    ):
        result = call(*RUN, "--store", str(store))
        assert result.exit_code == 2
        assert message in " ".join(result.output.split())
        assert "Traceback" not in result.output


def test_cuda_without_a_device(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = call(*RUN, "--device", "cuda", "--store", str(tmp_path / "store"))
    assert result.exit_code == 2
    assert "sees no CUDA device" in result.output
    assert not (tmp_path / "store").exists()


def test_real_data_without_a_network(tmp_path, monkeypatch):
    from samlib.datasets import SOURCES, RemoteFile

    closed = (RemoteFile("x/y", "md5", "0", ("http://127.0.0.1:9/x",)),)
    for source in SOURCES.values():
        monkeypatch.setattr(source, "files", closed)
        monkeypatch.setattr(source, "archive", None)
    result = call(*[v if v != "standin" else "real" for v in RUN], "--store", str(tmp_path / "store"))
    assert result.exit_code == 2
    assert "cannot load mnist" in result.output
    assert not (tmp_path / "store").exists()
    assert call("data").exit_code == 1
    assert call("data", "--policy", "auto").exit_code == 0


def test_too_large_batches_and_too_deep_networks(tmp_path):
    store = ["--learning-rate", "0.1", "--rho", "0", "--data", "standin", "--store", str(tmp_path / "store")]
    for arguments, message in (
        (["shakespeare", "--set", "batch_size=1000000"], "batch_size must be at most the"),
        (["cifar10", "--set", "depth=6"], "depth must be at most 5"),
    ):
        result = call("run", *arguments, *store)
        assert result.exit_code == 2
        assert message in " ".join(result.output.split())
        assert not (tmp_path / "store").exists()


def test_other_commands_refuse_what_they_do_not_know(tmp_path):
    assert call("data", "--policy", "fake").exit_code == 2
    assert call("claims", "--profile", "huge").exit_code == 2
    assert call("claims", "--published", str(tmp_path / "nothing")).exit_code == 2


def test_an_interrupt_says_how_to_go_on(tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("samlib.training.train_grid", interrupted)
    result = call(*RUN, "--store", str(tmp_path / "store"))
    assert result.exit_code == 130
    assert "the same command continues" in result.output


def test_book_refuses_what_it_cannot_build(tmp_path):
    assert call("book", "--root", str(tmp_path)).exit_code == 2
    assert call("book", "--profile", "huge").exit_code == 2
