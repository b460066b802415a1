import dataclasses
import errno
import json
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from samlib import Run, RunConfig, RunStore, published_runs, train, train_grid
from samlib.runs import StoreError, atomic_write, load_published, publish

from .conftest import small_config, small_language_config


def fake_run(rho=0.1, seed=0, standin=False, **settings):
    config = RunConfig(experiment="mnist", learning_rate=0.3, rho=rho, seed=seed, **settings)
    rows = pd.DataFrame({"step": [0, 600], "loss": [1.0, 0.5], "operator_norm": [2.0, np.pi]})
    about = {"record": 2, "fingerprint": "f", "standin": standin, "dataset": "mnist"}
    return Run(config.identity("f"), config, rows, "finished", about)


def test_store_round_trip(store):
    run = train(small_config(), store)
    loaded = store.load(run.id)
    pd.testing.assert_frame_equal(loaded.measurements, run.measurements)
    assert (loaded.config, loaded.outcome, loaded.provenance) == (run.config, run.outcome, run.provenance)
    names = {path.name for path in store.folder(run.id).iterdir()}
    assert names == {"config.json", "measurements.parquet", "status.json"}


def test_the_id_depends_on_what_determines_the_run_only():
    base = small_config()
    assert base.identity("x") == small_config(data="auto", compiled=True).identity("x")
    others = [small_config(**{k: v}) for k, v in {"rho": 0.2, "seed": 1, "width": 17, "steps": 31}.items()]
    ids = {c.identity("x") for c in (base, *others, small_language_config())} | {base.identity("y")}
    assert len(ids) == 7
    # Pinned: ids name runs that are published, so they must not drift.
    pinned = RunConfig(experiment="mnist", learning_rate=0.3, rho=0.1, device="cpu")
    assert pinned.identity("fingerprint") == "2de91afef34fb285"
    assert pinned.identity("fingerprint", record=1) == "4b8c290760612719"


@pytest.mark.parametrize("name", ["status.json", "measurements.parquet", "config.json"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "delete"])
def test_a_damaged_record_is_named_set_aside_and_trained_again(store, name, damage):
    config = small_config(steps=2, measure_every=1)
    run = train(config, store)
    path = store.folder(run.id) / name
    content = path.read_bytes()
    if damage == "delete":
        path.unlink()
    else:
        middle = len(content) // 2
        changed = bytes([content[middle] ^ 0x55])
        path.write_bytes(content[:middle] + (b"" if damage == "truncate" else changed + content[middle + 1 :]))
    if name == "status.json" and damage == "delete":
        again = train(config, store)  # without a status the run counts as unfinished
    else:
        with pytest.warns(UserWarning, match=rf"record of run {run.id} is damaged .* set aside as .*damaged-1"):
            again = train(config, store)
    assert again.id == run.id
    assert again.last.loss == run.last.loss
    assert store.load(run.id) is not None


def test_a_damaged_checkpoint_is_set_aside(store):
    store.save_checkpoint("abc", {"step": 3})
    path = store.folder("abc") / "checkpoint.pt"
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    with pytest.warns(UserWarning, match="checkpoint of run abc is damaged"):
        assert store.load_checkpoint("abc", "cpu") is None
    assert store.load_checkpoint("abc", "cpu") is None


