"""The directions in which SAM perturbs: scaled by the weights (ASAM), or averaged from step to step (GraphSAM)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .precision import add_scaled, total_norm, wide
from .steps import ASAM_EPSILON, EPSILON

__all__ = ["averaged", "tempered", "uphill"]

Group = Mapping[str, Any]


def tempered(p: Tensor, group: Group, way: Tensor, power: int = 1) -> Tensor:
    """T way or, with power 2, T² way, in at least float32; T = |p| + 0.01 in adaptive groups, else one."""
    return wide(way) * (wide(p).abs() + ASAM_EPSILON) ** power if group["adaptive"] else wide(way)


def averaged(
    held: Mapping[Tensor, Tensor], descent: Mapping[Tensor, Tensor], parameters: Iterable[tuple[Tensor, Group]]
) -> dict[Tensor, Tensor]:
    """β d/‖d‖ + (1 − β) u/‖u‖, without the norms in groups that do not normalise; d itself where u is zero or β is 1.

    Args:
        held: d of each parameter that has one, and some have.
        descent: u, likewise.
        parameters: all of them, each with its group.
    """
    parameters = list(parameters)
    if not descent or all(group["beta"] == 1 for _, group in parameters):
        return dict(held)
    before, now = total_norm(held.values()), total_norm(descent.values())
    # Zero norms are told apart on the tensors' own device: looking at them would wait for it.
    some = (now > 0).to(now.dtype)
    per_d, per_u = (torch.where(n > 0, 1 / n, 0.0) for n in (before, now))
    new = {}
    for p, group in parameters:
        keep, add = group["beta"], 1 - group["beta"]
        if group["normalize"]:
            keep, add = keep * per_d, add * per_u
        d, u, keep, add = held.get(p), descent.get(p), some * keep + (1 - some), some * add
        if d is not None:
            both = wide(d) * keep.to(d.device)
            if u is not None:
                add_scaled(both, wide(u), add)
            new[p] = both.to(p.dtype)
        elif u is not None:
            new[p] = (wide(u) * add.to(u.device)).to(p.dtype)
    return new


def uphill(params: Tensor, gradient: Tensor, slices: Iterable[tuple[slice, Group]]) -> Tensor:
    """w + e, where SAM takes its second gradient from here, for parameters in one vector.

    Args:
        params: w, shape (P,).
        gradient: at w, shape (P,).
        slices: where the parameters lie that SAM moves, each with its group.
    """
    slices = list(slices)
    moved = params.clone()
    length = total_norm(tempered(params[s], group, gradient[s]) for s, group in slices)
    for s, group in slices:
        rho = -group["rho"] if group.get("maximize") else group["rho"]
        scale = rho / (length + EPSILON) if group["normalize"] else rho
        add_scaled(moved[s], tempered(params[s], group, gradient[s], 2), scale)
    return moved
