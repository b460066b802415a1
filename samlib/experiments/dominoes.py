"""Digits on CIFAR-10: one label with an easy feature, the digit, and a hard one, the object below it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from ..datasets import Dataset
from ..datasets.dominoes import CLASSES, TILES, load_dominoes
from ..models.dominoes import FeatureNetwork, convolutional, fully_connected
from ..settings import Count, Names, Settings, Share, Truth
from .base import Experiment, error_rate

if TYPE_CHECKING:
    from ..config import RunConfig

__all__ = ["DIGITS_ON_CIFAR"]


class DominoSettings(Settings):
    """The classes, pictures per class, side of a tile, the share of pictures with the right digit, and the network."""

    classes: Names = CLASSES
    images_per_class: Count = 400
    tile: Annotated[int, Field(ge=1)] = 16
    agreement: Share = 1.0
    network: Literal["convolutional", "mlp"] = "convolutional"
    batch_norm: Truth = True


def _load(config: RunConfig) -> Dataset:
    if config.examples is not None:
        raise ValueError("examples is not for digits_on_cifar; give images_per_class")
    return load_dominoes(
        config.classes,
        images_per_class=config.images_per_class,
        test_images_per_class=min(config.images_per_class, 400),
        agreement=config.agreement,
        tile=config.tile,
        seed=config.seed,
        policy=config.data,
    )


def _model(config: RunConfig, data: Dataset) -> FeatureNetwork:
    image = tuple(data.train_inputs.shape[1:])
    build = convolutional if config.network == "convolutional" else fully_connected
    return build(image, classes=len(config.classes), batch_norm=config.batch_norm)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over examples of −log p(label), in nats; targets one-hot (B, classes)."""
    return F.cross_entropy(logits, targets)


def _check(config: RunConfig) -> None:
    unknown = [name for name in config.classes if name not in CLASSES]
    if unknown or len(set(config.classes)) < max(2, len(config.classes)):
        raise ValueError(f"classes must be at least two different ones of {', '.join(CLASSES)}, got {config.classes}")
    if config.tile not in TILES:
        raise ValueError(f"tile must be one of {', '.join(map(str, TILES))}, got {config.tile}")


_STEPS = {"batch_size": 64, "momentum": 0.9, "loss_every": 10}

DIGITS_ON_CIFAR = Experiment(
    "digits_on_cifar",
    "Digits on CIFAR-10",
    load=_load,
    model=_model,
    loss=lambda config: _cross_entropy,
    metric=lambda config: error_rate,
    metric_name="test error",
    settings=DominoSettings,
    profiles={
        "quick": {**_STEPS, "images_per_class": 100, "steps": 300, "measure_every": 100},
        "reduced": {**_STEPS, "steps": 4000, "measure_every": 4000},
        "paper": {**_STEPS, "images_per_class": 1000, "tile": 32, "steps": 20_000, "measure_every": 2000},
    },
    chunk=500,
    measure_on="all",
    seeded_data=True,
    check=_check,
)
