"""Extreme eigenpairs of a symmetric operator, with residual bounds; and the reference's power iteration."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = [
    "CLOSEST",
    "MAX_BASIS",
    "RANK",
    "EigenResult",
    "LowRank",
    "SymmetricOperator",
    "Which",
    "extreme_eigenpairs",
    "least_change",
    "power_iteration",
    "top_eigenpairs",
]

Which = Literal["LA", "SA", "LM", "BE"]

MAX_BASIS = 40  # columns of the search space before a thick restart; memory is 2 · MAX_BASIS · P

RANK = 12  # of the model handed on to the next solve: with 6 a solve on MNIST takes two products more, with 20 as many

CLOSEST = 0.03  # how near to one another an eigenvalue and the model's are taken to be, relative to the norm


class SymmetricOperator(Protocol):
    """What the solvers need: a square tensor, or anything with ``shape`` and ``@`` for a vector (P,)."""

    @property
    def shape(self) -> tuple[int, int] | torch.Size: ...
    def __matmul__(self, vector: Tensor, /) -> Tensor: ...


class LowRank(NamedTuple):
    """A symmetric matrix U diag(μ) Uᵀ: orthonormal ``vectors`` U (P, r) and ``values`` μ (r,), largest first."""

    vectors: Tensor
    values: Tensor


@dataclass(frozen=True)
class EigenResult:
    """Eigenpairs of a symmetric operator, with what is known about their error.

    Attributes:
        values: (k,) eigenvalues, largest first ("LA", "BE"), smallest first ("SA") or by magnitude ("LM").
        vectors: (P, k) unit eigenvectors.
        residuals: (k,) upper bounds on ‖H v − θ v‖: an eigenvalue lies within this distance of each value.
        matvecs: operator–vector products spent.
        converged: whether every residual met the tolerance.
        model: what is known of the operator by now, from which the solve for a nearby one is best started, as ``v0``.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    matvecs: int
    converged: bool
    model: LowRank


