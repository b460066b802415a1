"""The paper's third experiment: a Transformer on the characters of tiny_shakespeare, cross-entropy, mini-batches."""

from __future__ import annotations

from ..datasets import SHAKESPEARE as SOURCE
from ..models import Transformer
from ..settings import Count, Settings
from .base import Experiment, cross_entropy, mean_loss

__all__ = ["SHAKESPEARE"]


class TransformerSettings(Settings):
    """Model size, blocks, attention heads, and tokens in a training sequence."""

    width: Count
    depth: Count
    heads: Count
    sequence_length: Count


_ALL = {"examples": None, "sequence_length": 64}

SHAKESPEARE = Experiment(
    "shakespeare",
    "tiny_shakespeare",
    load=lambda config: SOURCE.load(config.examples, config.data, sequence_length=config.sequence_length),
    model=lambda config, _: Transformer(128, config.sequence_length, config.width, config.depth, config.heads),
    loss=lambda config: cross_entropy,
    metric=lambda config: mean_loss(cross_entropy),
    metric_name="test loss",
    settings=TransformerSettings,
    profiles={
        "quick": _ALL | {"width": 32, "depth": 2, "heads": 2, "batch_size": 32, "steps": 200, "measure_every": 10},
        "reduced": _ALL | {"width": 64, "depth": 2, "heads": 4, "batch_size": 32, "steps": 800, "measure_every": 20},
        "paper": _ALL | {"width": 128, "depth": 6, "heads": 8, "batch_size": 128, "steps": 10_000, "measure_every": 50},
    },
    chunk=128,
    record=2,  # 1 had other initial weights
)
