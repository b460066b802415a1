"""Extreme eigenpairs of a symmetric operator, with residual bounds; and the reference's power iteration."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .davidson import Search, Wanted
from .lowrank import LowRank, least_change, values_beside, warm_start
from .ritz import SearchSpace, inner, norms
from .symmetric import SymmetricOperator, as_operator, on_the_host

__all__ = [
    "MAX_BASIS",
    "RANK",
    "Alignment",
    "EigenResult",
    "LowRank",
    "SymmetricOperator",
    "Which",
    "alignment",
    "as_operator",
    "extreme_eigenpairs",
    "power_iteration",
    "top_eigenpairs",
]

Which = Literal["LA", "SA", "LM", "BE"]

MAX_BASIS = 40  # columns of the search space before a thick restart; memory is 2 · MAX_BASIS · P

WHOLE = 1 << 20  # entries of a search space that may have more columns: up to P = 1,024 it is never restarted

RANK = 12  # of the model handed on to the next solve: with 6 a solve on MNIST takes two products more, with 20 as many


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
        others: what is known of further eigenvalues, rough ones too: Ritz values, and those of the model.
        missed: a bound on the probability that an eigenvalue lies beyond the k by more than ``tol``, or ten times that
            where one pair was found from a random start: from the check, 1 if there was none, 0 where the search space
            is the whole space. After a warm start it leaves out vectors that the search space has part of.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    matvecs: int
    converged: bool
    model: LowRank
    others: Tensor
    missed: float = 1.0

    @property
    def principal(self) -> int:
        """Index of the pair with the largest magnitude."""
        return int(self.values.abs().argmax())

    @property
    def gap(self) -> float:
        """The distance from the principal value to the next one known, rough where that was not asked for."""
        return _beside(self, [self.principal])[0]


def top_eigenpairs(
    operator: Any,
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
        operator: the Hessian, or any symmetric (P, P) operator that :func:`as_operator` takes.
        k: how many, 1 ≤ k ≤ P.
        which: "LA" largest, "SA" smallest, "LM" largest in magnitude (one pair: the operator norm), "BE" half from
            each end (the odd one from the top), as in SciPy's ``eigsh``.
        v0: warm start: vectors, shape (P,) or (P, m), or better an earlier result for a nearby operator, or its
            ``model``, which preconditions the search as well. Without one the start is random.
        tol: bound on each residual ‖H v − θ v‖ relative to the largest |θ| found.
        max_matvecs: budget of products; k are spent in any case. Up to P = 1,024 no more than P ever are.
        generator: source of the random directions; seeded with 0 if not given.
        explore: a check of the answer costs about so many products, and a fifth of those before it. In a Lanczos
            sequence from a random vector a copy of a multiple eigenvalue would show, or an eigenvector that the start
            was orthogonal to. It ends once ``missed`` is 0.1 % (on MNIST after up to two products for one pair from a
            random start, after three to eleven for several); when it has become dear, 10 % is enough. It is made again
            after it has found something. With 0 there is no check, but a random direction is mixed into the last
            vector of a warm start.
        value_tol: a pair is also good enough once residual²/gap, which estimates the error of its value, is at most
            this, relative to the largest |θ|; the gap is that to the next Ritz value. For callers who want values
            more than vectors: fewer products, and a larger residual, which is reported and still is a bound.

    Returns:
        An :class:`EigenResult` with k pairs. If the budget ended first, ``converged`` is false and a
        ``RuntimeWarning`` tells the residual reached; or that the products are not symmetric, where that is why.

    Raises:
        TypeError, ValueError: if an argument is out of range, or not an operator.
        FloatingPointError: if a product is not finite.

    Source: Davidson's method (1975): Rayleigh–Ritz on a space expanded by preconditioned residuals (θ − M)⁻¹ r. M is
    the low-rank model of an earlier solve; without one the space is the Krylov space of Lanczos. See Saad (2011),
    *Numerical Methods for Large Eigenvalue Problems*; for the check, :func:`samlib.ritz.miss_probability`.

    >>> top_eigenpairs(torch.diag(torch.tensor([3.0, -1.0, 2.0])), k=2).values.round(decimals=3)
    tensor([3., 2.])
    """
    if isinstance(k, bool) or not hasattr(k, "__index__"):
        raise TypeError(f"k must be a whole number, got {k!r}")
    if which not in ("LA", "SA", "LM", "BE"):
        raise ValueError(f"which must be 'LA', 'SA', 'LM' or 'BE', got {which!r}")
    high, low = {"LA": (k, 0), "SA": (0, k), "LM": (k, k), "BE": ((k + 1) // 2, k // 2)}[which]
    wanted = Wanted(high, low, tol, tol, value_tol, largest=k if which == "LM" else None)
    result = _solve(operator, "k", wanted, v0, max_matvecs, generator, explore)
    if which == "LA" or which == "BE":
        return result
    order = result.values.argsort() if which == "SA" else result.values.abs().argsort(descending=True)
    return replace(
        result, values=result.values[order], vectors=result.vectors[:, order], residuals=result.residuals[order]
    )


def extreme_eigenpairs(
    operator: Any,
    high: int = 1,
    low: int = 1,
    v0: Tensor | tuple[Tensor, Tensor] | None = None,
    tol: float = 1e-3,
    low_tol: float = 0.1,
    max_matvecs: int = 300,
    generator: torch.Generator | None = None,
    explore: int = 6,
    value_tol: float = 0.0,
    separate: bool = False,
) -> EigenResult:
    """Both ends of a spectrum from one search space: the ``high`` largest and the ``low`` smallest pairs.

    The lower end may have its own, looser tolerance: an operator norm needs the smallest eigenvalue only well enough
    to know which end is the larger in magnitude. Once its residual bound says that it is not, the lower pair is left
    as it is, with that residual. See :func:`top_eigenpairs` for the other arguments; values come
    largest first.

    With ``separate`` pairs that were not asked for, but whose values may lie within ``tol``·max |θ| of the principal
    one, are refined until they are told from it, or known as well as it is; they are in the result's ``model``. For
    callers who want the principal *vector*, with which such a neighbour would be mixed. Half a product on MNIST.

    Raises:
        TypeError, ValueError: if an argument is out of range, ``high + low`` > P among them, or not an operator.
        FloatingPointError: if a product is not finite.
    """
    if high < 0 or low < 0:
        raise ValueError(f"high and low must not be negative, got {high} and {low}")
    wanted = Wanted(high, low, tol, low_tol, value_tol, separate=separate)
    return _solve(operator, "high + low", wanted, v0, max_matvecs, generator, explore)


@on_the_host
@torch.no_grad()
def _solve(
    operator: Any,
    pairs_asked: str,
    wanted: Wanted,
    v0: Tensor | tuple[Tensor, Tensor] | None,
    max_matvecs: int,
    generator: torch.Generator | None,
    explore: int,
) -> EigenResult:
    v0 = _started_from(v0)
    given = v0[0] if isinstance(v0, tuple) else v0
    operator = as_operator(operator, *(() if given is None else (None, given.dtype, given.device)))
    size, count = operator.size, wanted.count
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
    if not 1 <= count <= size:
        raise ValueError(f"{pairs_asked} must lie between 1 and the operator's size {size}, got {count}")
    if max_matvecs < 1:
        raise ValueError(f"max_matvecs must be at least 1, got {max_matvecs}")
    generator = generator or torch.Generator().manual_seed(0)

    def random() -> Tensor:
        return torch.randn(size, generator=generator, dtype=operator.dtype).to(operator.device)

    # The wanted pairs to start from, and one to spare where only one end is wanted.
    ends = wanted.high + wanted.low + (not wanted.high or not wanted.low)
    model, start = warm_start(v0, operator, lambda m: wanted.nearest(m, ends))
    if start is not None and not explore:  # a random direction without a product of its own
        noise = random()
        start[-1] += noise * (0.3 * norms(start[-1:]) / norms(noise[None])).to(noise)
    limit = min(size, max(MAX_BASIS, 3 * count, WHOLE // size))
    search = Search(SearchSpace(operator, limit, max(max_matvecs, count)), wanted, model, random, explore)
    pairs, space = search.run(start), search.space
    if pairs.open:
        warnings.warn(search.complaint(pairs), RuntimeWarning, stacklevel=4)
    basis, image = space.basis.mT, space.image.mT
    model = least_change(
        model, basis, image, lambda m: wanted.nearest(m, max(RANK, wanted.high + wanted.low + 1)), space.projected
    )
    real = model.values  # values have the vectors' precision, and are real
    vectors, further = pairs.vectors.mT, [i for i in range(len(pairs.theta)) if i not in pairs.chosen]
    others = torch.cat([pairs.theta[further], values_beside(model, vectors)]).to(real)
    values = pairs.theta[pairs.chosen].to(real)
    residuals, spent, done = pairs.residuals.to(real), space.matvecs, not pairs.open
    return EigenResult(values, vectors, residuals, spent, done, model, others, search.missed)


def _started_from(v0: Any) -> Any:
    """A warm start as tensors: of a result its model, of an array or a list the vectors."""
    if isinstance(v0, EigenResult):
        return tuple(v0.model)
    if v0 is None or isinstance(v0, Tensor) or (isinstance(v0, tuple) and all(isinstance(t, Tensor) for t in v0)):
        return v0
    try:
        return torch.as_tensor(v0)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"v0 must be a vector (P,), vectors (P, m), a result or its model, got {type(v0).__name__}"
        ) from None


class Alignment(NamedTuple):
    """How far a vector lies along the principal eigenvector, or along a few that cannot be told apart.

    Attributes:
        cosine: |cos| of the angle between the vector and the span.
        pairs: the span's dimension: 1 for the principal eigenvector alone.
        gap: distance from the span's values to the next one known; ∞ if there is none.
        separate: whether the residuals tell the span from the rest. If not, a pair that was not computed, or one of
            another end, is mixed in, and the cosine is not to be relied on.
    """

    cosine: float
    pairs: int
    gap: float
    separate: bool


@torch.no_grad()
def alignment(vector: Tensor, result: EigenResult, mixing: float = 0.3) -> Alignment:
    """|cos| between a vector and the principal eigenvector, or the span of all pairs that cannot be told from it.

    A computed vector lies within an angle of sine ≤ residual/gap of the eigenvector, where the gap is that to the next
    eigenvalue (Davis & Kahan 1970). Where this exceeds ``mixing``, the vector may be any mixture of the two: the pair
    beside it is then taken into the span, and so on until the span is told from the rest.

    Args:
        vector: a gradient, say, shape (P,); one of length 0 has no direction, and its cosine is NaN.
        result: with the pair of largest magnitude, and those next to it as far as they were computed.
        mixing: largest bound on the sine of the angle that is put up with.

    >>> result = top_eigenpairs(torch.diag(torch.tensor([3.0, 3.0, 1.0])), k=2)
    >>> alignment(torch.tensor([3.0, 4.0, 0.0]), result)[:2]
    (1.0, 2)
    """
    span = [result.principal]
    while True:
        gap, certain, nearest = _beside(result, span)
        separate = float(result.residuals[span].double().norm()) < mixing * certain
        if separate or nearest is None:
            break
        span.append(nearest)
    along = inner(result.vectors[:, span].mT, vector.to(result.vectors)[None])
    length = float(norms(vector[None]))
    cosine = min(float(norms(along.mT)) / length, 1.0) if length > 0 else math.nan
    return Alignment(cosine, len(span), gap, separate)


def _beside(result: EigenResult, span: list[int]) -> tuple[float, float, int | None]:
    """How far the next known value is from some; how far at least, by its residual; and which of the pairs it is of."""
    rest = [i for i in range(len(result.values)) if i not in span]
    beside = torch.cat([result.values[rest], result.others]).double()
    if not len(beside):
        return math.inf, math.inf, None
    distances = (beside[:, None] - result.values[span].double()).abs().amin(1)
    certain = distances.clone()
    certain[: len(rest)] -= result.residuals[rest].double()
    nearest = int(certain.argmin())
    return float(distances.min()), float(certain[nearest]), rest[nearest] if nearest < len(rest) else None


@torch.no_grad()
def power_iteration(
    gradient: Callable[[Tensor], Tensor],
    params: Tensor,
    iterations: int = 100,
    tol: float = 1e-3,
    step: float = 1e-3,
    v0: Tensor | None = None,
) -> EigenResult:
    """Operator norm as the paper's reference code finds it: power iteration on finite differences of gradients.

    H v is taken as (∇ℓ(w + step·v) − ∇ℓ(w − step·v))/(2·step + 1e-5), and the norm as ‖H v‖, from below. It is here for
    comparison only: it stops when that *changes* by at most ``tol``, or is at most ``tol`` itself; the divisor reads λ
    about 0.5 % low, and nothing bounds its error.

    Args:
        gradient: maps parameters (P,) to the gradient (P,).
        params: w, shape (P,).
        iterations: most iterations, at least one, of two gradients each.
        tol: relative change between iterations at which to stop.
        step: length of the finite difference.
        v0: starting vector (P,); random if not given.

    Returns:
        An :class:`EigenResult` with one pair: the norm, never negative, and H v/‖H v‖ of the last iteration.
        ``matvecs`` counts the differences; ``residuals`` is ‖H v ∓ θ v‖ of the *finite-difference* Hessian for the v
        before, whichever is smaller.

    Source: google-deepmind/sam_edge, the code published with Long & Bartlett (2024).
    """
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(len(params), generator=generator, dtype=torch.float64).to(params) if v0 is None else v0
    vector, value = vector / norms(vector[None]).to(vector), 1.0
    for spent in range(1, iterations + 1):
        with torch.enable_grad():
            product = (gradient(params + step * vector) - gradient(params - step * vector)) / (2 * step + 1e-5)
        before, value = value, float(norms(product[None]))
        converged = abs(value - before) <= tol * value or value <= tol
        old, vector = vector, product / value if value > 0 else vector
        if converged or spent == iterations:
            break
    signs = torch.tensor([[1.0], [-1.0]]).to(old)
    residual = norms(product - value * signs * old).amin(0, keepdim=True).to(params)
    values = torch.full_like(residual, value)
    column = vector[:, None]
    return EigenResult(values, column, residual, spent, converged, LowRank(column, values), values[:0])
