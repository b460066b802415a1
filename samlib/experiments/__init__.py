"""The three experiments: what a run is configured by, and the data, model and loss that a configuration means."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor
from torch.nn import functional as F
from torch.utils import deterministic

from ..datasets import DataPolicy, Dataset, load_dataset
from ..models import CNN, MLP, Transformer
from ..objective import Kernel, Loss, Objective, compiled_kernel, flatten_parameters

__all__ = ["EXPERIMENTS", "PROFILES", "Experiment", "RunConfig", "exact_on_cuda", "explain", "grid", "profile_settings"]

RECORD_VERSION = 1  # part of a run's id; raise it when the same configuration would be recorded differently

EXPERIMENTS = ("mnist", "cifar10", "shakespeare")
PROFILES = ("quick", "reduced", "paper")

# What each profile fixes. `width` is the hidden width (MLP), the first block's channels (CNN: width, 2·width) or the
# model size (Transformer); `depth` counts linear layers, convolution blocks or Transformer blocks.
_SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "mnist": {
        "quick": {"examples": 1000, "width": 200, "depth": 4, "steps": 600, "measure_every": 25},
        "reduced": {"examples": 1000, "width": 200, "depth": 4, "steps": 1500, "measure_every": 25},
        "paper": {"examples": None, "width": 1000, "depth": 4, "steps": 4000, "measure_every": 20},
    },
    "cifar10": {
        "quick": {"examples": 200, "width": 8, "depth": 2, "steps": 150, "measure_every": 10},
        "reduced": {"examples": 1000, "width": 16, "depth": 2, "steps": 150, "measure_every": 10},
        "paper": {"examples": 1000, "width": 16, "depth": 2, "steps": 5000, "measure_every": 25},
    },
    "shakespeare": {
        "quick": {"width": 32, "depth": 2, "heads": 2, "batch_size": 32, "steps": 200, "measure_every": 10},
        "reduced": {"width": 64, "depth": 2, "heads": 4, "batch_size": 32, "steps": 500, "measure_every": 20},
        "paper": {"width": 128, "depth": 6, "heads": 8, "batch_size": 128, "steps": 10_000, "measure_every": 50},
    },
}
_LANGUAGE = {"examples": None, "sequence_length": 64}
# On a CPU. A GPU takes all examples at once, in few launches, and has the memory to keep their graph.
_CHUNK = {"mnist": 10_000, "cifar10": 50, "shakespeare": 128}  # examples at a time; the CNN's fits the cache
_RETAIN = 20_000  # most examples whose gradient graph is kept between Hessian–vector products
_KERNELS: dict[tuple[object, ...], Kernel] = {}  # compiled ones of this process: the runs of a grid share theirs


def profile_settings(experiment: str, profile: str) -> dict[str, Any]:
    """The settings that a profile fixes for an experiment, each of which a :class:`RunConfig` may override."""
    language = _LANGUAGE if experiment == "shakespeare" else {}
    return {**language, **_SETTINGS[experiment][profile]}


def _number(value: Any) -> Any:
    """YAML reads ``1e-3`` as a string; accept it, and nothing else, as the number it means."""
    if isinstance(value, str):
        if value in ("None", "none", "null"):
            return None
        try:
            return float(value)
        except ValueError:
            return value
    return value


# Beyond these bounds nothing trains and float32 overflows.
Positive = Annotated[float, BeforeValidator(_number), Field(gt=0, ge=1e-12, le=1e12, allow_inf_nan=False)]
NonNegative = Annotated[float, BeforeValidator(_number), Field(ge=0, le=1e12, allow_inf_nan=False)]
Count = Annotated[int, BeforeValidator(_number), Field(ge=1)]


class RunConfig(BaseModel):
    """Everything that determines a run. Frozen; settings left out come from the experiment's profile.

    Attributes:
        experiment: "mnist", "cifar10" or "shakespeare".
        profile: "quick", "reduced" or "paper": the scale, and the defaults of the settings below.
        learning_rate: η > 0.
        rho: ρ ≥ 0; zero is gradient descent (or SGD, with mini-batches).
        seed: of the initial weights and the mini-batches.
        steps: number of updates.
        measure_every: steps between measurements; the first and the last point are always measured.
        examples: training examples or sequences, from the first on; None for all.
        width, depth: size of the network, see the models.
        heads, sequence_length, batch_size: of the Transformer experiment; None elsewhere (full batch).
        eigenvalues: number of leading eigenvalues recorded.
        tolerance: relative residual of the eigenpairs.
        dtype: "float32" or "float64".
        device: "cpu", "cuda" or "auto" (resolved on creation).
        data: "auto", "real" or "standin", see :func:`samlib.load_dataset`. Not part of a run's identity: the
            fingerprint of the data that was used is.
        compiled: compute the gradients of the steps by a compiled program, see
            :func:`samlib.objective.compiled_kernel`. Not part of a run's identity either: it changes rounding only.

    Raises:
        pydantic.ValidationError: naming each bad field, what was given and what is allowed.

    >>> RunConfig(experiment="mnist", learning_rate=0.3, rho=0.1).steps
    600
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    experiment: Literal["mnist", "cifar10", "shakespeare"]
    profile: Literal["quick", "reduced", "paper"] = "quick"
    learning_rate: Positive
    rho: NonNegative
    seed: Annotated[int, BeforeValidator(_number), Field(ge=0, lt=2**31)] = 0
    steps: Count
    measure_every: Count
    examples: Count | None
    width: Count
    depth: Count
    heads: Count | None = None
    sequence_length: Count | None = None
    batch_size: Count | None = None
    eigenvalues: Annotated[int, Field(ge=1, le=20)] = 1
    tolerance: Annotated[Positive, Field(lt=1)] = 3e-3
    dtype: Literal["float32", "float64"] = "float32"
    device: Literal["cpu", "cuda"] = "cpu"
    data: DataPolicy = "auto"
    compiled: bool = False

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        fields = cls.model_fields.keys() - {"examples"}
        given = {name: value for name, value in given.items() if value is not None or name not in fields}
        if given.get("device", "auto") == "auto":
            given["device"] = "cuda" if torch.cuda.is_available() else "cpu"
        experiment, profile = given.get("experiment"), given.get("profile", "quick")
        if experiment in EXPERIMENTS and profile in PROFILES:
            return {**profile_settings(experiment, profile), **given}
        # Nothing sensible can be filled in: keep the report to the names that are wrong.
        return {**profile_settings("mnist", "quick"), **given}

    @model_validator(mode="after")
    def _fits_together(self) -> RunConfig:
        language = self.experiment == "shakespeare"
        for name in ("heads", "sequence_length", "batch_size"):
            if not language and getattr(self, name) is not None:
                raise ValueError(f"{name} belongs to the shakespeare experiment; leave it out for {self.experiment}")
        if self.experiment == "cifar10" and self.depth > 5:
            raise ValueError(f"depth must be at most 5 for cifar10 (each block halves the images), got {self.depth}")
        return self

    def identity(self, fingerprint: str) -> str:
        """The run's id: 16 hexadecimal digits of SHA-256 over the configuration, the data's fingerprint and the
        version of the record. The same configuration and data have the same id on every machine."""
        settings = {
            **self.model_dump(exclude={"data", "compiled"}),
            "fingerprint": fingerprint,
            "record": RECORD_VERSION,
        }
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]

    def load_dataset(self) -> Dataset:
        """The data set this configuration asks for."""
        return load_dataset(self.experiment, self.examples, self.data, self.sequence_length or 64)


