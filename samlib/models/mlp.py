"""The fully connected network."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from .initial import glorot

__all__ = ["ACTIVATIONS", "MLP"]

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}


class MLP(nn.Sequential):
    """Fully connected ReLU network: ``depth`` linear layers, ``width`` units in each hidden one.

    Maps (B, …) to (B, classes). Glorot-normal weights (truncated), zero biases.

    Args:
        inputs: number of input features, after flattening.
        width: units in each hidden layer.
        depth: number of linear layers (4 in the paper: three hidden ones).
        classes: number of outputs.
        widths: units of each hidden layer, in place of ``width`` and ``depth``.
        activation: "relu", "tanh" or "gelu", between the layers.
        initial_weights: "glorot" as above, or "pytorch" for those that ``nn.Linear`` has of itself.

    Raises:
        ValueError: if ``activation`` or ``initial_weights`` is not known.

    >>> MLP(4, widths=(8, 3), activation="tanh", classes=2)
    MLP(
      (0): Flatten(start_dim=1, end_dim=-1)
      (1): Linear(in_features=4, out_features=8, bias=True)
      (2): Tanh()
      (3): Linear(in_features=8, out_features=3, bias=True)
      (4): Tanh()
      (5): Linear(in_features=3, out_features=2, bias=True)
    )
    """

    def __init__(
        self,
        inputs: int = 784,
        width: int = 1000,
        depth: int = 4,
        classes: int = 10,
        *,
        widths: Sequence[int] = (),
        activation: str = "relu",
        initial_weights: str = "glorot",
    ) -> None:
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        if initial_weights not in ("glorot", "pytorch"):
            raise ValueError(f"initial_weights must be glorot or pytorch, got {initial_weights!r}")
        sizes = [inputs, *(widths or [width] * (depth - 1)), classes]
        layers: list[nn.Module] = [nn.Flatten()]
        for fan_in, fan_out in pairwise(sizes):
            linear = nn.Linear(fan_in, fan_out)
            layers += [glorot(linear) if initial_weights == "glorot" else linear, ACTIVATIONS[activation]()]
        super().__init__(*layers[:-1])
