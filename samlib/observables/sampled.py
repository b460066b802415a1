"""What random perturbations of the weights see: the sharpness of a rule's own objective, and a trace by differences."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from ..cumulants import determinant, frobenius, signs
from ..eigen import top_eigenpairs
from ..objective import Objective
from ..objective.isolation import leaf
from ..optim import SAM
from ..settings import Count, Settings
from ..universal import UniversalSAM
from .base import Observable, Point

if TYPE_CHECKING:
    from ..config import RunConfig

__all__ = ["OWN_SHARPNESS", "RADII", "SAMPLED_TRACE", "own_objective"]

Value = Callable[[Tensor], Tensor]


class _HessianOf:
    """The Hessian of a function of w, as products with vectors (reverse over reverse)."""

    def __init__(self, value: Value, params: Tensor) -> None:
        self._w = leaf(params, own=True)
        self.shape, self.dtype, self.device = (len(params), len(params)), params.dtype, params.device
        with torch.enable_grad():
            self._gradient = torch.autograd.grad(value(self._w), self._w, create_graph=True)[0]

    def __matmul__(self, vector: Tensor) -> Tensor:
        return torch.autograd.grad(self._gradient, self._w, vector, retain_graph=True)[0]


def own_objective(optimizer: Optimizer, value: Value, directions: Tensor) -> Value | None:
    """The objective that a rule's steps descend in the mean, as a function of w, or None if there is none.

    Of the base alone it is ℓ. Of paired members of the universal class, and of the trace, it is ℓ + λρ² E S(D₁ … Dₙ),
    with a sample of directions in place of the mean; of unnormalised SAM ℓ + ½ρ‖g‖², to first order in ρ; of plain
    Frobenius-SAM ℓ + ½λ‖g‖², as ρ → 0. SAM descends none.

    Args:
        optimizer: the rule, with its settings.
        value: ℓ, twice differentiable.
        directions: a multiple of n of them, shape (M, P), each taken in both signs.
    """
    group = optimizer.param_groups[0]
    if isinstance(optimizer, SAM):
        if group["rho"] == 0:
            return value
        return None if group["normalize"] or group["every"] > 1 else _penalized(value, group["rho"])
    if not isinstance(optimizer, UniversalSAM) or optimizer.directions != "normal":
        return None
    rho, strength, sharpness = group["rho"], group["strength"], optimizer.sharpness
    if not optimizer.paired and sharpness is frobenius:
        return _penalized(value, strength)
    if not optimizer.paired and isinstance(sharpness, determinant):
        return None

    def mean(w: Tensor) -> Tensor:
        loss = value(w)
        around = [torch.stack([value(w + sign * rho * x) for sign in signs(True)]).mean() for x in directions]
        changes = (torch.stack(around) - loss) / rho**2
        return loss + strength * rho**2 * sharpness(changes.reshape(optimizer.samples, -1)).mean()

    return mean


def _penalized(value: Value, strength: float) -> Value:
    """ℓ + ½λ‖g‖²."""

    def penalized(w: Tensor) -> Tensor:
        loss = value(w)
        return loss + strength / 2 * torch.autograd.grad(loss, w, create_graph=True)[0].square().sum()

    return penalized


class OwnSettings(Settings):
    """Directions that stand for the mean over all."""

    own_directions: Count = 16


def _optimizer(config: RunConfig, params: Tensor) -> Optimizer:
    from ..rules import optimizer

    return optimizer(config, nn.Parameter(params.clone()))


def _own_sharpness(point: Point) -> dict[str, float]:
    """``own_sharpness``: λ_max of the Hessian of the objective that the rule descends in the mean; NaN without one.

    Where it is the loss itself, it is that of the loss.
    """
    w, objective = point.params, point.objective
    optimizer = _optimizer(point.config, w)
    groups = max(1, point.config.own_directions // getattr(optimizer, "samples", 1))
    count = groups * getattr(optimizer, "samples", 1)
    directions = torch.randn(count, len(w), generator=point.generator()).to(w)
    own = own_objective(optimizer, lambda w: torch.stack(list(objective.chunk_losses(w))).sum(), directions)
    if own is None:
        return {"own_sharpness": math.nan, "own_residual": math.nan}
    operator = _HessianOf(own, w)
    start = point.memory.get("own") or point.memory.get("model")
    found = top_eigenpairs(operator, v0=start, tol=point.config.tolerance, generator=point.generator(), explore=0)
    point.memory["own"] = tuple(found.model)
    return {"own_sharpness": float(found.values[0]), "own_residual": float(found.residuals[0])}


OWN_SHARPNESS = Observable("own_sharpness", _own_sharpness, OwnSettings)

RADII = (1e-4, 1e-3, 1e-2)  # of the perturbations by which the trace is sampled


class SampledSettings(Settings):
    """Random directions, each taken in both signs."""

    trace_samples: Count = 64


@torch.no_grad()
def _sampled_trace(point: Point) -> dict[str, float]:
    """``sampled_trace_0.0001`` …: mean of (ℓ(w + ρx) + ℓ(w − ρx) − 2ℓ(w))/ρ² over normal directions x, which is tr H
    on a smooth loss as ρ → 0, with standard errors. Losses in float64: their difference is divided by ρ²."""
    objective, w = point.objective, point.params.double()
    inputs, targets = (
        pytree.tree_map(lambda t: t.double() if t.is_floating_point() else t, part)
        for part in (objective.inputs, objective.targets)
    )
    model = copy.deepcopy(objective.model).double()
    exact = Objective(model, objective.loss, inputs, targets, chunk_size=objective.chunk_size, check=False)
    generator = point.generator()
    row: dict[str, float] = {}
    directions = [torch.randn(len(w), generator=generator).to(w) for _ in range(point.config.trace_samples)]
    middle = exact.value(w)
    for rho in RADII:
        sums = [exact.value(w + rho * x) + exact.value(w - rho * x) - 2 * middle for x in directions]
        samples = torch.stack(sums) / rho**2
        name = f"sampled_trace_{rho:g}"
        row |= {name: float(samples.mean()), f"{name}_error": float(samples.std() / len(samples) ** 0.5)}
    return row


SAMPLED_TRACE = Observable("sampled_trace", _sampled_trace, SampledSettings)
