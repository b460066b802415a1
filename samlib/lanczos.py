"""Both ends of a spectrum in little memory: Lanczos with thick restarts, which keeps no images of its basis."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from .eigen import EigenResult, LowRank, SymmetricOperator
from .optim.precision import norm
from .symmetric import on_the_host

__all__ = ["lanczos_ends"]


@on_the_host
@torch.no_grad()
def lanczos_ends(
    operator: SymmetricOperator,
    high: int = 1,
    start: Any = None,
    tol: float = 1e-3,
    generator: torch.Generator | None = None,
    *,
    low_tol: float = 0.1,
    basis: int = 5,
    max_matvecs: int = 300,
) -> EigenResult:
    """The ``high`` largest eigenpairs and the smallest one, in ``basis + 1`` vectors of the operator's size.

    :func:`samlib.eigen.extreme_eigenpairs` takes twice as many and more, and fewer products.

    Args:
        operator: symmetric, (P, P).
        high: how many of the largest pairs.
        start: the ``model`` of an earlier result; random directions are mixed in. Without one the start is random.
        tol: bound on residuals ‖H v − θ v‖ of the largest pairs, and of whichever carries the operator norm, relative
            to that norm.
        generator: source of the random directions; seeded with 0 if not given.
        low_tol: bound for the smallest pair, until it is known not to carry the norm.
        basis: vectors of the search space, at least ``high + 3``.
        max_matvecs: budget of products.

    Returns:
        An :class:`samlib.EigenResult`, largest first and the smallest last. If the budget ended first, ``converged``
        is false and a ``RuntimeWarning`` tells the residual reached; or that the products are not symmetric.

    Source: Wu & Simon (2000), *Thick-restart Lanczos method for large symmetric eigenvalue problems*; with full
    orthogonalisation, so that the projected matrix is computed, not assumed tridiagonal.

    >>> lanczos_ends(torch.diag(torch.tensor([3.0, -1.0, 2.0]))).values.round(decimals=3)
    tensor([ 3., -1.])
    """
    size = operator.shape[0]
    if not 1 <= high <= size:
        raise ValueError(f"high must lie between 1 and the operator's size {size}, got {high}")
    if basis < high + 3:
        raise ValueError(f"basis must be at least high + 3 = {high + 3}, got {basis}")
    basis = min(basis, size)
    generator = generator or torch.Generator().manual_seed(0)
    rows, projected = _begin(operator, start, high, basis, generator)
    count = matvecs = 0
    asymmetry = 0.0
    while True:
        residue = rows[count + 1]  # in place: a vector less
        residue.copy_(operator @ rows[count])
        matvecs, count = matvecs + 1, count + 1
        column = _orthogonalise(residue, rows[:count])
        if not bool(column.isfinite().all()):
            raise FloatingPointError("the operator returned a vector that is not finite")
        if count > 1:  # what the products before said of this one
            asymmetry = max(asymmetry, float((column[:-1] - projected[count - 1, : count - 1]).abs().max()))
        projected[:count, count - 1] = projected[count - 1, :count] = column
        theta, rotation = (t.flip(-1) for t in torch.linalg.eigh(projected[:count, :count]))  # largest first
        beta, scale = float(norm(residue)), theta.abs().max()
        rounding = 8 * count**0.5 * torch.finfo(rows.dtype).eps * scale
        residuals = (beta if count < size else 0.0) * rotation[-1].abs() + rounding
        wanted = [*range(min(high, count - 1)), count - 1]
        done = count == size or (count > high and _good_enough(theta[wanted], residuals[wanted], scale, tol, low_tol))
        asymmetric = asymmetry > max(tol, torch.finfo(rows.dtype).eps ** 0.5) * scale
        done &= not asymmetric
        if done or asymmetric or matvecs >= max_matvecs:
            break
        if count == basis:
            kept = [*range(high + 1), count - 1]
            rows[: len(kept)] = rotation[:, kept].mT.to(rows) @ rows[:count]
            count = len(kept)
            projected.zero_()[:count, :count] = theta[kept].diag()
            projected[count, :count] = beta * rotation[-1, kept]
        elif count < basis:
            projected[count, count - 1] = beta
        if beta <= rounding:  # the space is invariant: go on beside it
            projected[count] = 0
            residue.copy_(_random(generator, rows))
            _orthogonalise(residue, rows[:count])
        rows[count] = residue.div_(norm(residue).to(residue))
    if not done:
        why = f"against tol·‖H‖ = {tol * scale:.2e}; raise max_matvecs, the basis or tol"
        if asymmetric:
            residuals = residuals + asymmetry
            why = (
                "because the operator is not symmetric: its products differ from symmetric ones by "
                f"{asymmetry / scale:.1%} of the largest"
            )
        warnings.warn(
            f"eigenpairs not converged after {matvecs} products: largest residual {residuals[wanted].max():.2e} {why}",
            RuntimeWarning,
            stacklevel=3,
        )
    spare = min(high, count - 1)  # comes first, so that the others are a view
    kept = [spare, *wanted] if spare not in wanted else wanted
    vectors = (rotation[:, kept].mT.to(rows) @ rows[:count]).mT
    return EigenResult(
        theta[wanted].to(rows),
        vectors[:, -len(wanted) :],
        residuals[wanted].to(rows),
        matvecs,
        done,
        LowRank(vectors, theta[kept].to(rows)),
        theta[[i for i in range(count) if i not in wanted]].to(rows),
    )


def _begin(
    operator: SymmetricOperator, start: Any, high: int, basis: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Room for the basis, the first vector in it; and for the projected matrix."""
    like = operator.new_empty(0) if isinstance(operator, Tensor) else None
    dtype, device = (like.dtype, like.device) if like is not None else (operator.dtype, operator.device)  # type: ignore
    rows = torch.zeros(basis + 1, operator.shape[0], dtype=dtype, device=device)
    first = _random(generator, rows)
    if start is not None:
        first *= 0.1 / norm(first).to(first)
        vectors, values = start
        weights = torch.ones_like(values)
        weights[values.argsort(descending=True)[high:]] = 0.3  # what is needed only roughly, or not at all
        first = first.addmv_(vectors.to(first), weights.to(first))
    rows[0] = first / norm(first).to(first)
    return rows, torch.zeros(basis, basis, dtype=torch.float64)


def _random(generator: torch.Generator, rows: Tensor) -> Tensor:
    """A random vector like a row."""
    return torch.randn(rows.shape[1], generator=generator).to(rows)


def _orthogonalise(vector: Tensor, rows: Tensor) -> Tensor:
    """Take from a vector, in place, what lies along orthonormal rows, and return its coordinates there in float64."""
    along = torch.zeros(len(rows), dtype=torch.float64)
    for _ in range(2):  # twice is enough (Kahan, Parlett)
        part = rows @ vector
        vector.addmv_(rows.mT, part, alpha=-1)
        along += part.double().cpu()
    return along


def _good_enough(theta: Tensor, residuals: Tensor, scale: Tensor, tol: float, low_tol: float) -> bool:
    """Whether the residuals of some values, the smallest last, meet their tolerances."""
    tolerance = torch.full_like(theta, tol)
    if theta[-1].abs() < scale:
        tolerance[-1] = low_tol
    met = residuals <= tolerance * scale
    met[-1] |= bool(low_tol > tol and theta[-1].abs() + 2 * residuals[-1] < scale)  # clearly below the norm
    return bool(met.all())