def test_writes_are_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "file"
    atomic_write(path, b"first")

    def broken(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("samlib.files.os.replace", broken)
    with pytest.raises(OSError, match="no space"):
        atomic_write(path, b"second")
    assert path.read_bytes() == b"first"
    assert [p.name for p in path.parent.iterdir()] == ["file"]  # nothing of the second is left


def test_a_file_written_by_several_at_once_is_whole(tmp_path):
    path = tmp_path / "file"
    contents = [bytes([i]) * 100_000 for i in range(8)]
    started = threading.Barrier(len(contents))

    def write(content):
        started.wait()
        for _ in range(20):
            atomic_write(path, content)

    threads = [threading.Thread(target=write, args=[content]) for content in contents]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert not path.exists() or path.read_bytes() in contents
    assert path.read_bytes() in contents
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_unusable_stores_are_refused(tmp_path):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(StoreError, match="is a file; give a folder"):
        RunStore(file)
    with pytest.raises(StoreError, match="'' is not a folder"):
        RunStore("")
    with pytest.raises(StoreError, match="is not writable"):
        RunStore("/proc/samlib")
    assert not (tmp_path / "new").exists()
    RunStore(tmp_path / "new")
    assert not (tmp_path / "new").exists()  # nothing is written before there is something to keep


@pytest.fixture
def closed(store, monkeypatch):
    """A store with a finished run, a damaged one and a damaged checkpoint, in which nothing can be written.

    For the superuser permissions mean nothing, so the calls that would write are refused themselves.
    """
    kept, damaged = train(small_config(), store), train(small_config(seed=1), store)
    store.save_checkpoint("abc", {"step": 3})
    for path in (store.folder(damaged.id) / "measurements.parquet", store.folder("abc") / "checkpoint.pt"):
        path.write_bytes(path.read_bytes()[:-1])

    def refused(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    for name in ("mkdir", "touch", "rename", "unlink"):
        monkeypatch.setattr(Path, name, refused)
    for name in ("open", "rename", "replace", "unlink", "mkdir"):
        monkeypatch.setattr(f"os.{name}", refused)
    return store.path, kept, damaged


def test_a_store_that_cannot_be_written_can_be_read(closed):
    path, kept, damaged = closed
    store = RunStore(path)
    pd.testing.assert_frame_equal(store.load(kept.id).measurements, kept.measurements)
    pd.testing.assert_frame_equal(train(small_config(), store).measurements, kept.measurements)
    assert [run.id for run in train_grid([small_config()], store, jobs=2)] == [kept.id]
    store.adopt([kept])
    with pytest.warns(UserWarning, match=r"is damaged .*; left where it is \(Read-only file system\)"):
        assert store.load(damaged.id) is None
    with pytest.warns(UserWarning, match=r"checkpoint of run abc is damaged; left where it is"):
        assert store.load_checkpoint("abc", "cpu") is None


def test_a_store_that_cannot_be_written_says_so_when_something_is_to_be(closed):
    path, kept, _ = closed
    store = RunStore(path)
    for write in (
        lambda: train(small_config(seed=2), store),
        lambda: train_grid([small_config(), small_config(seed=2)], store, jobs=1),
        lambda: store.adopt([dataclasses.replace(kept, id="other")]),
        lambda: store.lock("x").__enter__(),
    ):
        with pytest.raises(StoreError, match=rf"store {path} is not writable \(Read-only file system\); give another"):
            write()


def test_a_run_whose_folder_belongs_to_somebody_else_is_not_trained_in_vain(store, monkeypatch):
    run = train(small_config(), store)
    (store.folder(run.id) / "status.json").unlink()
    monkeypatch.setattr("samlib.runs.os.access", lambda path, mode: path != store.folder(run.id))
    with pytest.raises(StoreError, match=r"is not writable \(Permission denied\)"):
        train(small_config(), store)


def test_publish_merges_and_reads_back(tmp_path):
    path = tmp_path / "mnist.parquet"
    first, second = fake_run(0.1), fake_run(0.0, seed=2)
    publish([first], path)
    publish([second, first], path)
    runs = load_published(path)
    assert [run.id for run in runs] == [second.id, first.id]
    for run, original in zip(runs, (second, first), strict=True):
        pd.testing.assert_frame_equal(run.measurements, original.measurements)
        assert (run.config, run.outcome, run.provenance) == (original.config, original.outcome, original.provenance)
    table = pd.read_parquet(path)
    assert {"run_id", "learning_rate", "rho", "seed", "profile"} <= set(table.columns)
    assert len(published_runs("mnist", tmp_path)) == 2
    assert published_runs("cifar10", tmp_path) == []


def test_a_newer_record_replaces_an_older_one_of_the_same_configuration(tmp_path):
    path = tmp_path / "mnist.parquet"
    new, other = fake_run(0.1), fake_run(0.0)
    old = dataclasses.replace(new, id="0123456789abcdef", provenance=new.provenance | {"record": 1})
    older_data = dataclasses.replace(old, id="fedcba9876543210", provenance=old.provenance | {"fingerprint": "g"})
    publish([old, older_data, other], path)
    assert {run.id for run in publish([new], path)} == {new.id, older_data.id, other.id}
    assert {run.id for run in publish([old], path)} == {new.id, older_data.id, other.id}


def test_published_runs_are_not_trained_again(tmp_path, store):
    run = fake_run()
    publish([run], tmp_path / "mnist.parquet")
    store.adopt(published_runs("mnist", tmp_path))
    pd.testing.assert_frame_equal(store.load(run.id).measurements, run.measurements)
    store.adopt([run])


def test_stand_ins_are_never_published(tmp_path):
    with pytest.raises(StoreError, match="only runs on real data can be published"):
        publish([fake_run(standin=True)], tmp_path / "mnist.parquet")
    assert not list(tmp_path.iterdir())


def test_files_that_are_not_published_runs_are_refused(tmp_path):
    for content in (b"", b"PAR1 no"):
        (tmp_path / "x.parquet").write_bytes(content)
        with pytest.raises(StoreError, match="is not a file of published runs"):
            load_published(tmp_path / "x.parquet")
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "y.parquet")
    with pytest.raises(StoreError, match="is not a file of published runs"):
        load_published(tmp_path / "y.parquet")


def test_provenance_says_what_a_reader_wants_to_know(store):
    run = train(small_config(), store)
    about = json.loads((store.folder(run.id) / "status.json").read_text(encoding="utf-8"))["provenance"]
    assert about["standin"] is True
    assert about["gradients"] == 2 * 30
    assert about["matvecs"] == run.measurements.matvecs.sum()
    assert about["seconds"] > 0
    assert {"samlib", "torch", "python", "device", "threads", "dataset", "fingerprint", "commit"} <= set(about)
