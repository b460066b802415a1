"""What a solve leaves to the next: a low-rank model of the operator, kept up to date and used to precondition."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .ritz import inner, largest
from .symmetric import Operator

__all__ = ["LowRank", "correction", "least_change", "values_beside", "warm_start"]


class LowRank(NamedTuple):
    """A symmetric matrix U diag(μ) U*: orthonormal ``vectors`` U (P, r) and ``values`` μ (r,), largest first."""

    vectors: Tensor
    values: Tensor


def warm_start(
    v0: Tensor | tuple[Tensor, Tensor] | None, operator: Operator, choose: Callable[[int], list[int]]
) -> tuple[LowRank | None, Tensor | None]:
    """The model, and the vectors to start from as rows, the one that matters least last; None for what is not given.

    Args:
        v0: vectors (P,) or (P, m); or a model, of which a few vectors are taken.
        operator: what it is for.
        choose: of a model's number of eigenpairs, largest first, the indices to start from.

    Raises:
        ValueError: if a shape is wrong.
    """
    if v0 is None:
        return None, None
    size, vectors = operator.size, v0[0] if isinstance(v0, tuple) else v0
    if vectors.shape[0] != size or vectors.dim() > 2 or not vectors.numel():
        raise ValueError(f"v0 must have shape ({size},) or ({size}, m), got {tuple(vectors.shape)}")
    rows = vectors.reshape(size, -1).to(operator.device, operator.dtype).mT
    if not isinstance(v0, tuple):
        return None, rows.clone()
    values = v0[1].to(operator.device)
    if values.shape != rows.shape[:1]:
        raise ValueError(f"a model as v0 needs one value for each vector, got {tuple(values.shape)}")
    chosen = sorted(choose(len(values)), key=values.abs().tolist().__getitem__, reverse=True)
    return LowRank(rows.mT, values.to(rows.real.dtype)), rows[chosen]


def values_beside(model: LowRank, vectors: Tensor) -> Tensor:
    """Eigenvalues of a model beside orthonormal vectors X (P, k), largest first: those of (1 − X X*) M (1 − X X*)."""
    along = inner(model.vectors.mT, vectors.mT).cpu()
    lengths, turned = torch.linalg.eigh(torch.eye(len(along), dtype=along.dtype) - along @ along.mH)
    seen = lengths > 1e-3  # the rest is along X, or nearly so
    part = turned[:, seen] * lengths[seen].sqrt()
    return torch.linalg.eigvalsh(part.mH * model.values.double().cpu() @ part).flip(0)


def correction(residual: Tensor, theta: float, upper: bool, model: LowRank, closest: float) -> Tensor:
    """θ (θ − M)⁻¹ r for the residual r of a Ritz value θ: first-order perturbation theory, in which the model's vectors
    mix the more, the nearer their values are. A pair at the upper end is taken to lie above the model's values by the
    distance ``closest`` at least, one at the lower end below them: the model is of yesterday.
    """
    distance = theta - model.values
    distance = distance.clamp_min(closest) if upper else distance.clamp_max(-closest)
    return residual + model.vectors @ (model.values / distance * (residual @ model.vectors.conj()))


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
    known = rows[:0] if model is None else model.vectors.mT
    scale = largest(image.mT).clamp_min(torch.finfo(image.dtype).tiny)  # squares of large numbers overflow
    projected = inner(rows, image.mT).cpu() if projected is None else projected
    coordinates = torch.cat([(projected / scale.double().cpu()).mT, inner(rows, known).mT.cpu()])
    beside = rows.new_empty(count + len(known), len(basis))
    torch.div(image.mT, scale, out=beside[:count])
    beside[count:] = known
    beside.addmm_(coordinates.to(beside), rows, alpha=-1)
    # Everything else happens in coordinates: V, and an orthonormal basis of what lies beside it.
    gram = _gram(beside, count)
    unit = gram.diagonal().real.sqrt()
    unit[unit < 1000 * eps] = 1  # nothing but rounding lies beside V: not to be made a direction
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
