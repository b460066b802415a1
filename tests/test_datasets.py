import gzip
import hashlib
import http.server
import shutil
import socket
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from samlib import load_dataset
from samlib.datasets import SOURCES, DataError, RemoteFile
from samlib.datasets import files as module

from .conftest import REAL_DATA


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    """No test reaches out: every address is a closed port, which answers at once."""

    def closed(file):
        return replace(file, urls=("http://127.0.0.1:9/x",))

    for name, source in SOURCES.items():
        archive = source.archive and closed(source.archive)
        monkeypatch.setitem(SOURCES, name, replace(source, files=tuple(map(closed, source.files)), archive=archive))


@pytest.fixture
def server():
    """A web server on a free port; its ``content`` maps paths to bytes."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = self.content.get(self.path)
            self.send_response(200 if body is not None else 404)
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *_):
            pass

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    running.content = Handler.content = {}
    yield running
    running.shutdown()
    running.server_close()


def serve(monkeypatch, server, content, name="shakespeare"):
    """Make a data set consist of one served file with this content."""
    server.content["/file"] = content
    url = f"http://127.0.0.1:{server.server_port}/file"
    file = RemoteFile("text/input.txt", "sha256", hashlib.sha256(content).hexdigest(), (url,))
    monkeypatch.setitem(SOURCES, name, replace(SOURCES[name], files=(file,)))
    return file


TEXT = b"To be, or not to be, that is the question.\n" * 200


def test_downloads_once_and_verifies(monkeypatch, server, tmp_path):
    file = serve(monkeypatch, server, TEXT)
    assert SOURCES["shakespeare"].locate()[0].read_bytes() == TEXT
    server.content.clear()
    assert SOURCES["shakespeare"].locate()[0] == module.data_folders()[-1] / file.path
    dataset = load_dataset("shakespeare", policy="real", sequence_length=16)
    assert not dataset.standin
    assert not list(tmp_path.rglob("*.part"))


def test_a_download_with_the_wrong_checksum_is_never_used(monkeypatch, server, tmp_path):
    serve(monkeypatch, server, TEXT)
    server.content["/file"] = TEXT[:-1]
    with pytest.raises(DataError, match=r"sent a file with sha256 [0-9a-f]+, expected"):
        SOURCES["shakespeare"].locate()
    assert not list(tmp_path.rglob("input.txt"))


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b[:-1] + b"?", lambda b: b""])
def test_damaged_files_are_downloaded_again(monkeypatch, server, damage):
    file = serve(monkeypatch, server, TEXT)
    path = module.data_folders()[-1] / file.path
    path.parent.mkdir(parents=True)
    path.write_bytes(damage(TEXT))
    assert SOURCES["shakespeare"].locate()[0].read_bytes() == TEXT


def test_damaged_files_are_named_where_there_is_no_network(monkeypatch, server, tmp_path):
    file = serve(monkeypatch, server, TEXT)
    server.content.clear()
    folder = tmp_path / "mine"
    (folder / file.path).parent.mkdir(parents=True)
    (folder / file.path).write_bytes(b"garbage")
    monkeypatch.setenv("SAMLIB_DATA", str(folder))
    expected = f"input.txt is damaged \\(sha256 {hashlib.sha256(b'garbage').hexdigest()}, expected {file.checksum}\\)"
    with pytest.raises(DataError, match=expected):
        load_dataset("shakespeare", policy="real")
    with pytest.warns(UserWarning, match="is damaged"):
        assert load_dataset("shakespeare", policy="auto", sequence_length=16).standin
    assert (folder / file.path).read_bytes() == b"garbage"


@pytest.mark.parametrize("name", SOURCES)
def test_no_network_is_said_and_auto_falls_back(name):
    with pytest.raises(DataError, match=rf"cannot load {name}: .*did not answer .*Set SAMLIB_DATA .*data='standin'"):
        load_dataset(name, policy="real")
    with pytest.warns(UserWarning, match="its results do not count"):
        dataset = load_dataset(name, 50, policy="auto")
    assert dataset.standin
    assert dataset.name.startswith(f"{name} stand-in")


def test_a_network_that_hangs_falls_back_in_time(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/x"
        file = RemoteFile("text/input.txt", "sha256", "0" * 64, (url,) * 50)
        monkeypatch.setitem(SOURCES, "shakespeare", replace(SOURCES["shakespeare"], files=(file,)))
        monkeypatch.setattr(module, "CONNECT_SECONDS", 0.2)
        started = time.monotonic()
        with pytest.warns(UserWarning, match="did not answer"):
            load_dataset("shakespeare", policy="auto", sequence_length=16)
    # At most two attempts fit; all fifty would take ten seconds. With the real 5 seconds that is at most 15.
    assert time.monotonic() - started < 5


def test_a_server_that_trickles_is_given_up(monkeypatch):
    class Trickle:
        def iter_content(self, _):
            while True:
                clock[0] += 1.0
                yield b"x"

    clock = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    with pytest.raises(TimeoutError, match=r"only \d+ bytes in \d s"):
        module._receive(Trickle())


def test_stand_ins_touch_neither_network_nor_files(monkeypatch):
    def forbidden(*_):
        raise AssertionError("touched")

    monkeypatch.setattr("samlib.datasets.base.locate", forbidden)
    for name in SOURCES:
        assert load_dataset(name, 20, "standin").standin


def test_preprocessing_of_images():
    dataset = load_dataset("mnist", 100, "standin")
    assert dataset.train_inputs.shape == (100, 1, 8, 8)
    torch.testing.assert_close(dataset.train_inputs.mean(0), torch.zeros(1, 8, 8), rtol=0, atol=1e-6)
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    scaled = images.reshape(-1, 1, 8, 8) * 16 / 256
    expected = scaled[:100] - scaled[:100].mean(0)
    np.testing.assert_allclose(dataset.train_inputs.numpy(), expected, atol=1e-6)
    np.testing.assert_allclose(dataset.test_inputs[:5].numpy(), scaled[1500:1505] - scaled[:100].mean(0), atol=1e-6)
    assert (dataset.train_targets.argmax(1).numpy() == labels[:100]).all()
    assert dataset.train_targets.sum().item() == 100


def test_text_is_cut_into_disjoint_sequences_and_their_successors(monkeypatch, server):
    lines = [f"line number {i}\n" for i in range(30_000)]
    serve(monkeypatch, server, "".join(lines).encode())
    dataset = load_dataset("shakespeare", policy="real", sequence_length=10)
    text = "".join(lines[:20_000])
    assert bytes(dataset.train_inputs[0].tolist()).decode() == text[:10]
    assert bytes(dataset.train_targets[0].tolist()).decode() == text[1:11]
    assert bytes(dataset.train_inputs[1].tolist()).decode() == text[10:20]
    assert len(dataset.train_inputs) == (len(text) - 1) // 10
    assert bytes(dataset.test_inputs[0].tolist()).decode() == lines[20_000][:10]


def test_the_fingerprint_is_that_of_the_data_used():
    first, again = (load_dataset("mnist", 100, "standin").fingerprint for _ in range(2))
    assert first == again
    assert first != load_dataset("mnist", 101, "standin").fingerprint
    assert len({load_dataset(name, 50, "standin").fingerprint for name in SOURCES}) == 3


def test_bad_requests_are_named():
    with pytest.raises(ValueError, match="data set must be one of mnist, cifar10, shakespeare, got 'imagenet'"):
        load_dataset("imagenet")
    with pytest.raises(ValueError, match="data must be 'auto', 'real' or 'standin', got 'fake'"):
        load_dataset("mnist", policy="fake")
    with pytest.raises(DataError, match=r"asked for 5000 training examples, but mnist stand-in: .* has 1500"):
        load_dataset("mnist", 5000, "standin")


@pytest.mark.data
@pytest.mark.usefixtures("real_data")
def test_real_data():
    mnist = load_dataset("mnist", 1000, "real")
    assert mnist.train_inputs.shape == (1000, 1, 28, 28)
    assert len(mnist.test_inputs) == 10_000
    assert mnist.train_targets.argmax(1)[:5].tolist() == [5, 0, 4, 1, 9]
    cifar = load_dataset("cifar10", 1000, "real")
    assert cifar.train_inputs.shape == (1000, 3, 32, 32)
    assert cifar.train_targets.argmax(1)[:5].tolist() == [6, 9, 9, 4, 1]
    text = load_dataset("shakespeare", None, "real")
    assert bytes(text.train_inputs[0].tolist()).startswith(b"First Citizen:")
    assert text.train_inputs.max() < 128


@pytest.mark.data
def test_a_truncated_copy_of_the_real_data_is_not_used(monkeypatch, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(REAL_DATA / "MNIST", folder / "MNIST")
    labels = folder / "MNIST/raw/train-labels-idx1-ubyte.gz"
    labels.chmod(0o644)
    content = gzip.decompress(labels.read_bytes())
    labels.write_bytes(gzip.compress(content[:-10]))
    monkeypatch.setenv("SAMLIB_DATA", str(folder))
    with pytest.raises(DataError, match=r"train-labels-idx1-ubyte\.gz is damaged"):
        load_dataset("mnist", 100, "real")
