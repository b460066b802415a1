"""Floats, NumPy arrays and tensors as arguments of one function, broadcast against each other."""

from __future__ import annotations

import functools
import sys
from typing import Any, TypeAlias

import numpy as np

__all__ = ["Real", "array", "arrays", "check", "namespace", "result"]

Real: TypeAlias = Any  # float, NumPy array or tensor


def namespace(*values: Any) -> Any:
    """PyTorch if any argument is a tensor, else NumPy. A tensor can only exist once torch is imported."""
    torch = sys.modules.get("torch")
    return torch if torch is not None and any(isinstance(v, torch.Tensor) for v in values) else np


def array(value: Any) -> Any:
    """A tensor as it is, anything else as an array of float64."""
    return value if namespace(value) is not np else np.asarray(value, dtype=np.float64)


def arrays(*values: Any) -> tuple[Any, ...]:
    """All arguments in one namespace, broadcast against each other."""
    torch = namespace(*values)
    if torch is np:
        return tuple(np.broadcast_arrays(*map(array, values)))
    tensors = [v for v in values if isinstance(v, torch.Tensor)]
    dtypes = [t.dtype for t in tensors if t.is_floating_point()] or [torch.get_default_dtype()]
    dtype, device = functools.reduce(torch.promote_types, dtypes), tensors[0].device
    return tuple(torch.broadcast_tensors(*(torch.as_tensor(v, dtype=dtype, device=device) for v in values)))


def result(value: Any) -> Any:
    """A float in place of an array without dimensions."""
    return float(value) if isinstance(value, np.ndarray | np.generic) and value.ndim == 0 else value


def check(
    name: str, value: Any, *, positive: bool = False, allow_nan: bool = False, below: float = float("inf")
) -> None:
    """Refuse, by its name, an argument with a value out of range.

    Raises:
        ValueError: names the argument, what is allowed and what was given.
    """
    x = array(value)
    good = (x > 0) if positive else (x >= 0)
    good = good & (x < below)
    if allow_nan:
        good = good | (x != x)
    if not bool(good.all()):
        most = "finite" if below == float("inf") else f"less than {below}"
        allowed = f"{'positive' if positive else 'non-negative'} and {most}"
        raise ValueError(f"{name} must be {allowed}, got {value!r}")
