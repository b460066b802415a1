"""What the eigen-solver and the stochastic estimates take as a symmetric operator, and how they multiply with it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

__all__ = ["Operator", "SymmetricOperator", "as_operator", "on_the_host"]

Function = TypeVar("Function", bound=Callable[..., Any])


def on_the_host(function: Function) -> Function:
    """For functions whose small arrays live on the CPU: whatever the caller's default device is."""

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        if torch.get_default_device().type == "cpu":
            return function(*args, **kwargs)
        with torch.device("cpu"):
            return function(*args, **kwargs)

    return cast(Function, called)


class SymmetricOperator(Protocol):
    """What the solvers take as it is: a square tensor, or anything with ``shape`` and ``@`` for a vector (P,)."""

    @property
    def shape(self) -> tuple[int, int] | torch.Size: ...
    def __matmul__(self, vector: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class Operator:
    """A symmetric (or Hermitian) operator: its product with a vector (n,), and where and in which dtype vectors live.

    >>> as_operator(lambda v: 2 * v, size=3) @ torch.ones(3)
    tensor([2., 2., 2.])
    """

    product: Callable[[Tensor], Any]
    size: int
    dtype: torch.dtype
    device: torch.device

    @property
    def shape(self) -> tuple[int, int]:
        return self.size, self.size

    def __matmul__(self, vector: Tensor) -> Tensor:
        image = torch.as_tensor(self.product(vector))
        if image.numel() != self.size:
            raise ValueError(
                f"the operator must map a vector ({self.size},) to one, got a result of shape {tuple(image.shape)}"
            )
        return image.reshape(-1).to(self.device, self.dtype)


def as_operator(
    operator: Any, size: int | None = None, dtype: Any = None, device: torch.device | str | None = None
) -> Operator:
    """Any kind of symmetric operator, as the solvers use it.

    Vectors are of float32 at least: half precision is for products only. A Hermitian complex operator has complex
    vectors; integers count as float64.

    Args:
        operator: a square tensor, dense or sparse; a NumPy array; a SciPy matrix or ``LinearOperator``; any object with
            ``shape`` (n, n) and ``@`` for a vector (n,), like :class:`samlib.HessianOperator`; or a function of a
            vector, with ``size``.
        size: n, where the operator does not tell.
        dtype: of the vectors that the product takes, where the operator does not tell; a NumPy dtype if it takes
            arrays. Found by one product with zeros if not given.
        device: of those vectors, where the operator does not tell; the CPU if not given.

    Raises:
        TypeError: if it is none of these.
        ValueError: if it is not square.
    """
    if isinstance(operator, Operator):
        return operator
    shape = tuple(getattr(operator, "shape", None) or (size, size))
    multiply = getattr(operator, "__matmul__", operator)
    told = getattr(operator, "dtype", None) or dtype
    if None in shape or not callable(multiply) or not (told is None or _is_numeric(told)):
        raise TypeError(
            "operator must be a square tensor, NumPy array or SciPy matrix of numbers, or an object with a shape "
            "(n, n) and `@` for a vector (n,); a function of a vector needs its size: as_operator(function, size). Got "
            f"{type(operator).__name__}{'' if told is None else f' of {told}'}"
        )
    if len(shape) != 2 or shape[0] != shape[1] or shape[0] < 1:
        raise ValueError(f"operator must be square, with at least one row, got shape {shape}")
    n, device = int(shape[0]), torch.device(getattr(operator, "device", None) or device or "cpu")
    if isinstance(operator, Tensor) and not (operator.is_floating_point() or operator.is_complex()):
        operator = operator.double()
        multiply, told = operator.__matmul__, operator.dtype
    told = told or _find_dtype(multiply, n, device)
    if isinstance(told, torch.dtype):
        return Operator(lambda v: multiply(v.to(told)), n, _working(told), device)
    return Operator(lambda v: multiply(v.numpy(force=True)), n, _working(_of_numpy(told)), device)


def _is_numeric(dtype: Any) -> bool:
    """Whether entries are numbers that PyTorch knows."""
    try:
        return isinstance(dtype, torch.dtype) or isinstance(_of_numpy(dtype), torch.dtype)
    except TypeError:
        return False


def _of_numpy(dtype: Any) -> torch.dtype:
    return torch.as_tensor(np.empty(0, np.dtype(dtype).newbyteorder("="))).dtype


def _working(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the vectors for products in some dtype."""
    if not dtype.is_floating_point and not dtype.is_complex:
        return torch.float64
    return torch.promote_types(dtype, torch.float32)


def _find_dtype(multiply: Callable[[Tensor], Any], size: int, device: torch.device) -> torch.dtype:
    """What a product that does not tell returns for zeros: of the default dtype, or of float64 where that fails."""
    try:
        image = multiply(torch.zeros(size, device=device))
    except (RuntimeError, TypeError, ValueError):
        image = multiply(torch.zeros(size, dtype=torch.float64, device=device))
    return torch.as_tensor(image).dtype
