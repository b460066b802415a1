"""The convolutional network."""

from __future__ import annotations

from torch import nn

from ..layers import LayerNorm, MaxPool
from .initial import glorot

__all__ = ["CNN"]


class CNN(nn.Sequential):
    """Convolutional network: blocks of [3×3 same conv → ReLU → LayerNorm over channels → 2×2 max-pool], then linear.

    Maps images (B, C, H, W) to (B, classes). Glorot-normal weights (truncated), zero biases.

    Args:
        image: (C, H, W) of the images.
        channels: channels of each block.
        classes: number of outputs.
    """

    def __init__(
        self, image: tuple[int, int, int] = (3, 32, 32), channels: tuple[int, ...] = (16, 32), classes: int = 10
    ) -> None:
        before, height, width = image
        layers: list[nn.Module] = []
        for after in channels:
            conv = glorot(nn.Conv2d(before, after, 3, padding="same"))
            layers += [conv, nn.ReLU(), LayerNorm(after, dim=1, eps=1e-6), MaxPool()]
            before, height, width = after, height // 2, width // 2
        super().__init__(*layers, nn.Flatten(), glorot(nn.Linear(before * height * width, classes)))
