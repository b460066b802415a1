"""The exact edge of stability of stochastic gradient descent in mean square, on squared error.

See :mod:`samlib.noise` for the model and its symbols. K* says how far a learning rate is from the edge, which is at
K* = 1; the *batch-aware sharpness* λ_gen puts the same edge at ηλ_gen = 2. With B = N it is the sharpness, λ_max(Θ).
Both need the tangent kernel in full, and take time cubic in its rows.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .noise import check_noise
from .tangent import MOST_ROWS

__all__ = ["KernelNorm", "SgdSharpness", "exact_kernel_norm", "sgd_sharpness"]


class KernelNorm(NamedTuple):
    """The exact kernel norm.

    Attributes:
        value: K*; infinite where (1 − p)ηλ_max ≥ 2: SGD is unstable on its own account, without the noise.
        residual: an eigenvalue of the map that K* is the largest of lies within this distance of ``value``.
        weights: what each example contributes to the most unstable covariance, (N,), adding up to 1.
        applies: whether K* < 1 decides whether the residual goes to zero. False where K* is infinite, and where Θ is
            singular: the residual's part outside its range never moves, and K* is about the rest.
    """

    value: float
    residual: float
    weights: Tensor
    applies: bool


def exact_kernel_norm(
    theta: Tensor, learning_rate: float, fraction: float, outputs: int = 1, tol: float = 1e-6
) -> KernelNorm:
    """The exact kernel norm K*: SGD on a linear model is stable in mean square if and only if K* < 1.

    The spectral radius of the symmetric positive map on block diagonals

        D ↦ bd(V [W ∘ (Vᵀ D V)] Vᵀ),    W_ab = p N η / (1/λ_a + 1/λ_b − (1 − p)η),    Θ = V Λ Vᵀ

    :func:`~samlib.noise.kernel_norm` is its Rayleigh quotient at D = 1, so K ≤ K*. Near ηλ_max = 2 it is
    ill-conditioned, where :func:`sgd_sharpness` is not. Without noise, p = 0, it is 0.

    Args:
        theta: Θ from :func:`~samlib.tangent.ntk_matrix`, (NC, NC), rows ordered example by example.
        learning_rate: step size η.
        fraction: p, from :func:`~samlib.noise.noise_fraction`.
        outputs: C.
        tol: residual relative to the value at which to stop; the value's own error is of second order in it.

    Raises:
        ValueError: if an argument is out of range, theta is no symmetric matrix without negative eigenvalues, or NC is
            above 4,000.

    >>> round(exact_kernel_norm(torch.eye(2), learning_rate=0.5, fraction=1.0).value, 9)  # equal examples: K* = K
    0.5
    """
    check_noise(learning_rate, fraction, outputs)
    values, vectors, singular = _decomposed(theta, outputs)
    examples, uniform = len(vectors), torch.full((len(vectors),), 1 / len(vectors), dtype=torch.float64)
    if (1 - fraction) * learning_rate * values[-1] >= 2:
        return KernelNorm(math.inf, 0.0, uniform, False)
    inverse = 1 / values  # of zero: infinite, so that W is zero
    w = (fraction * examples * learning_rate) / (inverse[:, None] + inverse - (1 - fraction) * learning_rate)

    def apply(blocks: Tensor) -> Tensor:
        return _blocks_of(_between(blocks, vectors).mul_(w), vectors)

    start = torch.eye(outputs, dtype=torch.float64, device=theta.device).repeat(examples, 1, 1)
    value, residual, blocks = _largest(apply, start, tol)
    shares = blocks.diagonal(dim1=1, dim2=2).sum(1).cpu()
    return KernelNorm(value, residual, shares / shares.sum(), not singular)


class SgdSharpness(NamedTuple):
    """The batch-aware sharpness.

    Attributes:
        value: λ_gen, in the units of the sharpness.
        residual: an eigenvalue of the operator that λ_gen is the largest of lies within this distance of ``value``.
        applies: whether ηλ_gen < 2 decides whether the residual goes to zero. False where Θ is singular: the
            residual's part outside its range never moves, and λ_gen is about the rest.
    """

    value: float
    residual: float
    applies: bool


def sgd_sharpness(theta: Tensor, fraction: float, outputs: int = 1, tol: float = 1e-5) -> SgdSharpness:
    """The batch-aware sharpness λ_gen: SGD on a linear model is stable in mean square if and only if ηλ_gen < 2.

    The largest λ with D(S) = λ C(S) for a symmetric S ≠ 0, where

        C(S) = ½(ΘS + SΘ),    D(S) = R [(1 − p) RSR + p N bd(RSR)] R,    R = Θ^½

    It is at least λ_max(Θ), which it equals for B = N, and does not grow with B.

    Args:
        theta, fraction, outputs: as for :func:`exact_kernel_norm`.
        tol: residual relative to the value at which to stop; the value's own error is of second order in it.

    Raises:
        ValueError: as :func:`exact_kernel_norm`.

    Source: the threshold of Mulayoff & Michaeli (2024), arXiv:2306.07850, carried over to Θ.

    >>> sgd_sharpness(torch.diag(torch.tensor([1.0, 3.0])), fraction=0.0).value
    3.0
    """
    check_noise(1.0, fraction, outputs)
    values, vectors, singular = _decomposed(theta, outputs)
    # In the eigenvectors of Θ, and with C^½ S C^½ in place of S, the operator is G [(1 − p) + p N bd] G.
    inverse = 1 / values
    g = (2 / (inverse[:, None] + inverse)).sqrt_()

    def apply(s: Tensor) -> Tensor:
        inner = g * s
        noise = _between(_blocks_of(inner, vectors), vectors)
        return inner.mul_(1 - fraction).add_(noise, alpha=fraction * len(vectors)).mul_(g)

    start = torch.eye(len(values), dtype=torch.float64, device=theta.device)
    value, residual, _ = _largest(apply, start, tol)
    return SgdSharpness(value, residual, not singular)


def _decomposed(theta: Tensor, outputs: int) -> tuple[Tensor, Tensor, bool]:
    """Eigenvalues (NC,) of Θ, smallest first, eigenvectors (N, C, NC), and whether some eigenvalues are zero."""
    matrix = torch.as_tensor(theta).double()
    rows = matrix.shape[0] if matrix.dim() == 2 else 0
    if not rows or matrix.shape[1] != rows or rows % outputs:
        raise ValueError(f"theta must be NC × NC with C = {outputs} outputs, got {tuple(matrix.shape)}")
    if rows > MOST_ROWS:
        raise ValueError(f"theta has {rows:,} rows; at most {MOST_ROWS:,} are allowed, take fewer examples")
    scale = matrix.abs().max()
    if not bool(scale.isfinite()) or not bool((matrix - matrix.mT).abs().max() <= 1e-5 * scale):
        raise ValueError("theta must be a finite symmetric matrix")
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    if values[0] < -1e-5 * values[-1].abs():
        raise ValueError(f"theta must have no negative eigenvalues, found {float(values[0]):g}")
    zero = values <= rows * torch.finfo(torch.float64).eps * values[-1]
    return values.masked_fill(zero, 0), vectors.view(rows // outputs, outputs, rows), bool(zero.any())


def _between(blocks: Tensor, vectors: Tensor) -> Tensor:
    """Vᵀ D V for a block diagonal D (N, C, C)."""
    return vectors.flatten(0, 1).mT @ (blocks @ vectors).flatten(0, 1)


def _blocks_of(inner: Tensor, vectors: Tensor) -> Tensor:
    """bd(V X Vᵀ), shape (N, C, C), for a symmetric X."""
    return (vectors.flatten(0, 1) @ inner).view_as(vectors) @ vectors.mT


def _largest(
    apply: Callable[[Tensor], Tensor], start: Tensor, tol: float, budget: int = 500
) -> tuple[float, float, Tensor]:
    """The largest eigenvalue of a symmetric positive map, its residual, and its vector.

    The locally optimal conjugate gradient method: Rayleigh–Ritz on the vector, its residual and the direction of the
    step before, so that memory is that of ten vectors, which are matrices here. A positive map (one that keeps
    matrices positive semidefinite) has such a matrix as the vector of its largest eigenvalue, and the identity as a
    start cannot miss it: their cosine is at least one over the root of the rows.

    Source: Knyazev (2001), *Toward the optimal preconditioned eigensolver*.
    """
    if not tol > 0:
        raise ValueError(f"tol must be positive, got {tol!r}")
    x = start / start.norm()
    x, step = torch.stack([x, apply(x)]), None  # every vector with its image
    for left in reversed(range(budget)):
        value = _inner(x[0], x[1])
        gap = x[1] - value * x[0]
        residual = float(gap.norm())
        if residual <= tol * value or not left:
            break
        gap = gap / residual
        gap -= _inner(x[0], gap) * x[0]
        basis = [x, torch.stack([gap, apply(gap)]) / gap.norm()]
        if step is not None:
            step /= step[0].norm()
            for v in basis * 2:  # twice is enough
                step -= _inner(v[0], step[0]) * v
            if (length := step[0].norm()) > 1e-6:
                basis.append(step / length)
        projected = torch.tensor([[_inner(v[0], w[1]) for w in basis] for v in basis], dtype=torch.float64)
        turn = torch.linalg.eigh(projected)[1][:, -1].tolist()
        step = sum((c * v for c, v in zip(turn[1:], basis[1:], strict=True)), torch.zeros(()))
        x = turn[0] * x + step
    if residual > tol * value:
        warnings.warn(
            f"the largest eigenvalue has not converged after {budget} products: residual {residual:.2e} against "
            f"{tol * value:.2e}; raise tol",
            RuntimeWarning,
            stacklevel=3,
        )
    return value, residual, x[0]


def _inner(v: Tensor, w: Tensor) -> float:
    return float((v * w).sum())
