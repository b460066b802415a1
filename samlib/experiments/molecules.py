"""Molecules: a graph transformer on sets of MoleculeNet, split by scaffold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..datasets import Dataset
from ..datasets.molecules import CLASSIFICATION, SOURCES, load_molecules
from ..models.graph import GraphTransformer
from ..objective import Loss
from ..settings import Count, Settings, Whole
from .base import Experiment, Metric, joined
from .molecule_metrics import rmse, roc_auc

if TYPE_CHECKING:
    from ..config import RunConfig

__all__ = ["MOLECULES"]


class MoleculeSettings(Settings):
    """The set, the seed of its scaffold split, the part it is tested on, and the size of the network."""

    molecules: str = "esol"
    split: Whole = 0
    held_out: Literal["test", "validation"] = "test"
    width: Count = 64
    layers: Count = 3
    heads: Count = 4


def _model(config: RunConfig, data: Dataset) -> GraphTransformer:
    key_size = max(1, config.width // config.heads)
    outputs = data.train_targets.shape[1]
    return GraphTransformer(config.width, config.layers, config.heads, key_size, outputs=outputs)


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean over molecules and tasks of (output − target)²; a missing target counts as met."""
    known = targets.isfinite()
    return torch.where(known, outputs - targets.nan_to_num(), 0.0).square().mean()


def logistic_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean over molecules and tasks of −log p(label), in nats; a missing label counts as zero."""
    known = targets.isfinite()
    losses = F.binary_cross_entropy_with_logits(outputs, targets.nan_to_num(), reduction="none")
    return torch.where(known, losses, 0.0).mean()


def _loss(config: RunConfig) -> Loss:
    return logistic_loss if config.molecules in CLASSIFICATION else squared_error


def _metric(config: RunConfig) -> Metric:
    # An error in either case: lower is better.
    return joined(lambda o, y: 1 - roc_auc(o, y)) if config.molecules in CLASSIFICATION else joined(rmse)


def _check(config: RunConfig) -> None:
    if config.molecules not in SOURCES:
        raise ValueError(f"molecules must be one of {', '.join(SOURCES)}, got {config.molecules!r}")


_STEPS = {"base": "adam", "batch_size": 32, "schedule": "one_cycle"}

MOLECULES = Experiment(
    "molecules",
    "Molecules",
    load=lambda c: load_molecules(c.molecules, c.examples, c.data, c.split, c.held_out),
    model=_model,
    loss=_loss,
    metric=_metric,
    metric_name="test error (RMSE, or 1 − AUC)",
    settings=MoleculeSettings,
    profiles={
        "quick": {**_STEPS, "examples": 200, "width": 32, "layers": 2, "steps": 60, "measure_every": 20},
        "reduced": {**_STEPS, "steps": 560, "measure_every": 56},
        "paper": {**_STEPS, "width": 256, "layers": 6, "heads": 8, "steps": 4200, "measure_every": 140},
    },
    chunk=200,
    check=_check,
)
