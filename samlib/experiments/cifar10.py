"""The paper's second experiment: a convolutional network on 1,000 colour images, squared error, full batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..datasets import CIFAR10 as SOURCE
from ..datasets import Dataset
from ..models import CNN
from ..settings import Count, Settings
from .base import Experiment, error_rate, mean_squared_error

if TYPE_CHECKING:
    from ..config import RunConfig

__all__ = ["CIFAR10"]


class CNNSettings(Settings):
    """Channels of the first block, doubled in each further one, and the number of blocks."""

    width: Count
    depth: Count


def _model(config: RunConfig, data: Dataset) -> CNN:
    channels, height, width = data.train_inputs.shape[1:]
    return CNN((channels, height, width), tuple(config.width * 2**block for block in range(config.depth)))


def _check(config: RunConfig) -> None:
    if config.depth > 5:
        raise ValueError(f"depth must be at most 5 for cifar10 (each block halves the images), got {config.depth}")


CIFAR10 = Experiment(
    "cifar10",
    "CIFAR-10",
    load=lambda config: SOURCE.load(config.examples, config.data),
    model=_model,
    loss=lambda config: mean_squared_error,
    metric=lambda config: error_rate,
    metric_name="test error",
    settings=CNNSettings,
    profiles={
        "quick": {"examples": 200, "width": 8, "depth": 2, "steps": 150, "measure_every": 10},
        "reduced": {"examples": 1000, "width": 16, "depth": 2, "steps": 250, "measure_every": 10},
        "paper": {"examples": 1000, "width": 16, "depth": 2, "steps": 5000, "measure_every": 25},
    },
    chunk=50,  # fits the cache
    check=_check,
    record=2,  # 1 had other initial weights, and LayerNorm's ε at 1e-5
)
