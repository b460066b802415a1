"""SAM with mini-batches on a linear regression, whose curvature cannot move: what its edge then looks like."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..mean_square import sgd_sharpness
from ..noise import noise_fraction
from ..optim import EPSILON

__all__ = ["sam_on_regression"]

Row = dict[str, float]


def sam_on_regression(
    batch_sizes: Sequence[int],
    rhos: Sequence[float],
    seeds: Sequence[int],
    examples: int = 100,
    decay: float = 0.5,
    rate: float = 0.5,
    steps: int = 3000,
) -> list[Row]:
    """SAM's factor φ on a fixed linear regression f = Jw, and the ratio φηλ_gen/2 that follows from it.

    The tangent kernel never changes, so that a ratio near 1 can only come from the gradient: it shrinks until SAM's
    perturbation, whose length is fixed, makes up for the distance from the edge.

    Args:
        batch_sizes: B.
        rhos: ρ > 0.
        seeds: of regression and mini-batches.
        examples: N; J is Gaussian with 2N columns, scaled by i^−α.
        decay: α.
        rate: η as a share of 2/λ_gen, the edge without SAM.
        steps: length of the runs; φ is of the second half.

    Returns:
        One row for each seed, B and ρ: ``learning_rate``, ``sgd_sharpness`` λ_gen, ``factor`` φ, ``edge_ratio``
        φηλ_gen/2, and ``drift``, the gradient's mean square in the last quarter over that in the third.
    """
    rows = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        scales = torch.arange(1, 2 * examples + 1, dtype=torch.float64) ** -decay
        jacobian = torch.randn(examples, 2 * examples, generator=generator, dtype=torch.float64) * scales
        targets = torch.randn(examples, generator=generator, dtype=torch.float64)
        theta = 2 / examples * jacobian @ jacobian.mT
        edges = {b: sgd_sharpness(theta, noise_fraction(examples, b)).value for b in batch_sizes}
        cells = [(batch_size, rho) for batch_size in batch_sizes for rho in rhos]
        sharpness = torch.tensor([edges[b] for b, _ in cells], dtype=torch.float64)
        sizes, radii = (torch.tensor(column) for column in zip(*cells, strict=True))
        found = _descend(jacobian, targets, rate * 2 / sharpness, sizes, radii.double(), steps, generator)
        for (batch_size, rho), top, sums in zip(cells, sharpness.tolist(), found, strict=True):
            factor = float(sums[:, 0].sum() / sums[:, 1].sum())
            rows.append(
                {"seed": seed, "decay": decay, "batch_size": batch_size, "rho": rho, "learning_rate": rate * 2 / top}
                | {"sgd_sharpness": top, "factor": factor, "edge_ratio": rate * factor}
                | {"drift": float(sums[1, 1] / sums[0, 1])}
            )
    return rows


def _descend(
    jacobian: Tensor,
    targets: Tensor,
    learning_rates: Tensor,
    batch_sizes: Tensor,
    rhos: Tensor,
    steps: int,
    generator: torch.Generator,
) -> Tensor:
    """Sums of ⟨g_SAM, g⟩ and ‖g‖² over the third and the last quarter of M runs from w = 0, shape (M, 2, 2)."""
    w = torch.zeros(len(rhos), jacobian.shape[1], dtype=torch.float64)
    sums = torch.zeros(len(rhos), 2, 2, dtype=torch.float64)
    for step in range(steps):
        # The first B of one random order are a random subset for each B.
        place = torch.rand(len(targets), generator=generator).argsort().argsort()
        shares = (place < batch_sizes[:, None]).double() * 2 / batch_sizes[:, None]
        g = (shares * (w @ jacobian.mT - targets)) @ jacobian
        perturbed = w + rhos[:, None] * g / (g.norm(dim=1, keepdim=True) + EPSILON)
        ascended = (shares * (perturbed @ jacobian.mT - targets)) @ jacobian
        if step >= steps // 2:
            quarter = int(step >= steps * 3 / 4)
            sums[:, quarter] += torch.stack([(ascended * g).sum(1), g.square().sum(1)], 1)
        w = w - learning_rates[:, None] * ascended
    return sums