def top_eigenpairs(
    operator: SymmetricOperator,
    k: int = 1,
    which: Which = "LA",
    v0: Tensor | tuple[Tensor, Tensor] | None = None,
    tol: float = 1e-3,
    max_matvecs: int = 300,
    generator: torch.Generator | None = None,
    explore: int = 6,
    value_tol: float = 0.0,
) -> EigenResult:
    """The k extreme eigenpairs of a symmetric operator.

    Args:
        operator: the Hessian, or any symmetric (P, P) tensor or operator.
        k: how many, 1 ≤ k ≤ P.
        which: "LA" largest, "SA" smallest, "LM" largest in magnitude (one pair: the operator norm), "BE" half from
            each end (the odd one from the top), as in SciPy's ``eigsh``.
        v0: warm start: vectors, shape (P,) or (P, m), or better the ``model`` of an earlier result for a nearby
            operator, which preconditions the search as well. It is joined by random directions; without one the start
            is random.
        tol: bound on each residual ‖H v − θ v‖ relative to the largest |θ| found.
        max_matvecs: budget of products.
        generator: source of the random directions; seeded with 0 if not given.
        explore: steps of a Krylov sequence from the random directions before an answer is believed: an eigenvector
            that ``v0`` is orthogonal to, or a random start nearly so, cannot be seen otherwise. Fewer are enough
            where the matrix moves little between calls; each costs as many products as pairs are wanted. With 0, a
            random direction is only mixed into the last starting vector.
        value_tol: a pair is also good enough once residual²/gap, which estimates the error of its value, is at most
            this, relative to the largest |θ|; the gap is that to the next Ritz value. For callers who want values
            more than vectors: fewer products, and a larger residual, which is reported and still is a bound.

    Returns:
        An :class:`EigenResult`. If the budget ended first, ``converged`` is false and a ``RuntimeWarning`` tells the
        residual reached.

    Raises:
        ValueError: if an argument is out of range.

    Source: Davidson's method (1975): Rayleigh–Ritz on a space expanded by preconditioned residuals (θ − M)⁻¹ r. M is
    the low-rank model of an earlier solve; without one it is 0, and from one starting vector the space is the Krylov
    space of Lanczos. See Saad (2011), *Numerical Methods for Large Eigenvalue Problems*.

    >>> top_eigenpairs(torch.diag(torch.tensor([3.0, -1.0, 2.0])), k=2).values.round(decimals=3)
    tensor([3., 2.])
    """
    if which not in ("LA", "SA", "LM", "BE"):
        raise ValueError(f"which must be 'LA', 'SA', 'LM' or 'BE', got {which!r}")
    size = operator.shape[0]
    if not 1 <= k <= size:
        raise ValueError(f"k must lie between 1 and the operator's size {size}, got {k}")
    high, low = {"LA": (k, 0), "SA": (0, k), "LM": (k, k), "BE": ((k + 1) // 2, k // 2)}[which]
    limits = (tol, tol, max_matvecs, generator, explore, value_tol)
    result = _solve(operator, high, low, v0, *limits, largest=k if which == "LM" else None)
    if which == "LA" or which == "BE":
        return result
    order = result.values.argsort() if which == "SA" else result.values.abs().argsort(descending=True)
    return replace(
        result, values=result.values[order], vectors=result.vectors[:, order], residuals=result.residuals[order]
    )


def extreme_eigenpairs(
    operator: SymmetricOperator,
    high: int = 1,
    low: int = 1,
    v0: Tensor | tuple[Tensor, Tensor] | None = None,
    tol: float = 1e-3,
    low_tol: float = 0.1,
    max_matvecs: int = 300,
    generator: torch.Generator | None = None,
    explore: int = 6,
    value_tol: float = 0.0,
) -> EigenResult:
    """Both ends of a spectrum from one search space: the ``high`` largest and the ``low`` smallest pairs.

    The lower end may have its own, looser tolerance: an operator norm needs the smallest eigenvalue only well enough
    to know which end is the larger in magnitude. Once its residual bound says that it is not, the lower pair is left
    as it is, with that residual. See :func:`top_eigenpairs` for the other arguments; values come
    largest first.

    Raises:
        ValueError: if an argument is out of range, ``high + low`` > P among them.
    """
    if high < 0 or low < 0 or not 1 <= high + low <= operator.shape[0]:
        raise ValueError(f"high + low must lie between 1 and the operator's size, got {high} + {low}")
    return _solve(operator, high, low, v0, tol, low_tol, max_matvecs, generator, explore, value_tol)


@torch.no_grad()
def _solve(
    operator: SymmetricOperator,
    high: int,
    low: int,
    v0: Tensor | tuple[Tensor, Tensor] | None,
    tol: float,
    low_tol: float,
    max_matvecs: int,
    generator: torch.Generator | None,
    explore: int,
    value_tol: float,
    largest: int | None = None,
) -> EigenResult:
    """Rayleigh–Ritz on a growing space; ``largest`` wants that many pairs by magnitude, from whichever end.

    Vectors are rows in here, so that each lies in one piece in memory.
    """
    if not tol > 0 or not low_tol > 0:
        raise ValueError(f"tol must be positive, got {min(tol, low_tol)!r}")
    if not value_tol >= 0:
        raise ValueError(f"value_tol must not be negative, got {value_tol!r}")
    if max_matvecs < 1:
        raise ValueError(f"max_matvecs must be at least 1, got {max_matvecs}")
    size = operator.shape[0]
    old, warm = (LowRank(*v0), v0[0]) if isinstance(v0, tuple) else (None, v0)
    like = _like(operator, warm)
    generator = generator or torch.Generator().manual_seed(0)

    def random(count: int) -> Tensor:
        return torch.randn(count, size, generator=generator, dtype=torch.float64).to(like)

    # As many starting vectors as wanted pairs: a space grown from one vector sees one copy of a multiple eigenvalue.
    explorers = max(high, low)
    start = random(explorers)
    if warm is not None:
        if warm.shape[0] != size or warm.dim() > 2:
            raise ValueError(f"v0 must have shape ({size},) or ({size}, m), got {tuple(warm.shape)}")
        warm = warm.reshape(size, -1).to(like).mT
        if old:
            if old.values.shape != warm.shape[:1]:
                raise ValueError(f"a model as v0 needs one value for each vector, got {tuple(old.values.shape)}")
            old = LowRank(warm.mT, old.values.to(like))
            # The wanted pairs, and where only one end is wanted, one to spare; the largest in magnitude first.
            chosen = _nearest(len(old.values), high, low, high + low + (not high or not low))
            warm = warm[sorted(chosen, key=old.values.abs().tolist().__getitem__, reverse=True)]
        if not explore:  # a random direction without a product of its own: in the last vector, which matters least
            noise = start[:1] * (0.3 * warm[-1].norm() / start[0].norm())
            warm, start = warm[:-1], warm[-1:] + noise
        start = torch.cat([warm, start])
    left, preconditioner = explore, old
    basis = image = like.new_empty(0, size)
    matvecs, goal = 0, min(largest or high + low, size)
    limit = min(size, max(MAX_BASIS, 3 * (high + low)))
    while True:
        count = len(basis)
        basis = _with_orthonormal(basis, start, random, limit)[: count + max_matvecs - matvecs]
        image = torch.cat([image, *((operator @ v)[None] for v in basis[count:])])
        matvecs += len(basis) - count

        projected = (basis @ image.mT).double().cpu()
        norm = projected.abs().max()
        if not bool(norm.isfinite()):
            raise FloatingPointError("the operator returned a vector that is not finite")
        theta, rotation = torch.linalg.eigh((projected + projected.mT) / 2)
        theta, rotation = theta.flip(0), rotation.mT.flip(0).to(like)  # largest first
        norm, count = theta.abs().max(), len(theta)
        if largest is None:
            wanted = _ends(count, high, low)
        else:
            wanted = sorted(theta.abs().argsort(descending=True)[:largest].tolist())
        vectors = rotation[wanted] @ basis
        gaps = rotation[wanted] @ image - theta[wanted, None].to(like) * vectors
        # Rounding can hide in a residual that is computed from rotated images.
        rounding = 8 * count**0.5 * torch.finfo(like.dtype).eps * norm
        unit = norm.clamp_min(torch.finfo(torch.float64).tiny)  # squares of very large or small numbers leave float64
        residuals = (gaps.double() / unit.to(gaps.device)).norm(dim=1).cpu() * unit + rounding
        # Whichever pair carries the operator norm has the tight tolerance, at either end.
        tight = [i < high or largest or bool(theta[i].abs() == norm) for i in wanted]
        tolerance = torch.tensor([tol if t else low_tol for t in tight], dtype=torch.float64) * norm
        # A low pair that is loosely bounded but clearly below the norm has done its part.
        below = torch.tensor([not t for t in tight]) & (theta[wanted].abs() + 2 * residuals < norm) & (low_tol > tol)
        known = (residuals / unit).square() <= value_tol * (_gaps(theta)[wanted] / unit)
        open_pairs = ((residuals > tolerance) & ~below & ~known).nonzero()[:, 0]
        done = count >= goal and len(open_pairs) == 0 and (left == 0 or count == size)
        if done or matvecs >= max_matvecs or count == size:
            break
        start = gaps[open_pairs] if len(open_pairs) or count >= goal else random(1)
        if preconditioner and len(open_pairs):
            chosen = [wanted[i] for i in open_pairs]
            upper = [i < high if largest is None else float(theta[i]) > 0 for i in chosen]
            start = _correction(start, theta[chosen].to(like), upper, preconditioner, CLOSEST * float(norm))
        if left:
            start, left = torch.cat([start, image[-explorers:]]), left - 1
        if count + len(start) > limit:
            keep = rotation[_nearest(count, high, low, limit // 2)]
            basis, image = keep @ basis, keep @ image
            preconditioner = None  # it has led to its own vectors by now

    if not done:
        warnings.warn(
            f"eigenpairs not converged after {matvecs} products: largest residual {residuals.max():.2e} against "
            f"tol·‖H‖ = {tol * norm:.2e}; raise max_matvecs or tol",
            RuntimeWarning,
            stacklevel=3,
        )
    model = least_change(old, basis.mT, image.mT, lambda count: _nearest(count, high, low, max(RANK, goal + 1)))
    return EigenResult(theta[wanted].to(like), vectors.mT, residuals.to(like), matvecs, done, model)


def _correction(residuals: Tensor, theta: Tensor, upper: list[bool], model: LowRank, closest: float) -> Tensor:
    """θ (θ − M)⁻¹ r for each residual r of a Ritz value θ: first-order perturbation theory, in which the model's
    vectors mix the more, the nearer their values are. A pair at the upper end is taken to lie above the model's values
    by the distance ``closest`` at least, one at the lower end below them: the model is of yesterday.
    """
    distance = theta[:, None] - model.values
    above = torch.tensor(upper, device=theta.device)[:, None]
    distance = torch.where(above, distance.clamp_min(closest), distance.clamp_max(-closest))
    return residuals + (residuals @ model.vectors) * (model.values / distance) @ model.vectors.mT


def least_change(model: LowRank | None, basis: Tensor, image: Tensor, keep: Callable[[int], list[int]]) -> LowRank:
    """The symmetric matrix nearest to a model M that maps an orthonormal basis V to its image H V, cut to low rank.

    That is P H + H P − P H P + (1 − P) M (1 − P) with P = V Vᵀ.

    Args:
        model: what was known before; 0 if None.
        basis: V, shape (P, m).
        image: H V, shape (P, m).
        keep: of a number of eigenpairs, largest first, the indices to keep.

    Source: Powell's symmetric Broyden update (1970), for several vectors at once.
    """
    scale = image.abs().max().clamp_min(torch.finfo(image.dtype).tiny)  # squares of large numbers overflow
    rows, count = basis.mT, basis.shape[1]  # rows, as in the solver
    beside = torch.cat([image.mT, *([] if model is None else [model.vectors.mT])])
    beside[:count] /= scale
    inner = beside @ basis
    beside.addmm_(inner, rows, alpha=-1)
    # Everything else happens in coordinates: V, and an orthonormal basis of what lies beside it.
    gram, inner = (beside @ beside.mT).double().cpu(), inner.double().cpu()
    unit = gram.diagonal().sqrt().clamp_min(1000 * torch.finfo(image.dtype).eps)
    lengths, turned = torch.linalg.eigh(gram / unit / unit[:, None])
    # Squares of lengths: dropping one costs its root, keeping it eps/length² of orthogonality; here they are equal.
    seen = lengths > torch.finfo(image.dtype).eps ** (2 / 3)
    whiten = (turned[:, seen] / lengths[seen].sqrt()).mT / unit
    across = whiten @ gram  # of the orthonormal basis with every vector beside V
    matrix = torch.zeros(count + len(across), count + len(across), dtype=torch.float64)
    matrix[:count, :count] = inner[:count]
    matrix[count:, :count] = across[:, :count]
    if model is not None:
        old = across[:, count:]
        matrix[count:, count:] = old * (model.values / scale).double().cpu() @ old.mT
    values, vectors = torch.linalg.eigh(matrix)  # of the lower triangle
    values, vectors = values.flip(0), vectors.mT.flip(0)
    kept = keep(len(values))
    vectors = vectors[kept]
    found = (vectors[:, :count].to(basis) @ rows).addmm_((vectors[:, count:] @ whiten).to(basis), beside)
    return LowRank(found.mT, values[kept].to(basis) * scale)


def _gaps(theta: Tensor) -> Tensor:
    """The distance from each of some sorted values to the next one."""
    steps = (theta[:-1] - theta[1:]).abs()
    beyond = theta.new_zeros(1) if len(theta) == 1 else theta.new_full((1,), float("inf"))
    return torch.minimum(torch.cat([beyond, steps]), torch.cat([steps, beyond]))


def _ends(count: int, high: int, low: int) -> list[int]:
    """Indices of the first ``high`` and the last ``low`` of ``count`` values."""
    return sorted({*range(min(high, count)), *range(max(count - low, 0), count)})


def _nearest(count: int, high: int, low: int, room: int) -> list[int]:
    """Indices of ``room`` values: the wanted ones and, on the side wanted most, those next to them."""
    spare = max(room - high - low, 0)
    return _ends(count, high + spare, low) if high >= low else _ends(count, high, low + spare)


def _with_orthonormal(basis: Tensor, start: Tensor, random: Callable[[int], Tensor], limit: int) -> Tensor:
    """The basis and orthonormal rows that span ``start`` beside it; dependent rows are replaced by random ones."""
    for row in start:
        if len(basis) >= limit:
            break
        for attempt in range(4):
            vector = row if attempt == 0 else random(1)[0]
            length = vector.abs().max()
            vector = vector / length
            vector = vector / vector.norm()
            for _ in range(2):  # twice is enough (Kahan, Parlett)
                vector = vector - (basis @ vector) @ basis
                kept = vector.norm()
                vector = vector / kept
            if length > 0 and bool(kept > 0.5):  # so the second sweep removed only rounding
                basis = torch.cat([basis, vector[None]])
                break
    return basis


def _like(operator: SymmetricOperator, v0: Tensor | None) -> Tensor:
    """An empty tensor of the operator's dtype and device."""
    if isinstance(operator, Tensor):
        return operator.new_empty(0)
    if v0 is not None and not hasattr(operator, "dtype"):
        return v0.new_empty(0)
    return torch.empty(0, dtype=getattr(operator, "dtype", None), device=getattr(operator, "device", None))


def power_iteration(
    gradient: Callable[[Tensor], Tensor],
    params: Tensor,
    iterations: int = 100,
    tol: float = 1e-3,
    step: float = 1e-3,
    v0: Tensor | None = None,
) -> EigenResult:
    """Operator norm as the paper's reference code finds it: power iteration on finite differences of gradients.

    H v is taken as (∇ℓ(w + step·v) − ∇ℓ(w − step·v))/(2·step + 1e-5). It is here for comparison only: it stops when
    the value *changes* by less than ``tol``, the divisor reads λ about 0.5 % low, and nothing bounds its error.

    Args:
        gradient: maps parameters (P,) to the gradient (P,).
        params: w, shape (P,).
        iterations: most iterations, at least one, of two gradients each.
        tol: relative change between iterations at which to stop.
        step: length of the finite difference.
        v0: starting vector (P,); random if not given.

    Returns:
        An :class:`EigenResult` with one pair; ``matvecs`` counts the differences, ``residuals`` is ‖H v − θ v‖ of the
        *finite-difference* Hessian.

    Source: google-deepmind/sam_edge, the code published with Long & Bartlett (2024).
    """
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(len(params), generator=generator, dtype=torch.float64).to(params) if v0 is None else v0
    vector = vector / vector.norm()
    value = vector.new_zeros(())
    for spent in range(1, iterations + 1):
        product = (gradient(params + step * vector) - gradient(params - step * vector)) / (2 * step + 1e-5)
        before, value = value, vector @ product
        converged = bool((value - before).abs() <= tol * value.abs())
        if converged or spent == iterations:
            break
        vector = product / product.norm()
    residual = (product - value * vector).norm()
    column = vector[:, None]
    return EigenResult(value[None], column, residual[None], spent, converged, column)
