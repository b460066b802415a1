"""Arithmetic of a SAM step: norms that neither round nor overflow, sums in at least single precision, and their limits.

Half-precision gradients overflow when they are squared and vanish when they are scaled; float32 sums over millions of
entries read low. None of it shows in a loss curve, so all of it is kept here, in one place.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["add_scaled", "norm", "total_norm", "wide"]

LONG, ROW = 4096, 256  # longer float32 vectors are summed by rows, each short enough for float32


def wide(x: Tensor) -> Tensor:
    """x, dense and in at least float32; x itself where it is that already."""
    x = x if x.layout == torch.strided else x.to_dense()
    return x.float() if x.dtype.itemsize < 4 else x


def norm(x: Tensor) -> Tensor:
    """‖x‖ of a tensor of any shape as a float64 scalar, within 2e-7 of the exact one, in one pass.

    A float32 sum of squares reads low on a CPU: by 6e-5 at three million entries, by 2e-3 at thirty million. Short rows
    do not, and need no copy in float64. Squares of entries beyond 1e18 or below 1e-18 leave its
    range, though: see :func:`total_norm`.

    >>> float(norm(torch.full((3, 3), 2.0, dtype=torch.bfloat16)))
    6.0
    """
    x = wide(x)
    if type(x) in (Tensor, torch.nn.Parameter) and x.device.type == "cpu" and x.numel() > LONG:
        flat = x.reshape(-1)
        whole = flat.numel() // ROW * ROW
        norms = torch.linalg.vector_norm(flat[:whole].view(-1, ROW), dim=1)
        x = torch.cat([norms, flat[whole:]])  # a norm of norms, and of what is left over
    return _norm_in_float64(x)


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """The norm of all tensors as one vector, on the first one's device: as :func:`norm`, for entries of any size."""
    tensors = list(tensors)
    norms = [norm(x) for x in tensors]
    if norms[0].device.type == "cpu" and not all(1e-15 < float(n) < math.inf for n in norms):
        norms = [_norm_of_any_size(wide(x)) for x in tensors]
    together = torch.stack([n.to(norms[0].device) for n in norms])
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(together)


def add_scaled(p: Tensor, x: Tensor, scale: Tensor | float) -> None:
    """p ← p + scale · x in place, rounded once, to p's own type.

    Args:
        p: the tensor to change.
        x: as :func:`wide` returns it, of p's shape.
        scale: a number, or a tensor with one (which a GPU need not wait for).
    """
    sum_ = wide(p)
    if isinstance(scale, Tensor):
        sum_.addcmul_(x, scale.to(sum_.device, sum_.dtype))
    else:
        sum_.add_(x, alpha=scale)
    if sum_ is not p:
        p.copy_(sum_)


def _norm_of_any_size(x: Tensor) -> Tensor:
    """As below, for entries whose squares leave float64, too."""
    size = x.abs().max() if x.numel() else None
    if size is None or not bool(size > 0) or not bool(size.isfinite()):
        return _norm_in_float64(x)
    return _norm_in_float64(x / size) * size.double()


def _norm_in_float64(x: Tensor) -> Tensor:
    exact = torch.promote_types(x.dtype, torch.float64) if x.device.type != "mps" else None
    return torch.linalg.vector_norm(x, dtype=exact)
