"""How the networks' weights start."""

from __future__ import annotations

import math
from typing import TypeVar

from torch import Tensor, nn

__all__ = ["TRUNCATION", "glorot", "scaled", "truncated_normal"]

TRUNCATION = 0.87962566103423978  # what truncation at ±2 leaves of a standard deviation

Layer = TypeVar("Layer", nn.Linear, nn.Conv2d)


def glorot(layer: Layer) -> Layer:
    """Weights of variance 2/(fan_in + fan_out), from a normal distribution truncated at two standard deviations."""
    fan_in, fan_out = nn.init._calculate_fan_in_and_fan_out(layer.weight)
    truncated_normal(layer.weight, math.sqrt(2 / (fan_in + fan_out)))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def scaled(layer: nn.Linear, layers: int) -> nn.Linear:
    """Weights of variance 2/(layers · fan_in), from a truncated normal distribution."""
    truncated_normal(layer.weight, math.sqrt(2 / (layers * layer.in_features)))
    nn.init.zeros_(layer.bias)
    return layer


def truncated_normal(weight: Tensor, std: float) -> None:
    """Fill with a normal distribution truncated at two of its standard deviations, ``std`` afterwards."""
    before = std / TRUNCATION
    nn.init.trunc_normal_(weight, std=before, a=-2 * before, b=2 * before)
