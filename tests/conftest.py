"""Shared fixtures: small problems in float64, a store, and real data where there is any."""

import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import matplotlib as mpl
import pytest
import torch
from hypothesis import settings
from torch import nn

from samlib import CNN, MLP, Objective, RunConfig, RunStore, Transformer
from samlib.datasets import SOURCES
from samlib.datasets.files import problem as file_problem
from samlib.experiments import cross_entropy, mean_squared_error
from samlib.objective import flatten_parameters
from samlib.objective.objective import compiler_unread
from samlib.site.browser import chromium, launch, serve, settle

mpl.use("agg")
ROOT = Path(__file__).parents[1]
if not os.access(ROOT, os.W_OK):  # nor has Hypothesis a place for its examples then
    settings.register_profile("read-only", database=None)
    settings.load_profile("read-only")
SITE = ROOT / "_build" / "html"
REAL_DATA = Path(os.environ.get("SAMLIB_DATA", ROOT / "data"))

# What looks at the built website in a browser.
MISSING = [
    *(["a built site: run `make book` first"] if not (SITE / "index.html").exists() else []),
    *(["Chromium"] if not chromium() else []),
    *(name for name in ("playwright", "axe_playwright_python") if not find_spec(name)),
]
needs_site = pytest.mark.skipif(bool(MISSING), reason=f"this needs {', '.join(MISSING)}")

wraps_for_compiler = pytest.mark.skipif(
    bool(compiler_unread()), reason="torch.compile cannot read its own files in a locale of ASCII alone"
)
needs_compiler = pytest.mark.skipif(
    bool(compiler_unread() or not shutil.which("c++")),
    reason="torch.compile needs a C++ compiler on a CPU, and a locale of more than ASCII to read its own files",
)


def pytest_collection_modifyitems(items):
    missing = [f.path for s in SOURCES.values() for f in s.files if file_problem(REAL_DATA / f.path, f)]
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if item.get_closest_marker("data") and missing:
            item.add_marker(pytest.mark.skip(reason=f"real data not found: {missing[0]} (set SAMLIB_DATA)"))


@pytest.fixture(autouse=True)
def _no_stray_files(monkeypatch, tmp_path):
    """Every test runs in its own folder, and finds no data set unless it asks for one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SAMLIB_DATA", raising=False)
    monkeypatch.setattr("samlib.datasets.files.DATA_FOLDER", tmp_path / "data")


@pytest.fixture
def real_data(monkeypatch):
    monkeypatch.setenv("SAMLIB_DATA", str(REAL_DATA.resolve()))


@pytest.fixture
def store(tmp_path):
    return RunStore(tmp_path / "store")


def small_config(**settings):
    """A run of a second on the digits stand-in."""
    usual = {"experiment": "mnist", "learning_rate": 0.3, "rho": 0.1, "data": "standin"}
    usual |= {"examples": 100, "width": 16, "depth": 3, "steps": 30, "measure_every": 10}
    return RunConfig(**{**usual, **settings})


def small_language_config(**settings):
    usual = {"experiment": "shakespeare", "learning_rate": 0.1, "rho": 0.1, "data": "standin", "sequence_length": 8}
    usual |= {"width": 8, "depth": 1, "heads": 2, "batch_size": 8, "examples": 100, "steps": 30, "measure_every": 5}
    return RunConfig(**{**usual, **settings})


PROBLEMS = ("mlp", "cnn", "transformer")


def problem(name, seed=0, dtype=torch.float64, **settings):
    """A small network of each kind with random data: (objective, parameters)."""
    torch.manual_seed(seed)
    if name == "mlp":
        model, x, y = MLP(12, 8, 3, 4), torch.randn(20, 12), torch.randn(20, 4)
    elif name == "cnn":
        model, x, y = CNN((2, 8, 8), (3, 4), 4), torch.randn(9, 2, 8, 8), torch.randn(9, 4)
    else:
        model = Transformer(vocabulary=11, length=6, width=8, layers=2, heads=2, key_size=3, widening=2)
        x, y = torch.randint(0, 11, (7, 6)), torch.randint(0, 11, (7, 6))
    loss = cross_entropy if name == "transformer" else mean_squared_error
    model = model.to(dtype)
    x, y = (t.to(dtype) if t.is_floating_point() else t for t in (x, y))
    # Zero biases and unit scales hide mistakes: move the parameters off their initial values.
    params = flatten_parameters(model)
    params = params + 0.1 * torch.randn(params.shape, dtype=dtype)
    return Objective(model, loss, x, y, **settings), params


class WithBatchNorm(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))


@pytest.fixture(scope="module")
def server():
    with serve(SITE) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    with launch() as chromium:
        yield chromium


@pytest.fixture
def visit(browser):
    """Open an address in a window of its own, and wait until its mathematics is set.

    The page gets two lists: ``requests``, the addresses it asked for, and ``errors``, what went wrong meanwhile.
    """
    contexts = []

    def visit(address, width=1280, theme="light", **more):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=theme, **more)
        context.set_default_timeout(60_000)
        contexts.append(context)
        page = context.new_page()
        page.requests, page.errors = [], []
        page.on("request", lambda request: page.requests.append(request.url))
        page.on("requestfailed", lambda request: page.errors.append(f"failed: {request.url}"))
        page.on("response", lambda response: response.ok or page.errors.append(f"{response.status}: {response.url}"))
        page.on("console", lambda message: message.type == "error" and page.errors.append(message.text))
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.goto(address)
        settle(page)
        return page

    yield visit
    for context in contexts:
        context.close()


@pytest.fixture(params=["server", "file"])
def origin(request):
    """Where the site is read from: a static server, or the files as they lie on disk."""
    return SITE.as_uri() if request.param == "file" else request.getfixturevalue("server")
