"""Sharpness as a function of how the loss changes under random perturbations of the weights: the universal class.

With x ~ N(0, I) and the loss changes D = (ℓ(w + ρx) − ℓ(w))/ρ², or D = (ℓ(w + ρx) + ℓ(w − ρx) − 2ℓ(w))/(2ρ²) for
*paired* directions, the objective from n of them is

    F = ℓ + λ ρ² S(D₁ … Dₙ),    ∇F = g + λ Σᵢ cᵢ (gᵢ − g),    cᵢ = ∂S/∂Dᵢ,

where gᵢ is the gradient at w + ρxᵢ (the mean of the two, if paired) and λ the strength. At a minimum, as ρ → 0, the
sharpness S is ½ tr H (:func:`trace`), ¼ ‖H‖²_F (:func:`frobenius`) or log det(I + βH)/(2β) (:class:`determinant`):
cumulants of D, and their generating function. Elsewhere plain directions add terms in ‖g‖, which paired ones cancel:
on a quadratic every paired variant is gradient descent.

Reference: Tahmasebi, Soleymani, Bahri, Jegelka & Jaillet (2024), *A Universal Class of Sharpness-Aware Minimization
Algorithms*, arXiv:2406.03682.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "combined_gradient",
    "determinant",
    "determinant_share",
    "frobenius",
    "integral",
    "sharpness_weights",
    "trace",
    "universal_gradient",
    "universal_step",
    "universal_value",
]

Sharpness = Callable[[Tensor], Tensor]  # loss changes (n, …) → (…), one number for each copy in the other dimensions
ValueAndGradient = Callable[[Tensor], tuple[Tensor, Tensor]]


def trace(changes: Tensor) -> Tensor:
    """S = mean D, which is ½ tr H at a minimum. Shapes (n, …) → (…)."""
    return changes.mean(0)


def frobenius(changes: Tensor) -> Tensor:
    """S = ½ var D (by n − 1), which is ¼ ‖H‖²_F at a minimum. Shapes (n, …) → (…), n ≥ 2."""
    return changes.var(0) / 2


@dataclass(frozen=True)
class determinant:
    """S = −(1/β) log mean e^(−βD), which is log det(I + βH)/(2β) at a minimum for many samples; β → 0 is the trace.

    The share of the samples that counts is Π √(1 + 2βλ)/(1 + βλ) over the spectrum; with few, S leans to the trace.

    Args:
        beta: β > 0, in parameter² per loss.

    Raises:
        ValueError: if ``beta`` is not positive and finite.

    >>> determinant(beta=1.0)(torch.tensor([0.5, 0.5]))
    tensor(0.5000)
    """

    beta: float = 0.3

    def __post_init__(self) -> None:
        check_number("beta", self.beta, positive=True)

    def __call__(self, changes: Tensor) -> Tensor:
        return (math.log(len(changes)) - torch.logsumexp(-self.beta * changes, 0)) / self.beta


@dataclass(frozen=True)
class integral:
    """S = φ(mean ψ(D)), the general form of the reference, for differentiable functions of tensors φ and ψ."""

    phi: Callable[[Tensor], Tensor]
    psi: Callable[[Tensor], Tensor]

    def __call__(self, changes: Tensor) -> Tensor:
        return self.phi(self.psi(changes).mean(0))


def determinant_share(eigenvalues: Tensor, beta: float) -> float:
    """Π √(1 + 2βλ)/(1 + βλ): which share of many samples counts in :class:`determinant` at a minimum.

    It is the effective number (Σ c)²/Σ c² over n, for all eigenvalues λ ≥ 0 of the Hessian, any shape. Where βλ ≪ 1
    it is exp(−β² ‖H‖²_F/2): one large eigenvalue costs little, many small ones cost all.

    >>> round(determinant_share(torch.full((10,), 2.5**0.5), beta=0.3), 2)
    0.58
    """
    scaled = beta * eigenvalues.double()
    return float((0.5 * torch.log1p(2 * scaled) - torch.log1p(scaled)).sum().exp())


def sharpness_weights(sharpness: Sharpness, changes: Tensor) -> Tensor:
    """cᵢ = ∂S/∂Dᵢ in float64, shapes (n, …) → (n, …)."""
    return torch.func.grad(lambda d: sharpness(d).sum())(changes.double())


def universal_value(
    value: Callable[[Tensor], Tensor],
    params: Tensor,
    directions: Tensor,
    rho: float,
    strength: float,
    sharpness: Sharpness,
    paired: bool = True,
) -> Tensor:
    """F = ℓ + λ ρ² S(D₁ … Dₙ) for given directions; differentiable as often as ``value`` and S are.

    Args:
        value: maps parameters (P,) to the loss (). Like every function here it may take copies, (…, P) → (…).
        params: w, shape (P,).
        directions: x₁ … xₙ, shape (n, P).
        rho: size ρ > 0 of the perturbation ρx, in parameter units for x without a unit.
        strength: λ ≥ 0.
        sharpness: S, such as :func:`trace`.
        paired: use −x with each x.
    """
    loss = value(params)
    at = [torch.stack([value(params + sign * rho * x) for sign in signs(paired)]).mean(0) for x in directions]
    return loss + strength * rho**2 * sharpness((torch.stack(at) - loss) / rho**2)


def universal_gradient(
    value_and_gradient: ValueAndGradient,
    params: Tensor,
    directions: Tensor,
    rho: float,
    strength: float,
    sharpness: Sharpness,
    paired: bool = True,
) -> Tensor:
    """∇F = g + λ Σᵢ cᵢ (gᵢ − g) at given directions, from 1 + n gradients, or 1 + 2n if paired; shape (P,).

    Args:
        value_and_gradient: maps parameters (P,) to loss () and gradient (P,), as ``Objective.value_and_gradient``.
        params, directions, rho, strength, sharpness, paired: as for :func:`universal_value`.

    Source: Tahmasebi et al. (2024), arXiv:2406.03682, for plain directions.
    """
    around = [[value_and_gradient(params + sign * rho * x) for x in directions] for sign in signs(paired)]
    losses, gradients = (torch.stack([torch.stack([pair[i] for pair in side]) for side in around]) for i in (0, 1))
    return combined_gradient(*value_and_gradient(params), losses, gradients, rho, strength, sharpness)


def combined_gradient(
    loss: Tensor,
    gradient: Tensor,
    losses: Tensor,
    gradients: Tensor,
    rho: float,
    strength: float,
    sharpness: Sharpness,
) -> Tensor:
    """∇F from the loss () and gradient (P,) at w, and those around it, shapes (signs, n) and (signs, n, P)."""
    weights = sharpness_weights(sharpness, (losses.double().mean(0) - loss.double()) / rho**2).to(gradient)
    return gradient + strength * (weights[..., None] * (gradients.mean(0) - gradient)).sum(0)


def universal_step(
    value_and_gradient: ValueAndGradient,
    params: Tensor,
    learning_rate: float,
    directions: Tensor,
    rho: float,
    strength: float,
    sharpness: Sharpness,
    paired: bool = True,
) -> Tensor:
    """w − η ∇F, see :func:`universal_gradient`; :class:`UniversalSAM` around SGD does the same."""
    return params - learning_rate * universal_gradient(
        value_and_gradient, params, directions, rho, strength, sharpness, paired
    )


def signs(paired: bool) -> tuple[int, ...]:
    return (1, -1) if paired else (1,)


def check_number(name: str, value: float, positive: bool = False) -> None:
    """Refuse what is negative or not finite, or zero where ``positive``."""
    if not 0 <= value < math.inf or (positive and value == 0):
        raise ValueError(f"{name} must be {'positive' if positive else 'non-negative'} and finite, got {value!r}")
