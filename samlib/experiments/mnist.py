"""The paper's first experiment: a fully connected network on handwritten digits, squared error, full batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BeforeValidator
from torch import Tensor
from torch.nn import functional as F

from ..datasets import MNIST as SOURCE
from ..datasets import Dataset
from ..models import MLP
from ..objective import Loss
from ..settings import Count, Settings, names
from .base import Experiment, error_rate, mean_squared_error

if TYPE_CHECKING:
    from ..config import RunConfig

__all__ = ["MNIST"]


class MLPSettings(Settings):
    """Hidden units and linear layers of the network, or in their place ``widths``, the units of each hidden layer; what
    is between the layers; the initial weights; and the loss."""

    width: Count
    depth: Count
    widths: Annotated[tuple[Count, ...], BeforeValidator(names)] = ()
    activation: Literal["relu", "tanh", "gelu"] = "relu"
    initial_weights: Literal["glorot", "pytorch"] = "glorot"
    loss: Literal["squared_error", "cross_entropy"] = "squared_error"


def _model(config: RunConfig, data: Dataset) -> MLP:
    own = {name: getattr(config, name) for name in ("width", "depth", "widths", "activation", "initial_weights")}
    return MLP(data.train_inputs[0].numel(), **own)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over examples of −log p(label), in nats; targets one-hot (B, classes)."""
    return F.cross_entropy(logits, targets)


_LOSSES: dict[str, Loss] = {"squared_error": mean_squared_error, "cross_entropy": _cross_entropy}

MNIST = Experiment(
    "mnist",
    "MNIST",
    load=lambda config: SOURCE.load(config.examples, config.data),
    model=_model,
    loss=lambda config: _LOSSES[getattr(config, "loss", "squared_error")],  # others may take it without its settings
    metric=lambda config: error_rate,
    metric_name="test error",
    settings=MLPSettings,
    profiles={
        "quick": {"examples": 1000, "width": 200, "depth": 4, "steps": 600, "measure_every": 25},
        "reduced": {"examples": 1000, "width": 200, "depth": 4, "steps": 1500, "measure_every": 25},
        "paper": {"examples": None, "width": 1000, "depth": 4, "steps": 4000, "measure_every": 20},
    },
    chunk=10_000,
    record=2,  # 1 had other initial weights
)
