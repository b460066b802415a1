"""Classifiers whose features can be looked at: convolutional or fully connected, with BatchNorm or without."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from ..layers import MaxPool

__all__ = ["FeatureNetwork", "convolutional", "fully_connected"]


class FeatureNetwork(nn.Module):
    """A ``body`` that makes features of examples, and a linear layer ``last`` that makes logits of features.

    Maps (B, …) to (B, classes). Weights start as PyTorch draws them.

    Args:
        body: maps (B, …) to features (B, width).
        width: number of features.
        classes: number of outputs.
    """

    def __init__(self, body: nn.Sequential, width: int, classes: int) -> None:
        super().__init__()
        self.body, self.last = body, nn.Linear(width, classes)

    def features(self, x: Tensor) -> Tensor:
        """What the last layer reads, shape (B, width)."""
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.features(x))


def convolutional(
    image: tuple[int, int, int] = (3, 32, 16),
    channels: tuple[int, ...] = (16, 32, 64),
    classes: int = 10,
    batch_norm: bool = True,
) -> FeatureNetwork:
    """Blocks of [3×3 same conv → BatchNorm → ReLU → 2×2 max-pool], the mean over the image, then linear.

    Args:
        image: (C, H, W) of the images.
        channels: channels of each block; the last is the number of features.
        classes: number of outputs.
        batch_norm: normalise, which takes the place of the convolutions' biases.

    Raises:
        ValueError: if the image is too small to be halved in each block.
    """
    if min(image[1:]) < 2 ** len(channels):
        raise ValueError(
            f"{len(channels)} blocks halve an image {len(channels)} times, which {image[1]}×{image[2]} pixels do not "
            f"allow; use at least {2 ** len(channels)} a side, or fewer blocks"
        )
    layers: list[nn.Module] = []
    for before, after in pairwise((image[0], *channels)):
        layers.append(nn.Conv2d(before, after, 3, padding="same", bias=not batch_norm))
        if batch_norm:
            layers.append(nn.BatchNorm2d(after))
        layers += [nn.ReLU(), MaxPool()]
    return FeatureNetwork(nn.Sequential(*layers, _MeanOverImage()), channels[-1], classes)


def fully_connected(
    image: tuple[int, int, int] = (3, 16, 8),
    widths: tuple[int, ...] = (128, 64),
    classes: int = 10,
    batch_norm: bool = False,
) -> FeatureNetwork:
    """Hidden layers of [linear → BatchNorm → ReLU], then linear.

    Args:
        image: (C, H, W) of the images.
        widths: units of each hidden layer; the last is the number of features.
        classes: number of outputs.
        batch_norm: normalise, which takes the place of the hidden layers' biases.
    """
    channels, height, width = image
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in pairwise((channels * height * width, *widths)):
        layers.append(nn.Linear(before, after, bias=not batch_norm))
        if batch_norm:
            layers.append(nn.BatchNorm1d(after))
        layers.append(nn.ReLU())
    return FeatureNetwork(nn.Sequential(*layers), widths[-1], classes)


class _MeanOverImage(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((-2, -1))
