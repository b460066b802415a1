"""Where points are executed."""

import importlib.util
import socket
import sys

from samlib.sweeps import engines as sweep_run

from .conftest import samlib

has_ray = importlib.util.find_spec("ray") is not None


def test_ray_that_is_missing_or_does_not_answer_is_reported(trivial, tmp_path, monkeypatch):
    command = (trivial, "--grid", "rate=1,2", "--out", tmp_path / "out")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    if has_ray:
        for given, message in [(address, "nothing answers there"), ("cluster", "--ray takes auto, HOST:PORT")]:
            result = samlib(*command, "--ray", given)
            assert (result.exit_code, message in result.stderr) == (2, True), result.output
    monkeypatch.setitem(sys.modules, "ray", None)
    result = samlib("--ray", *command)
    assert (result.exit_code, 'pip install "samlib[ray]"' in result.stderr) == (2, True), result.output
    assert not (tmp_path / "out").exists()


def test_gpus_and_cores_are_shared_out(monkeypatch):
    for visible, expected in [("0,1", ["0", "1"]), ("", []), ("-1", [])]:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert sweep_run.gpus() == expected
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    for name in sweep_run._THREADS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sweep_run, "cores", lambda: 8)
    engine = sweep_run.Local()
    assert engine.jobs == 2
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in engine._slots] == ["3", "5"]
    assert {slot["OMP_NUM_THREADS"] for slot in engine._slots} == {"4"}
    engine.close()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the user's own wish, which MKL's variable must not overrule
    engine = sweep_run.Local()
    assert {slot[name] for slot in engine._slots for name in sweep_run._THREADS} == {"1"}
    engine.close()
