"""Where the mean update drifts on a manifold of minima: against the gradient of the measure it is to lower.

A small tanh network fits a few examples exactly; its minima form a manifold, whose tangent space is the null space of
the outputs' Jacobian. At a minimum the update's mean is λρ² ∇S up to order ρ⁴, so (update/(λρ²)) · T/‖T‖² should be 1
on average, for T the tangential part of ∇S: of ½ tr H, ¼ ‖H‖²_F or log det(I + βH)/(2β).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from ..cumulants import Sharpness, combined_gradient, determinant, frobenius, signs, trace

__all__ = ["Interpolation", "drift_table", "interpolation", "measure_gradient"]

INPUTS, HIDDEN, EXAMPLES = 3, 6, 8


@dataclass(frozen=True)
class Interpolation:
    """A network at a minimum with loss zero.

    Attributes:
        inputs, targets: the examples, shapes (N, 3) and (N,).
        params: w, shape (P,).
        tangent: projection on the manifold's tangent space, shape (P, P).
    """

    inputs: Tensor
    targets: Tensor
    params: Tensor
    tangent: Tensor

    def loss(self, w: Tensor) -> Tensor:
        """Mean squared error of any number of copies, (…, P) → (…)."""
        return (_outputs(w, self.inputs) - self.targets).square().mean(-1)

    def value_and_gradient(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and gradient of any number of copies, (…, P) → (…) and (…, P)."""
        w = w.detach().requires_grad_()
        loss = self.loss(w)
        return loss.detach(), torch.autograd.grad(loss.sum(), w)[0]


def _outputs(w: Tensor, inputs: Tensor) -> Tensor:
    """v · tanh(W x + b), (…, P) → (…, N)."""
    weights, bias, out = w.split([HIDDEN * INPUTS, HIDDEN, HIDDEN], -1)
    inner = inputs @ weights.unflatten(-1, (INPUTS, HIDDEN)) + bias[..., None, :]
    return (torch.tanh(inner) * out[..., None, :]).sum(-1)


def interpolation(seed: int = 0, size: float = 1.0) -> Interpolation:
    """Random examples, fitted exactly by Gauss–Newton from random weights."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs, targets, w = normal(EXAMPLES, INPUTS), normal(EXAMPLES), size * normal(HIDDEN * (INPUTS + 2))
    for _ in range(50):
        jacobian = torch.func.jacrev(_outputs)(w, inputs)
        step = torch.linalg.pinv(jacobian) @ (_outputs(w, inputs) - targets)
        w = w - step * min(1.0, 0.5 / float(step.norm().clamp_min(1e-300)))
    jacobian = torch.func.jacrev(_outputs)(w, inputs)
    return Interpolation(inputs, targets, w, torch.eye(len(w)).double() - torch.linalg.pinv(jacobian) @ jacobian)


def measure_gradient(problem: Interpolation, sharpness: Sharpness) -> Tensor:
    """∇S at the minimum from the dense Hessian, shape (P,): S as ρ → 0 for very many samples."""

    def measure(w: Tensor) -> Tensor:
        hessian = torch.func.hessian(problem.loss)(w)
        if isinstance(sharpness, determinant):
            return torch.logdet(torch.eye(len(w)).double() + sharpness.beta * hessian) / (2 * sharpness.beta)
        return hessian.trace() / 2 if sharpness is trace else hessian.square().sum() / 4

    return torch.func.grad(measure)(problem.params)


def _updates(
    problem: Interpolation, sharpness: Sharpness, samples: int, paired: bool, rho: float, copies: int, seed: int
) -> Iterator[Tensor]:
    """Samples of (∇F − g)/(λρ²), a chunk of copies at a time."""
    generator, chunk = torch.Generator().manual_seed(seed), max(1, 32_000 // samples)
    loss, gradient = problem.value_and_gradient(problem.params)
    for first in range(0, copies, chunk):
        count = min(chunk, copies - first)
        x = torch.randn(samples, count, len(problem.params), generator=generator, dtype=torch.float64)
        at = torch.stack([problem.params + sign * rho * x for sign in signs(paired)])
        around = problem.value_and_gradient(at)
        many = loss.expand(count), gradient.expand(count, -1)
        yield (combined_gradient(*many, *around, rho, 1.0, sharpness) - gradient) / rho**2


def _probes(problem: Interpolation, copies: int, seed: int) -> Iterator[Tensor]:
    """Samples of ∇ ¼|Hv|², the other unbiased estimate of ∇ ¼‖H‖²_F: one exact product, and a third derivative."""

    def measure(w: Tensor, v: Tensor) -> Tensor:
        return torch.func.jvp(torch.func.grad(problem.loss), (w,), (v,))[1].square().sum() / 4

    v = torch.randn(copies, len(problem.params), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    yield torch.func.vmap(torch.func.grad(measure), (None, 0))(problem.params, v)


def _drift(updates: Iterator[Tensor], expected: Tensor, tangent: Tensor) -> dict[str, float]:
    """What many updates say: slope with its standard error and cosine on the tangent space, and of the whole vector."""
    along = tangent @ expected
    slopes, total, squares = [], torch.zeros_like(expected), 0.0
    for update in updates:
        moved = update @ tangent
        slopes.append(moved @ along / along.square().sum())
        total, squares = total + update.sum(0), squares + float(moved.square().sum())
    slope = torch.cat(slopes)
    mean = total / len(slope)
    signal = (tangent @ mean).norm()
    return {
        "copies": len(slope),
        "slope": float(slope.mean()),
        "slope_error": float(slope.std() / len(slope) ** 0.5),
        "cosine": float(torch.cosine_similarity(tangent @ mean, along, 0)),
        "whole_cosine": float(torch.cosine_similarity(mean, expected, 0)),
        "signal_to_noise": float(signal / (squares / len(slope) - signal.square()).sqrt()),
    }


DRIFT_RULES: Sequence[tuple[str, Sharpness, int, bool, float]] = (
    ("frobenius", frobenius, 2, True, 0.01),
    ("frobenius", frobenius, 8, True, 0.01),
    ("frobenius", frobenius, 2, False, 0.01),
    ("frobenius", frobenius, 8, False, 0.01),
    ("frobenius", frobenius, 2, True, 0.03),
    ("frobenius", frobenius, 8, True, 0.03),
    ("frobenius", frobenius, 2, False, 0.03),
    ("frobenius", frobenius, 8, False, 0.03),
    ("trace", trace, 2, True, 0.01),
    ("trace", trace, 2, False, 0.01),
    ("determinant", determinant(0.3), 2, True, 0.01),
    ("determinant", determinant(0.3), 8, True, 0.01),
    ("determinant", determinant(0.3), 64, True, 0.01),
)


def drift_table(seed: int = 0, evaluations: int = 300_000) -> pd.DataFrame:
    """Slope and cosine of the mean update on ∇S for each rule, from about the same number of gradients each."""
    problem, rows = interpolation(seed), []
    for name, sharpness, samples, paired, rho in DRIFT_RULES:
        row: dict[str, Any] = {"name": name, "samples": samples, "paired": paired, "rho": rho}
        copies = evaluations // (samples * len(signs(paired)))
        updates = _updates(problem, sharpness, samples, paired, rho, copies, seed)
        rows.append(row | _drift(updates, measure_gradient(problem, sharpness), problem.tangent))
    row = {"name": "hessian product", "samples": 1, "paired": False, "rho": 0.0}
    probes = _probes(problem, 20_000, seed)
    rows.append(row | _drift(probes, measure_gradient(problem, frobenius), problem.tangent))
    return pd.DataFrame(rows)
