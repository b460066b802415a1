"""The fully connected network."""

from __future__ import annotations

from itertools import pairwise

from torch import nn

from .initial import glorot

__all__ = ["MLP"]


class MLP(nn.Sequential):
    """Fully connected ReLU network: ``depth`` linear layers, ``width`` units in each hidden one.

    Maps (B, …) to (B, classes). Glorot-normal weights (truncated), zero biases.

    Args:
        inputs: number of input features, after flattening.
        width: units in each hidden layer.
        depth: number of linear layers (4 in the paper: three hidden ones).
        classes: number of outputs.
    """

    def __init__(self, inputs: int = 784, width: int = 1000, depth: int = 4, classes: int = 10) -> None:
        sizes = [inputs] + [width] * (depth - 1) + [classes]
        layers: list[nn.Module] = [nn.Flatten()]
        for fan_in, fan_out in pairwise(sizes):
            layers += [glorot(nn.Linear(fan_in, fan_out)), nn.ReLU()]
        super().__init__(*layers[:-1])
