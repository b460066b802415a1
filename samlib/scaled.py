"""The Hessian in the geometry of an optimizer that takes a different rate in every coordinate."""

from __future__ import annotations

import torch
from torch import Tensor

from .eigen import SymmetricOperator

__all__ = ["ScaledOperator"]


class ScaledOperator:
    """D^½ (±H + δ) D^½ of a symmetric operator H, with D diagonal.

    It has the eigenvalues of D (±H + δ), by which a step w ← w − D ∇ℓ(w) acts, and is symmetric besides. Its
    eigenvectors u live in the coordinates D^-½ w, where a gradient g is D^½ g: alignments are cosines of u and
    ``root * g``.

    Args:
        operator: H, a symmetric (P, P) tensor or operator.
        scale: diagonal of D, non-negative and finite, shape (P,). The operator keeps D^½, a copy.
        shift: δ, added to H before the scaling, as weight decay is.
        sign: 1, or −1 for −H, which an optimizer sees that maximizes.

    Attributes:
        root: diagonal of D^½, shape (P,).

    Raises:
        ValueError: if the scale does not fit the operator, or is negative or not finite.

    >>> hessian = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    >>> ScaledOperator(hessian, torch.tensor([4.0, 1.0])) @ torch.tensor([1.0, 0.0])
    tensor([8., 2.])
    """

    def __init__(self, operator: SymmetricOperator, scale: Tensor, shift: float = 0.0, sign: int = 1) -> None:
        if tuple(operator.shape) != (scale.numel(), scale.numel()) or scale.dim() != 1:
            raise ValueError(
                f"scale must be the diagonal of a matrix that multiplies the operator, of shape "
                f"({operator.shape[0]},), got {tuple(scale.shape)}"
            )
        if not bool(((scale >= 0) & scale.isfinite()).all()):
            raise ValueError("scale must be non-negative and finite in every coordinate")
        self.operator, self.shift, self.sign = operator, shift, sign
        self.dtype: torch.dtype = getattr(operator, "dtype", scale.dtype)
        self.device: torch.device = getattr(operator, "device", scale.device)
        self.shape = (scale.numel(), scale.numel())
        self.root = scale.detach().to(self.device, self.dtype).sqrt()

    def matvec(self, vector: Tensor) -> Tensor:
        """D^½ (±H + δ) D^½ v for v of shape (P,)."""
        moved = self.root * vector
        return self.root * (self.sign * (self.operator @ moved) + self.shift * moved)

    __matmul__ = matvec
