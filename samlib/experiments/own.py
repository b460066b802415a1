"""A reader's own experiment: a Python file, or ``package.module:function``, that says what is trained.

The function, ``build`` in a file, returns a dictionary: ``model`` (a module), ``loss`` (outputs, targets → mean loss),
``train`` and ``test`` (pairs of inputs and targets), and, if wanted, ``metric`` (all test outputs and targets → a
number, lower is better) and ``probes`` (two pairs of inputs and labels by name, see the observable of that name). Its
arguments, all with defaults, are the experiment's own settings: truths, numbers and texts, or as their annotations say
(``Literal``, ``int | None``). An argument ``seed`` gets the run's.

Data must be the same at each call: random numbers are seeded before, with 0 for the data and with the run's seed for
the model's weights.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib
import importlib.util
import inspect
import math
import random
import sys
import types
import typing
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BeforeValidator, Field, create_model
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..datasets import Dataset
from ..datasets.base import Probed
from ..features import Labelled, ProbeSets
from ..files import as_path
from ..objective.isolation import random_numbers_kept
from ..settings import Settings, Truth, in_one_line, number
from .base import PROFILES, Experiment, Metric, joined

if TYPE_CHECKING:
    from ..config import RunConfig
    from .task import Task

__all__ = ["is_own", "own_experiment"]

_SCALE = {"examples": None, "steps": 500, "measure_every": 20}
_PARTS = ("model", "loss", "train", "test")


def is_own(name: str) -> bool:
    """Whether a name means an experiment outside of this package."""
    return name.endswith(".py") or ":" in name


def own_experiment(name: str) -> Experiment:
    """The experiment of a file or function of one's own.

    Raises:
        ValueError: if there is no such file or function, or it cannot be used; the message says why.
    """
    build, source = _function(name)
    settings = _settings(name, build)
    parts = functools.lru_cache(maxsize=2)(lambda given: _call(name, build, dict(given)))

    def made(config: RunConfig) -> dict[str, Any]:
        return parts(tuple(sorted((key, getattr(config, key)) for key in settings.model_fields)))

    def load(config: RunConfig) -> Dataset:
        return _dataset(name, made(config), config)

    def model(config: RunConfig, _: Dataset) -> nn.Module:
        # Anew, under the run's seed: the first call was for the data. A copy, as it may be one that the file keeps.
        given = {key: getattr(config, key) for key in settings.model_fields}
        built = _call(name, build, given, config.seed)["model"]
        if built is made(config)["model"]:
            warnings.warn(
                f"experiment {name} returns one and the same model at each call, so the run's seed does not change its "
                "initial weights; make it inside of the function",
                UserWarning,
                stacklevel=2,
            )
        return copy.deepcopy(built)

    def metric(config: RunConfig) -> Metric:
        return joined(made(config).get("metric") or made(config)["loss"])

    def check(task: Task) -> None:
        _evaluate(name, task)

    title = Path(name.partition(":")[0]).stem
    profiles = dict.fromkeys(PROFILES, _SCALE)
    return Experiment(
        name,
        title,
        load,
        model,
        lambda config: made(config)["loss"],
        metric,
        "test metric",
        settings,
        profiles,
        source=source,
        try_out=check,
    )


def _function(name: str) -> tuple[Callable[..., Any], str]:
    """The function, and SHA-256 of the file that it stands in."""
    place, _, attribute = name.rpartition(":") if ":" in name and not name.endswith(".py") else (name, "", "build")
    if place.endswith(".py"):
        path = as_path(place)
        if not path.is_file():
            raise ValueError(f"experiment {name}: there is no file {path.absolute()}; give the path of a Python file")
        source = hashlib.sha256(path.read_bytes()).hexdigest()
        module = _from_file(name, path, source)
    else:
        try:
            module = importlib.import_module(place)
        except (Exception, SystemExit) as error:
            raise ValueError(f"experiment {name}: {place} cannot be imported ({in_one_line(error)})") from None
        source = hashlib.sha256(Path(module.__file__ or "").read_bytes()).hexdigest() if module.__file__ else ""
    build = getattr(module, attribute, None)
    if not callable(build):
        raise ValueError(f"experiment {name}: there is no function {attribute} in it; define {attribute}()")
    return build, source


def _from_file(name: str, path: Path, source: str) -> ModuleType:
    """The module of a file, executed once for each content; its folder can be imported from, as for a script."""
    title = f"samlib_own_{source[:16]}"
    if title in sys.modules:
        return sys.modules[title]
    spec = importlib.util.spec_from_file_location(title, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[title] = module
    folder = str(path.absolute().parent)
    sys.path.insert(0, folder)
    try:
        with _seeded(0):
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[title]
        raise ValueError(f"experiment {name} cannot be read: {in_one_line(error)}") from None
    finally:
        sys.path.remove(folder)
    return module


def _settings(name: str, build: Callable[..., Any]) -> type[Settings]:
    fields: dict[str, Any] = {}
    try:
        annotated = typing.get_type_hints(build)
    except Exception:  # an annotation that cannot be read says nothing
        annotated = {}
    for parameter in inspect.signature(build).parameters.values():
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        if parameter.default is parameter.empty:
            raise ValueError(f"experiment {name}: {parameter.name} has no default; give it one")
        default = parameter.default
        kind = _kind(annotated.get(parameter.name, type(default)))
        if kind is None or (isinstance(default, float) and not math.isfinite(default)):
            raise ValueError(
                f"experiment {name}: {parameter.name} is a setting of the run, which must be True or False, a finite "
                f"number, a text, or as an annotation says (Literal, int | None), got {default!r}"
            )
        fields[parameter.name] = (kind, default)
    return create_model("OwnSettings", __base__=Settings, **fields)


_FINITE = Annotated[float, BeforeValidator(number), Field(allow_inf_nan=False)]
_KINDS: dict[Any, Any] = {
    bool: Truth,
    int: Annotated[int, BeforeValidator(number)],
    float: _FINITE,
    str: str,
    types.NoneType: Annotated[None, BeforeValidator(number)],
}


def _kind(annotation: Any) -> Any:
    """The kind of a setting with an annotation, or None where it cannot be one."""
    if typing.get_origin(annotation) is Literal:
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        kinds = [_kind(part) for part in typing.get_args(annotation)]
        return None if None in kinds else typing.Union[tuple(kinds)]  # noqa: UP007
    return _KINDS.get(annotation) if isinstance(annotation, type) else None


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """All the usual random numbers, seeded inside and afterwards as before."""
    with random_numbers_kept():
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        yield


def _evaluate(name: str, task: Task) -> None:
    """Raise a ValueError if what a run evaluates cannot be evaluated, before it trains."""
    w = task.initial_parameters()
    for what, evaluate in (
        ("the loss on train", task.everything),
        ("the gradient on train", lambda: task.objective(0).gradient(w)),
        ("the metric on test", lambda: task.test_metric(w)),
    ):
        try:
            evaluate()
        except Exception as error:
            raise ValueError(f"experiment {name}: {what} cannot be evaluated: {in_one_line(error)}") from None


def _call(name: str, build: Callable[..., Any], settings: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    try:
        with _seeded(seed):
            parts = build(**settings)
    except (Exception, SystemExit) as error:
        raise ValueError(f"experiment {name} raised {in_one_line(error)}") from None
    if not isinstance(parts, dict) or not set(_PARTS) <= parts.keys():
        wanted = f"a dictionary with {', '.join(_PARTS)}"
        got = (
            f"a dictionary with {', '.join(map(str, parts))}" if isinstance(parts, dict) else f"{type(parts).__name__}"
        )
        raise ValueError(f"experiment {name} must return {wanted}, got {got}")
    if not isinstance(parts["model"], nn.Module):
        raise ValueError(f"experiment {name}: model must be a torch.nn.Module, got {type(parts['model']).__name__}")
    for key in ("loss", "metric"):
        if key in parts and not callable(parts[key]):
            raise ValueError(f"experiment {name}: {key} must be a function of outputs and targets, got {parts[key]!r}")
    for key in ("train", "test"):
        if not isinstance(parts[key], (tuple, list)) or len(parts[key]) != 2:
            raise ValueError(f"experiment {name}: {key} must be a pair of inputs and targets")
    return parts


def _dataset(name: str, parts: dict[str, Any], config: RunConfig) -> Dataset:
    tensors = [_tensors(name, key, half) for key in ("train", "test") for half in parts[key]]
    for key, inputs, targets in (("train", *tensors[:2]), ("test", *tensors[2:])):
        lengths = {len(t) for t in pytree.tree_leaves((inputs, targets))}
        if not all(pytree.tree_leaves(part) for part in (inputs, targets)):
            raise ValueError(f"experiment {name}: {key} must hold inputs and targets, got none of one")
        if len(lengths) != 1 or 0 in lengths:
            raise ValueError(f"experiment {name}: {key} must hold as many targets as inputs, got {sorted(lengths)}")
    available = len(pytree.tree_leaves(tensors[0])[0])
    if config.examples is not None:
        if config.examples > available:
            raise ValueError(f"asked for {config.examples} training examples, but {name} has {available}")
        tensors[:2] = [pytree.tree_map(lambda t: t[: config.examples], part) for part in tensors[:2]]
    digest = hashlib.sha256()
    for tensor in pytree.tree_leaves(tensors):
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    x, y, x_test, y_test = tensors
    about = (name, x, y, x_test, y_test, False, digest.hexdigest())
    if "probes" not in parts:
        return Dataset(*about)
    try:
        train, test = (Labelled(inputs, dict(labels)) for inputs, labels in parts["probes"])
        return Probed(*about, ProbeSets(train, test))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"experiment {name}: probes must be two pairs of inputs and labels by name, to train on and to test on "
            f"({in_one_line(error)})"
        ) from None


def _tensors(name: str, key: str, part: Any) -> Any:
    """Tensors of what was given, finite."""

    def tensor(value: Any) -> Tensor:
        if not isinstance(value, Tensor | np.ndarray):
            raise ValueError(f"experiment {name}: {key} must hold tensors, got {type(value).__name__}")
        try:
            if isinstance(value, np.ndarray):
                value = np.ascontiguousarray(value, value.dtype.newbyteorder("="))
            made = torch.as_tensor(value).detach().cpu()
        except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
            raise ValueError(f"experiment {name}: {key} cannot be read as tensors ({in_one_line(error)})") from None
        if made.layout != torch.strided or not made.dim() or made.is_complex():
            raise ValueError(
                f"experiment {name}: {key} must hold dense, real tensors with the examples first, got {made.dtype} of "
                f"shape {tuple(made.shape)}, {made.layout}"
            )
        if made.is_floating_point() and not bool(made.isfinite().all()):
            raise ValueError(f"experiment {name}: {key} holds values that are not finite")
        return made

    return pytree.tree_map(tensor, part)
