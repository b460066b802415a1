"""The paper's first experiment: a fully connected network on handwritten digits, squared error, full batch."""

from __future__ import annotations

from ..datasets import MNIST as SOURCE
from ..models import MLP
from ..settings import Count, Settings
from .base import Experiment, error_rate, mean_squared_error

__all__ = ["MNIST"]


class MLPSettings(Settings):
    """Width and depth of the network: hidden units and linear layers."""

    width: Count
    depth: Count


MNIST = Experiment(
    "mnist",
    "MNIST",
    load=lambda config: SOURCE.load(config.examples, config.data),
    model=lambda config, data: MLP(data.train_inputs[0].numel(), config.width, config.depth),
    loss=lambda config: mean_squared_error,
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
