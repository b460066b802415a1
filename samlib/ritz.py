"""The search space of the eigen-solver: orthonormal vectors, their images, and what these tell of the operator."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from .symmetric import Operator

__all__ = ["SearchSpace", "inner", "miss_probability", "norms", "orthonormal"]

BLOCK = 4096  # entries summed in the vectors' own precision: over millions of them, float32 loses digits


def inner(left: Tensor, right: Tensor) -> Tensor:
    """⟨u, v⟩ of each row u of one matrix with each row v of another, summed in double precision."""
    whole, double = left.shape[1] // BLOCK * BLOCK, torch.promote_types(left.dtype, torch.float64)
    blocks, others = (
        rows[:, :whole].unflatten(1, (-1, BLOCK)).transpose(0, 1) if whole else rows[None, :, :0]
        for rows in (left, right)
    )
    rest = left[:, whole:].conj() @ right[:, whole:].mT
    return (blocks.conj() @ others.mT).sum(0, dtype=double) + rest


def largest(rows: Tensor) -> Tensor:
    """The size of the largest entry, in one pass: of complex ones, of their largest part."""
    low, high = torch.aminmax(torch.view_as_real(rows) if rows.is_complex() else rows)
    return torch.maximum(-low, high)


def norms(rows: Tensor, scale: float | None = None) -> Tensor:
    """‖u‖ of each row, in float64: safe for long rows, and for entries whose squares leave the range of their dtype.

    Args:
        rows: vectors, shape (m, P).
        scale: about the size of the largest entries, where it is known.
    """
    if scale is None:
        scale = float(largest(rows)) or 1.0
    # Not ``norm``, which loses digits over millions of float32; sums are pairwise.
    lengths = rows / scale if scale != 1 else rows
    return lengths.abs().square_().sum(1).double().sqrt() * scale


def orthonormal(basis: Tensor, vector: Tensor) -> tuple[Tensor | None, float]:
    """The part of a vector beside orthonormal rows: as a unit vector, and its length.

    The unit vector is None where that part is no more than rounding.
    """
    length = float(norms(vector[None]))
    if not length > 0:
        return None, length
    vector, beside = vector / length, 1.0
    while True:
        vector = vector - inner(basis, vector[None])[:, 0].to(vector) @ basis
        kept = float(norms(vector[None], 1.0))
        beside *= kept
        if beside <= 100 * torch.finfo(vector.dtype).eps:
            return None, beside * length
        vector = vector / kept
        if kept > 0.7:  # so this sweep removed little, and its rounding is small; twice is enough (Kahan, Parlett)
            return vector, beside * length


class SearchSpace:
    """Orthonormal vectors V, their images H V, and the projected matrix V* H V.

    Vectors are rows in here, so that each lies in one piece in memory.

    Args:
        operator: H.
        limit: most vectors at a time.
        budget: most products.

    Attributes:
        matvecs: products spent.
    """

    def __init__(self, operator: Operator, limit: int, budget: int) -> None:
        self.operator, self.limit, self.budget = operator, limit, budget
        self.matvecs = self._count = 0
        self._basis, self._image = torch.empty(2, 0, operator.size, dtype=operator.dtype, device=operator.device)
        self._projected = torch.zeros(0, 0, dtype=torch.promote_types(operator.dtype, torch.float64))

    def __len__(self) -> int:
        return self._count

    @property
    def basis(self) -> Tensor:
        return self._basis[: self._count]

    @property
    def image(self) -> Tensor:
        return self._image[: self._count]

    @property
    def projected(self) -> Tensor:
        """V* H V, Hermitian, in double precision on the CPU."""
        return (self._projected + self._projected.mH) / 2

    @property
    def asymmetry(self) -> float:
        """The largest |⟨u, H v⟩ − ⟨H u, v⟩| of the vectors, relative to the largest |⟨u, H v⟩|."""
        largest = self._projected.abs().max()
        return float((self._projected - self._projected.mH).abs().max() / largest) if largest > 0 else 0.0

    def extend(self, rows: Iterable[Tensor]) -> int:
        """Take up what some vectors have beside the space, as far as there is room; returns how many were taken."""
        before = self._count
        for row in rows:
            if self._count == self.limit:
                break
            vector, _ = orthonormal(self.basis, row)
            if vector is not None:
                self.append(vector)
        return self._count - before

    def append(self, vector: Tensor) -> None:
        """Take up a unit vector that is orthogonal to the others, at a product, if there is one left, and room."""
        if self.matvecs == self.budget or self._count == self.limit:
            return
        self.matvecs += 1
        if self._count == len(self._basis):
            self._grow(min(self.limit, max(16, 2 * self._count)))
        count, image = self._count, self.operator @ vector
        self._basis[count], self._image[count], self._count = vector, image, count + 1
        self._projected = F.pad(self._projected, (0, 1, 0, 1))
        self._projected[:, count] = inner(self.basis, image[None])[:, 0]
        self._projected[count] = inner(vector[None], self.image)[0]

    def _grow(self, room: int) -> None:
        for name in ("_basis", "_image"):
            rows = getattr(self, name)
            setattr(self, name, rows.new_empty(room, rows.shape[1]))
            getattr(self, name)[: len(rows)] = rows

    def krylov(self) -> tuple[Tensor | None, float]:
        """The image of the last vector beside the space, as a unit vector, and its length; see :func:`orthonormal`."""
        return orthonormal(self.basis, self.image[-1])

    def ritz(self, rotation: Tensor, theta: Tensor, norm: float) -> tuple[Tensor, Tensor, Tensor]:
        """Ritz vectors v and H v − θ v as rows, and bounds on ‖H v − θ v‖.

        Args:
            rotation: the vectors in the space's coordinates, as rows.
            theta: their values.
            norm: the largest |θ| of the space.
        """
        turn = rotation.to(self.basis)
        vectors = turn @ self.basis
        misses = (turn @ self.image).addcmul_(theta[:, None].to(vectors), vectors, value=-1)
        # Rounding can hide in a residual that is computed from rotated images.
        rounding = 8 * len(self) ** 0.5 * torch.finfo(vectors.dtype).eps * norm
        return vectors, misses, norms(misses, max(norm, torch.finfo(vectors.dtype).tiny)).cpu() + rounding

    def rotate(self, rotation: Tensor) -> None:
        """Keep only some combinations of the vectors; the rows of ``rotation`` are orthonormal."""
        turn = rotation.to(self.basis)
        self._basis, self._image, self._count = turn @ self.basis, turn @ self.image, len(turn)
        self._projected = rotation.conj() @ self._projected @ rotation.mT


def miss_probability(projected: Tensor, beside: float, targets: tuple[float, float], size: int) -> float:
    """How likely a Lanczos sequence from a random vector has not seen an eigenvalue that lies beyond a target.

    After m steps the next vector is p(H) b/‖b‖, with p(x) = Π (x − θᵢ)/Π βᵢ for Ritz values θ and the lengths β that
    were normalised away. It is a unit vector, so an eigenvector u with eigenvalue λ has |⟨u, b⟩| ≤ ‖b‖/|p(λ)|, and |p|
    grows beyond the Ritz values. A random b is that nearly orthogonal to u with probability ≤ √(2P/π)/|p|.

    Args:
        projected: the operator in the sequence's basis, tridiagonal, shape (m, m).
        beside: the last β: the length of the next vector before it is normalised.
        targets: eigenvalues above the first and below the second are looked for; ±∞ for none.
        size: P.

    Returns:
        A bound on that probability, at most 1; ∞ if a Ritz value itself lies beyond a target.

    Source: the bounds of van Dorsselaer, Hochstenbach & van der Vorst (2001), *Computing probabilistic bounds for
    extreme eigenvalues of symmetric matrices with the Lanczos method*.
    """
    theta = torch.linalg.eigvalsh(projected)
    above, below = targets[0] - theta, theta - targets[1]
    if bool((above <= 0).any() or (below <= 0).any()):
        return math.inf
    if beside <= 0:
        return 0.0
    lengths = float(projected.diagonal(-1).abs().log().sum()) + math.log(beside)
    growth = [float(distance.log().sum()) - lengths for distance in (above, below)]
    return min(1.0, (2 * size / math.pi) ** 0.5 * sum(math.exp(-min(g, 700.0)) for g in growth))
