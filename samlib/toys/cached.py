"""What a held perturbation does: until the next true gradient, the perturbed point follows the base optimizer."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pandas as pd
import torch
from torch import Tensor, nn

from ..optim import EPSILON, SAM

__all__ = ["BASES", "departure", "identity"]

BASES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "gradient descent": torch.optim.SGD,
    "heavy ball": functools.partial(torch.optim.SGD, momentum=0.9),
    "Nesterov": functools.partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    "Adam": torch.optim.Adam,
    "gradient descent with L2 decay": functools.partial(torch.optim.SGD, weight_decay=0.1),
    "AdamW": functools.partial(torch.optim.AdamW, weight_decay=0.1),
}
"""Optimizers that a direction is held around; the last two decay the weights."""


def departure(base: Callable[..., torch.optim.Optimizer], every: int = 10, seed: int = 0) -> float:
    """How far SAM's perturbed point, its direction held, leaves the path of the base optimizer started there.

    With e held, w + e takes the base's steps exactly: w ← w − η u(w + e). Weight decay acts on w and breaks that.

    Args:
        base: an optimizer class.
        every: number of steps, all before the next true gradient.
        seed: of a random quadratic with a quartic term in 8 dimensions, float64.

    Returns:
        The largest distance over the length of the path.
    """
    generator = torch.Generator().manual_seed(seed)
    half = torch.randn(8, 8, dtype=torch.float64, generator=generator)
    start = torch.randn(8, dtype=torch.float64, generator=generator)

    def loss(w: Tensor) -> Tensor:
        return 0.05 * (half @ w).square().sum() + 0.02 * w.pow(4).sum()

    w, rho = nn.Parameter(start.clone()), 0.3
    held = SAM([w], base, rho=rho, every=every, beta=1.0, lr=0.05)
    with torch.enable_grad():
        [gradient] = torch.autograd.grad(loss(w), w)
    e = rho * gradient / (gradient.norm() + EPSILON)
    p = nn.Parameter(start + e)
    alone = base([p], lr=0.05)
    for _ in range(every):
        held.step(_closure(held, loss, w))
        alone.step(_closure(alone, loss, p))
    return float((w + e - p).detach().norm() / (p - start - e).detach().norm())


def _closure(optimizer: torch.optim.Optimizer, loss: Callable[[Tensor], Tensor], w: Tensor) -> Callable[[], float]:
    def closure() -> float:
        optimizer.zero_grad()
        value = loss(w)
        value.backward()
        return float(value.detach())

    return closure


def identity(seeds: int = 5) -> pd.DataFrame:
    """:func:`departure` of each of :data:`BASES`, for some seeds: columns base, seed, departure."""
    rows = [(name, seed, departure(base, seed=seed)) for name, base in BASES.items() for seed in range(seeds)]
    return pd.DataFrame(rows, columns=["base", "seed", "departure"])
