"""The science needs PyTorch and NumPy alone; whatever else is missing says which extra brings it."""

import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from .conftest import ROOT


def needed_by(*names):
    """The distributions that some distributions need, themselves included."""
    found, left = set(), [canonicalize_name(name) for name in names]
    while left:
        name = left.pop()
        if name in found:
            continue
        found.add(name)
        for line in metadata.requires(name) or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                left.append(canonicalize_name(requirement.name))
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The package as it would be installed, in a folder of its own."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for part in ("samlib", "pyproject.toml", "README.md", "LICENSE"):  # a build leaves traces where it happens
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        source.mkdir(exist_ok=True)
        copy(ROOT / part, source / part)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        pytest.skip(f"no wheel could be built here: {done.stderr.strip().splitlines()[-1]}")
    [path] = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder / "installed")
    return folder / "installed"


@pytest.fixture(scope="module")
def core(tmp_path_factory):
    """A folder of packages that holds PyTorch, NumPy and what these need, and nothing else."""
    folder = tmp_path_factory.mktemp("core")
    wanted = needed_by("torch", "numpy")
    for module, owners in metadata.packages_distributions().items():
        if any(canonicalize_name(owner) in wanted for owner in owners):
            home = Path(metadata.distribution(owners[0]).locate_file(""))
            for found in home.glob(f"{module}*"):
                if found.name.partition(".")[0] == module:
                    (folder / found.name).symlink_to(found)
    return folder


def python(code, folder, cwd, packages=None):
    """Run a program that imports the wheel and these packages, by default all that are here, away from the checkout."""
    paths = [str(folder), *([str(packages)] if packages else [])]
    program = f"import sys; sys.path[:0] = {paths}\n{code}"
    command = [sys.executable, *(["-S"] if packages else []), "-c", program]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, encoding="utf-8")


def test_the_core_works_with_pytorch_and_numpy_alone(wheel, core, tmp_path):
    code = """
import torch, samlib
assert samlib.__file__.startswith(sys.path[0]), samlib.__file__
from samlib import SAM, HessianOperator, Objective, sam_edge, top_eigenpairs, hutchinson_trace
from samlib.objective import flatten_parameters
model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
x, y = torch.randn(20, 3), torch.randn(20, 1)
objective = Objective(model, lambda out, target: (out - target).square().mean(), x, y)
operator = HessianOperator(objective, flatten_parameters(model))
top = top_eigenpairs(operator)
optimizer = SAM(model.parameters(), rho=0.05, lr=0.1)
print(float(top.values[0]) > 0, sam_edge(1.0, 0.5, 0.25))
"""
    done = python(code, wheel, tmp_path, core)
    assert done.stdout.startswith("True 2.47213"), done.stderr


def test_the_laboratory_says_which_extra_it_needs(wheel, core, tmp_path):
    done = python("from samlib import train", wheel, tmp_path, core)
    assert "samlib.train needs " in done.stderr
    assert "pip install 'samlib[lab]'" in done.stderr
    code = "sys.argv = ['samlib', 'run', 'mnist']\nfrom samlib.__main__ import main\nmain()"
    done = python(code, wheel, tmp_path, core)
    assert done.returncode == 2
    assert "which the extra 'lab' brings: pip install 'samlib[lab]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_away_from_the_checkout_runs_are_trained_and_what_is_missing_is_said(wheel, tmp_path):
    code = """
from samlib.cli import app
import samlib.runs
assert samlib.__file__.startswith(sys.path[0]), samlib.__file__
sys.argv = ["samlib", "run", "mnist", "--learning-rate", "0.3", "--rho", "0.1", "--steps", "3", "--data", "standin",
            "--set", "width=8", "--set", "examples=50"]
app()
"""
    done = python(code, wheel, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "finished" in done.stdout
    assert len(list((tmp_path / "runs").glob("*/status.json"))) == 1
    claims = "from samlib.cli import app\nsys.argv = ['samlib', 'claims']\napp()"
    done = python(claims, wheel, tmp_path)
    assert done.returncode == 2
    assert "published runs" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_wheel_holds_every_module_and_what_they_read(wheel):
    there = {
        p.relative_to(ROOT).as_posix() for p in (ROOT / "samlib").rglob("*") if p.suffix in (".py", ".html", ".ipynb")
    }
    assert {p.relative_to(wheel).as_posix() for p in wheel.rglob("samlib/**/*") if p.is_file()} >= there
