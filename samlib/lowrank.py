"""What an eigen-solver leaves to the next: a low-rank model of the operator, kept up to date, and used to precondition."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .ritz import inner

__all__ = ["LowRank", "correction", "least_change"]


class LowRank(NamedTuple):
    """A symmetric matrix U diag(μ) U*: orthonormal ``vectors`` U (P, r) and ``values`` μ (r,), largest first."""

    vectors: Tensor
    values: Tensor


def correction(residuals: Tensor, theta: Tensor, upper: list[bool], model: LowRank, closest: float) -> Tensor:
    """θ (θ − M)⁻¹ r for each residual r of a Ritz value θ: first-order perturbation theory, in which the model's
    vectors mix the more, the nearer their values are. A pair at the upper end is taken to lie above the model's values
    by the distance ``closest`` at least, one at the lower end below them: the model is of yesterday.
    """
    distance = theta[:, None] - model.values
    above = torch.tensor(upper, device=theta.device)[:, None]
    distance = torch.where(above, distance.clamp_min(closest), distance.clamp_max(-closest))
    return residuals + (residuals @ model.vectors.conj()) * (model.values / distance) @ model.vectors.mT


def least_change(
    model: LowRank | None,
    basis: Tensor,
    image: Tensor,
    keep: Callable[[int], list[int]],
    projected: Tensor | None = None,
) -> LowRank:
    """The symmetric matrix nearest to a model M that maps an orthonormal basis V to its image H V, cut to low rank.

    That is P H + H P − P H P + (1 − P) M (1 − P) with P = V V*.

    Args:
        model: what was known before; 0 if None.
        basis: V, shape (P, m).
        image: H V, shape (P, m).
        keep: of a number of eigenpairs, largest first, the indices to keep.
        projected: V* H V, where it is known.

    Source: Powell's symmetric Broyden update (1970), for several vectors at once.
    """
    rows, count, eps = basis.mT, basis.shape[1], torch.finfo(image.dtype).eps  # rows, as in the solver
    scale = image.abs().max().clamp_min(torch.finfo(image.dtype).tiny)  # squares of large numbers overflow
    projected = inner(rows, image.mT) if projected is None else projected
    coordinates = (projected / scale.double().to(projected.device)).mT
    beside = image.mT / scale
    if model is not None:
        coordinates = torch.cat([coordinates.cpu(), inner(rows, model.vectors.mT).mT.cpu()])
        beside = torch.cat([beside, model.vectors.mT])
    beside.addmm_(coordinates.to(beside), rows, alpha=-1)
    # Everything else happens in coordinates: V, and an orthonormal basis of what lies beside it.
    coordinates, gram = coordinates.cpu(), _gram(beside, count)
    unit = gram.diagonal().real.sqrt().clamp_min(1000 * eps)
    lengths, turned = torch.linalg.eigh(gram / unit / unit[:, None])
    # Squares of lengths: dropping one costs its root, keeping it eps/length² of orthogonality; here they are equal.
    seen = lengths > eps ** (2 / 3)
    whiten = (turned[:, seen] / lengths[seen].sqrt()).mT / unit
    across = whiten.conj() @ gram  # of the orthonormal basis with every vector beside V
    matrix = gram.new_zeros(count + len(across), count + len(across))
    matrix[:count, :count] = coordinates[:count].mT
    matrix[count:, :count] = across[:, :count]
    if model is not None:
        old = across[:, count:]
        matrix[count:, count:] = old * (model.values.double() / scale.double()).cpu() @ old.mH
    values, vectors = torch.linalg.eigh(matrix)  # of the lower triangle
    values, vectors = values.flip(0), vectors.mT.flip(0)
    kept = keep(len(values))
    vectors = vectors[kept]
    found = (vectors[:, :count].to(basis) @ rows).addmm_((vectors[:, count:] @ whiten).to(basis), beside)
    return LowRank(found.mT, values[kept].to(scale) * scale)


def _gram(rows: Tensor, split: int) -> Tensor:
    """Inner products of rows with one another, on the CPU; what lies above the diagonal blocks is not done twice."""
    upper, lower = inner(rows[:split], rows[:split]), inner(rows, rows[split:])
    return torch.cat([torch.cat([upper, lower[:split].mH]), lower], 1).cpu()
