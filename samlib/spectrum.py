"""What a whole spectrum looks like: stochastic estimates of trace and density, with their errors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .ritz import inner, orthonormal
from .symmetric import Operator, as_operator

__all__ = ["SpectralDensity", "hutchinson_trace", "spectral_density"]


@torch.no_grad()
def hutchinson_trace(operator: Any, probes: int = 30, generator: torch.Generator | None = None) -> tuple[float, float]:
    """The trace of a symmetric operator, and the standard error of the estimate.

    Averages v·(H v) over random sign vectors v; each costs one product.

    Args:
        operator: the Hessian, or any symmetric (P, P) operator that :func:`samlib.eigen.as_operator` takes.
        probes: number of random vectors, at least 2.
        generator: source of the signs; seeded with 0 if not given.

    Raises:
        ValueError: with fewer than two probes, which have no standard error.

    Source: Hutchinson (1990), *A stochastic estimator of the trace of the influence matrix*.

    >>> hutchinson_trace(torch.diag(torch.tensor([3.0, -1.0, 2.0])))  # exact for diagonal matrices
    (4.0, 0.0)
    """
    if probes < 2:
        raise ValueError(f"probes must be at least 2, got {probes}")
    operator = as_operator(operator)
    samples = torch.stack(
        [inner(v[None], (operator @ v)[None])[0, 0].real for v in _signs(operator, probes, generator)]
    )
    return float(samples.mean()), float(samples.std() / probes**0.5)


@dataclass(frozen=True)
class SpectralDensity:
    """A quadrature of a spectrum: each probe's nodes θ and weights, which sum to one, shapes (probes, steps)."""

    nodes: Tensor
    weights: Tensor

    def __call__(self, at: Tensor, width: float) -> Tensor:
        """The density at some points (n,), each node smoothed to a Gaussian of standard deviation ``width``."""
        bumps = torch.exp(-(((at[:, None, None] - self.nodes) / width) ** 2) / 2) / (width * (2 * torch.pi) ** 0.5)
        return (bumps * self.weights).sum(-1).mean(-1)

    def moment(self, power: int) -> float:
        """The mean of λ to a power over the spectrum, trace(Hᵖ)/P: exact in expectation for p < 2 · steps."""
        return float((self.nodes**power * self.weights).sum(-1).mean())


@torch.no_grad()
def spectral_density(
    operator: Any, probes: int = 4, steps: int = 60, generator: torch.Generator | None = None
) -> SpectralDensity:
    """How the eigenvalues of a symmetric operator are spread: stochastic Lanczos quadrature.

    Args:
        operator: the Hessian, or any symmetric (P, P) operator that :func:`samlib.eigen.as_operator` takes.
        probes: number of random sign vectors.
        steps: Lanczos steps for each; a probe costs as many products, and keeps as many vectors (P,) in memory.
        generator: source of the signs; seeded with 0 if not given.

    Raises:
        ValueError: if ``probes`` or ``steps`` is less than 1.

    Source: Ubaru, Chen & Saad (2017), *Fast estimation of tr(f(A)) via stochastic Lanczos quadrature*; Ghorbani,
    Krishnan & Xiao (2019), arXiv:1901.10159.
    """
    if probes < 1 or steps < 1:
        raise ValueError(f"probes and steps must be at least 1, got {probes} and {steps}")
    operator = as_operator(operator)
    steps = min(steps, operator.size)
    nodes, weights = torch.zeros(2, probes, steps, dtype=torch.float64)
    for probe, start in enumerate(_signs(operator, probes, generator)):
        basis = start.new_zeros(steps, operator.size)
        basis[0] = start / operator.size**0.5
        tridiagonal = torch.zeros(steps, steps, dtype=torch.float64)
        for step in range(steps):
            image = operator @ basis[step]
            tridiagonal[step, step] = inner(basis[step : step + 1], image[None])[0, 0].real
            # Full orthogonalisation: without it, copies of converged values appear.
            vector, length = orthonormal(basis[: step + 1], image)
            scale = float(tridiagonal.abs().max())
            if vector is None or step + 1 == steps or length <= 100 * torch.finfo(image.dtype).eps * scale:
                break
            basis[step + 1] = vector
            tridiagonal[step, step + 1] = tridiagonal[step + 1, step] = length
        theta, vectors = torch.linalg.eigh(tridiagonal[: step + 1, : step + 1])
        nodes[probe, : len(theta)], weights[probe, : len(theta)] = theta, vectors[0].square()
    return SpectralDensity(nodes, weights)


def _signs(operator: Operator, count: int, generator: torch.Generator | None) -> Iterator[Tensor]:
    """Random vectors (P,) of ±1."""
    generator = generator or torch.Generator().manual_seed(0)
    for _ in range(count):
        signs = 2 * torch.randint(2, (operator.size,), generator=generator) - 1
        yield signs.to(operator.device, operator.dtype)
