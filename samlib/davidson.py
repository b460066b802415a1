"""The loop of the eigen-solver: the search space grows until the wanted pairs are known, and a check sees no others."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .lowrank import LowRank, correction
from .ritz import SearchSpace, miss_probability

__all__ = ["CLOSEST", "MISS", "Pairs", "Search", "Wanted"]

CLOSEST = 0.03  # how near to one another an eigenvalue and the model's are taken to be, relative to the norm

MISS, DEAR = 0.001, 0.1  # a check ends once an eigenvalue is missed with this probability; or, once the check is dear


@dataclass(frozen=True)
class Wanted:
    """Which pairs are looked for, and how exactly: ``high`` from the top, ``low`` from the bottom.

    With ``largest`` that many by magnitude, from whichever end. With ``separate`` also what lies next to the principal
    value, as well as it takes to tell the two apart.
    """

    high: int
    low: int
    tol: float
    low_tol: float
    value_tol: float
    largest: int | None = None
    separate: bool = False

    def __post_init__(self) -> None:
        if not self.tol > 0 or not self.low_tol > 0:
            raise ValueError(f"tol must be positive, got {min(self.tol, self.low_tol)!r}")
        if not self.value_tol >= 0:
            raise ValueError(f"value_tol must not be negative, got {self.value_tol!r}")

    @property
    def count(self) -> int:
        return self.largest or self.high + self.low

    def choose(self, theta: Tensor) -> list[int]:
        """Indices of the wanted ones of some values, largest first."""
        if self.largest is None:
            return _ends(len(theta), self.high, self.low)
        return sorted(theta.abs().argsort(descending=True)[: self.largest].tolist())

    def nearest(self, count: int, room: int) -> list[int]:
        """Indices of ``room`` of ``count`` values: the wanted ones and, on the side wanted most, those next to them.

        Where the principal value is to be told from the next, one on the other side too.
        """
        spare = max(room - self.high - self.low, 0)
        other = int(self.separate and spare > 1 and min(self.high, self.low) > 0)
        if self.high >= self.low:
            return _ends(count, self.high + spare - other, self.low + other)
        return _ends(count, self.high + other, self.low + spare - other)

    def upper(self, index: int, value: float) -> bool:
        """Whether a wanted pair belongs to the upper end."""
        return index < self.high if self.largest is None else value > 0

    def targets(self, pairs: Pairs, margin: float) -> tuple[float, float]:
        """What a missed eigenvalue lies beyond, above or below, by a margin in tolerances."""
        values, margin = pairs.theta[pairs.chosen], margin * pairs.norm
        if self.largest:
            end = float(values.abs().min()) + margin * self.tol
            return end, -end
        high = float(values[self.high - 1]) + margin * self.tol if self.high else math.inf
        return high, float(values[-self.low]) - margin * self.low_tol if self.low else -math.inf


@dataclass(frozen=True)
class Pairs:
    """Ritz pairs of a search space.

    Attributes:
        theta: all Ritz values, largest first, and ``rotation``, their vectors as rows in the space's coordinates.
        norm: the largest |θ|.
        chosen: indices of the wanted pairs; what follows is of these.
        vectors, misses: v and H v − θ v, as rows.
        residuals: bounds on ‖H v − θ v‖.
        open: positions among the chosen of those not known well enough.
    """

    theta: Tensor
    rotation: Tensor
    norm: float
    chosen: list[int]
    vectors: Tensor
    misses: Tensor
    residuals: Tensor
    open: list[int]

    @classmethod
    def of(cls, space: SearchSpace, wanted: Wanted) -> Pairs:
        """Rayleigh–Ritz."""
        projected = space.projected
        if not bool(projected.abs().max().isfinite()):
            raise FloatingPointError("the operator returned a vector that is not finite")
        theta, rotation = torch.linalg.eigh(projected)
        theta, rotation = theta.flip(0), rotation.mT.flip(0)  # largest first
        norm, chosen = float(theta.abs().max()), wanted.choose(theta)
        values = theta[chosen]
        vectors, misses, residuals = space.ritz(rotation[chosen], values, norm)
        unit = max(norm, torch.finfo(vectors.dtype).tiny)  # squares of very large or small numbers leave the dtype
        # Whichever pair carries the operator norm has the tight tolerance, at either end.
        tight = torch.tensor([bool(wanted.largest) or i < wanted.high for i in chosen]) | (values.abs() == norm)
        tolerances = theta.new_tensor([wanted.tol, wanted.low_tol])
        known = residuals <= torch.where(tight, tolerances[0], tolerances[1]) * norm
        # A low pair that is loosely bounded but clearly below the norm has done its part.
        known |= ~tight & (values.abs() + 2 * residuals < norm) & (wanted.low_tol > wanted.tol)
        known |= (residuals / unit).square() <= wanted.value_tol * (_gaps(theta)[chosen] / unit)
        return cls(theta, rotation, norm, chosen, vectors, misses, residuals, (~known).nonzero()[:, 0].tolist())


class Search:
    """Davidson's method, with a check for what it may have missed.

    Args:
        space: empty.
        wanted: the pairs.
        model: preconditions the search.
        random: gives a random vector.
        explore: after so many products, and a fifth of those before it, a check is dear; 0 for no check.

    Attributes:
        missed: bound on the probability that an eigenvalue beyond the wanted ones has been missed; 1 without a check.
    """

    def __init__(
        self, space: SearchSpace, wanted: Wanted, model: LowRank | None, random: Callable[[], Tensor], explore: int
    ) -> None:
        self.space, self.wanted, self.model, self.random, self.explore = space, wanted, model, random, explore
        self.missed = 1.0
        self._sequence: int | None = None  # where a Lanczos sequence from a random vector begins
        self._dear: int | None = None  # while a check goes on: the products after which it is dear
        self._checked = not explore

    def run(self, start: Tensor | None) -> Pairs:
        """Grow the space from some vectors, or from a random one, until there is nothing left to do or to spend."""
        space = self.space
        if start is None:
            self._sequence = 0
            start = self.random()[None]
        space.extend(start)
        while len(space) < self.wanted.count:
            self._advance()
        while True:
            pairs = Pairs.of(space, self.wanted)
            if len(space) == space.operator.size:
                self.missed = 0.0
            if len(space) == space.operator.size or space.matvecs == space.budget:
                return pairs
            if self._dear is not None:
                self._check(pairs)
            elif pairs.open:
                if self.asymmetric and float(pairs.residuals[pairs.open].max()) <= space.asymmetry * pairs.norm:
                    return pairs  # more products would not help
                self._refine(pairs)
            elif not self._checked:
                self._begin_check(pairs)
            elif not self.wanted.separate or not self._separate(pairs):
                return pairs

    @property
    def asymmetric(self) -> bool:
        """Whether the products differ from symmetric ones by more than the tolerance, and by more than rounding."""
        rounding = torch.finfo(self.space.operator.dtype).eps ** 0.5
        return self.space.asymmetry > max(self.wanted.tol, rounding)

    def complaint(self, pairs: Pairs) -> str:
        """Why some pairs are not known to the tolerance."""
        residual, spent = float(pairs.residuals.max()), self.space.matvecs
        reached = f"eigenpairs not converged after {spent} products: largest residual {residual:.2e} "
        if self.asymmetric:
            return reached + (
                "because the operator is not symmetric: its products differ from symmetric ones by "
                f"{self.space.asymmetry:.1%} of the largest"
            )
        return reached + f"against tol·‖H‖ = {self.wanted.tol * pairs.norm:.2e}; raise max_matvecs or tol"

    def _refine(self, pairs: Pairs) -> None:
        """Take up what the open pair of the largest magnitude misses, preconditioned: one at a time costs the fewest
        products.
        """
        space = self.space
        if self._sequence is not None and len(space) < space.limit:
            self._advance()
        else:
            at = max(pairs.open, key=lambda i: float(pairs.theta[pairs.chosen[i]].abs()))
            index, value = pairs.chosen[at], float(pairs.theta[pairs.chosen[at]])
            self._take_up(pairs, pairs.misses[at], value, self.wanted.upper(index, value))
        for _ in range(len(space) // 32 - 1):  # where Rayleigh–Ritz has become dear
            self._advance()

    def _take_up(self, pairs: Pairs, row: Tensor, value: float, upper: bool) -> None:
        """What a pair misses, preconditioned."""
        if self.model:
            row = correction(row, value, upper, self.model, CLOSEST * pairs.norm)
        if len(self.space) == self.space.limit:
            self._restart(pairs)
        if not self.space.extend([row]):
            self.space.extend([self.random()])

    def _separate(self, pairs: Pairs) -> bool:
        """Take up what a pair misses that may be mixed with the principal one; false if there is none.

        An eigenvalue lies within a pair's residual of its value, and by estimate within residual²/gap of it, the gap
        being that to the rest. A pair for which this may be within the tolerance of the principal value is refined,
        until it is not, or until the pair is known as well as the principal one.
        """
        theta, within = pairs.theta, self.wanted.tol * pairs.norm
        principal = int(theta.abs().argmax())
        apart = (theta - theta[principal]).abs()
        for index in apart.argsort().tolist():
            if index in pairs.chosen:
                continue
            _, misses, residuals = self.space.ritz(pairs.rotation[[index]], theta[[index]], pairs.norm)
            residual, others = float(residuals), (theta - theta[index]).abs()
            others[[index, principal]] = math.inf
            gap = float(others.min())
            error = min(2 * residual * (residual / gap), residual) if residual < gap < math.inf else residual
            if residual > within and float(apart[index]) - error <= within and not self.asymmetric:
                self._take_up(pairs, misses[0], float(theta[index]), bool(theta[principal] > 0))
                return True
            if float(apart[index]) > within:
                break
        return False

    def _advance(self) -> None:
        """One more Lanczos step, or a random vector where it has come to its end."""
        vector, _ = self.space.krylov() if len(self.space) else (None, 0.0)
        if vector is not None:
            self.space.append(vector)
        else:
            self._sequence = None
            self.space.extend([self.random()])

    def _begin_check(self, pairs: Pairs) -> None:
        """Start a Lanczos sequence from a random vector beside the space, in which a copy of a multiple eigenvalue
        would show, or an eigenvector that the start was orthogonal to. The sequence from a random start is itself such
        a check, if no more than a pair is wanted from each end.
        """
        space = self.space
        self._dear = space.matvecs + self.explore + space.matvecs // 5
        if self._sequence is None or max(self.wanted.high, self.wanted.low) > 1:
            if len(space) + self._dear - space.matvecs > space.limit < space.operator.size:
                self._restart(pairs)
            self._sequence = len(space)
            space.extend([self.random()])

    def _check(self, pairs: Pairs) -> None:
        """Go on with the check by a product, or end it.

        Where it has seen nothing beyond the wanted pairs, that holds for any larger space as well.
        """
        space, first = self.space, self._sequence or 0
        vector, beside = space.krylov()
        # Near a Ritz value of its own a sequence tells little: the one that found it is asked for what is further off.
        targets = self.wanted.targets(pairs, margin=1 if first else 10)
        size = space.operator.size - first
        missed = miss_probability(space.projected[first:, first:], beside if vector is not None else 0.0, targets, size)
        self.missed, full = min(missed, 1.0), len(space) == space.limit
        enough = DEAR if space.matvecs >= (self._dear or 0) else MISS
        if missed <= enough or missed == math.inf or full or vector is None:
            # Where something has been found another check is needed.
            self._checked = missed < 1 or (missed < math.inf and not pairs.open)
            self._sequence = self._dear = None
        else:
            space.append(vector)

    def _restart(self, pairs: Pairs) -> None:
        """Make room: keep the wanted pairs and those next to them."""
        self.space.rotate(pairs.rotation[self.wanted.nearest(len(pairs.theta), self.space.limit // 2)])
        self.model = self._sequence = None  # the model has led to its own vectors by now


def _gaps(theta: Tensor) -> Tensor:
    """The distance from each of some sorted values to the next one."""
    steps = (theta[:-1] - theta[1:]).abs()
    beyond = theta.new_zeros(1) if len(theta) == 1 else theta.new_full((1,), math.inf)
    return torch.minimum(torch.cat([beyond, steps]), torch.cat([steps, beyond]))


def _ends(count: int, high: int, low: int) -> list[int]:
    """Indices of the first ``high`` and the last ``low`` of ``count`` values."""
    return sorted({*range(min(high, count)), *range(max(count - low, 0), count)})