def explain(error: ValidationError) -> list[str]:
    """A validation error as one line per setting: its name, the value given and what is allowed."""
    lines = []
    for problem in error.errors():
        name, message = ".".join(map(str, problem["loc"])), problem["msg"]
        if problem["type"] == "missing":
            lines.append(f"{name} is required (--{name.replace('_', '-')})")
        elif problem["type"] == "extra_forbidden":
            lines.append(f"{name} is not a setting of a run; there are {', '.join(RunConfig.model_fields)}")
        else:
            message = message.removeprefix("Value error, ").replace("Input should be", "must be")
            lines.append(f"{name} {message}, got {problem['input']!r}" if name else message)
    return lines


def grid(
    experiment: str, learning_rates: Iterable[float], rhos: Iterable[float], seeds: Iterable[int], **settings: Any
) -> list[RunConfig]:
    """The configurations of all combinations of learning rate, rho and seed; settings that are None are left out."""
    given = {name: value for name, value in settings.items() if value is not None}
    points = itertools.product(learning_rates, rhos, seeds)
    return [
        RunConfig(**{"experiment": experiment, "learning_rate": rate, "rho": rho, "seed": seed, **given})
        for rate, rho, seed in points
    ]


def mean_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean over examples and classes of (output − target)², without a factor ½."""
    return (outputs - targets).square().mean()


def cross_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean over positions of −log p(token), in nats; logits (B, T, V), tokens (B, T)."""
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def exact_on_cuda() -> None:
    """For this process: full float32, and the same bits every time where PyTorch can; it warns where it cannot."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs for that
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a debugging aid that costs time


@dataclass
class Experiment:
    """A configuration made concrete: initial parameters, the training objective at each step, and the test metric."""

    config: RunConfig
    dataset: Dataset

    def __post_init__(self) -> None:
        config, x = self.config, self.dataset.train_inputs
        if config.device == "cuda":
            exact_on_cuda()
        dtype = getattr(torch, config.dtype)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            if config.experiment == "mnist":
                model: torch.nn.Module = MLP(x[0].numel(), config.width, config.depth)
            elif config.experiment == "cifar10":
                image = (x.shape[1], x.shape[2], x.shape[3])
                model = CNN(image, tuple(config.width * 2**block for block in range(config.depth)))
            else:
                assert config.heads is not None
                assert config.sequence_length is not None
                model = Transformer(128, config.sequence_length, config.width, config.depth, config.heads)
        self.model = model.to(config.device, dtype)
        self.loss: Loss = cross_entropy if config.experiment == "shakespeare" else mean_squared_error
        self._train = tuple(self._move(t) for t in (self.dataset.train_inputs, self.dataset.train_targets))
        self._full = self._objective(*self._train, kernel=self._kernel()) if config.batch_size is None else None
        self._epoch, self._order = -1, torch.empty(0)

    def _move(self, tensor: Tensor) -> Tensor:
        dtype = getattr(torch, self.config.dtype) if tensor.is_floating_point() else tensor.dtype
        # Max-pooling is an order of magnitude faster on a CPU with the channels last.
        images = tensor.dim() == 4 and self.config.device == "cpu"
        layout = torch.channels_last if images else torch.preserve_format
        return tensor.to(self.config.device, dtype, memory_format=layout)

    def _objective(self, inputs: Tensor, targets: Tensor, *, kernel: Kernel | None = None) -> Objective:
        gpu = self.config.device == "cuda"
        limits: Any = {} if gpu else {"chunk_size": _CHUNK[self.config.experiment]}
        keep = gpu or len(inputs) <= _RETAIN
        return Objective(self.model, self.loss, inputs, targets, **limits, retain_graph=keep, kernel=kernel)

    def _kernel(self) -> Kernel | None:
        if not self.config.compiled:
            return None
        structure = ("experiment", "width", "depth", "heads", "sequence_length", "dtype", "device")
        key = (*(getattr(self.config, name) for name in structure), self.dataset.train_inputs.shape[1:])
        if key not in _KERNELS:
            _KERNELS[key] = compiled_kernel(self.model, self.loss, cuda_graph=self.config.device == "cuda")
        return _KERNELS[key]

    def initial_parameters(self) -> Tensor:
        """w at step 0, shape (P,)."""
        return flatten_parameters(self.model)

    def objective(self, step: int) -> Objective:
        """What the update of this step descends on: the full batch, or the step's mini-batch.

        Mini-batches run through a fresh permutation of the training set in each epoch. They are a function of seed
        and step alone, so that the step is all the sampler's state a checkpoint needs.
        """
        if self._full is not None:
            return self._full
        size = self.config.batch_size
        assert size is not None
        batches = len(self._train[0]) // size
        epoch, position = divmod(step, batches)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + epoch)
            order = torch.randperm(len(self._train[0]), generator=generator)
            self._epoch, self._order = epoch, order.to(self._train[0].device)  # once: a copy waits for the device
        chosen = self._order[position * size : (position + 1) * size]
        return self._objective(self._train[0][chosen], self._train[1][chosen], kernel=self._kernel())

    def evaluation_objective(self) -> Objective | None:
        """With mini-batches, a fixed larger batch: the first four batches' worth of training examples; else None."""
        if self.config.batch_size is None:
            return None
        size = min(4 * self.config.batch_size, len(self._train[0]))
        return self._objective(*(t[:size] for t in self._train))

    @torch.no_grad()
    def test_metric(self, params: Tensor) -> float:
        """Test error (a fraction of wrong labels), or the test loss in nats per character of the language model."""
        total, count = 0.0, 0
        full = self._objective(*self._train)
        chunks = zip(self.dataset.test_inputs.split(250), self.dataset.test_targets.split(250), strict=True)
        for inputs, targets in chunks:
            outputs, targets = full.forward(params, self._move(inputs)), targets.to(params.device)
            if self.config.experiment == "shakespeare":
                total += float(cross_entropy(outputs, targets)) * len(targets)
            else:
                total += float((outputs.argmax(1) != targets).sum())
            count += len(targets)
        return total / count
