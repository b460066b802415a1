"""The noise kernel of SGD at a point, of all examples; for squared error, from which it is derived."""

from __future__ import annotations

import math

import torch

from ..eigen import top_eigenpairs
from ..experiments.task import Task
from ..gauss_newton import TangentKernelOperator
from ..mean_square import exact_kernel_norm, sgd_sharpness
from ..noise import kernel_norm, kernel_norm_bounds, noise_fraction, sam_factor, sgd_edge_ratio
from ..settings import Settings, Truth
from ..tangent import MOST_ROWS, ntk_blocks, ntk_matrix, require_squared_error
from .base import Observable, Point

__all__ = ["NOISE_KERNEL"]

PAIRS = 5
TOLERANCE = 3e-2  # of the pairs: the bounds are wider than that


class NoiseSettings(Settings):
    """Whether to compute what takes the whole tangent kernel, an (N·C)² matrix, besides."""

    exact_noise: Truth = False


def _check(task: Task) -> None:
    outputs = require_squared_error(task.everything(), task.initial_parameters())
    rows = task.examples * outputs
    if task.config.exact_noise and rows > MOST_ROWS:
        raise ValueError(
            f"exact_noise needs a matrix of examples times outputs, {rows} rows, more than the {MOST_ROWS} allowed; "
            "take fewer examples"
        )


def _noise_kernel(point: Point) -> dict[str, float]:
    """The trace and leading eigenvalues of the tangent kernel Θ, and the kernel norms that follow for the batch size.

    Columns: ``full_loss``; ``ntk_trace``, ``ntk_eigenvalue_1``…``5``; ``noise_fraction`` p; ``noise_kernel_trace``
    K_tr; ``noise_kernel_low`` and ``noise_kernel_high``, bounds on K. With ``exact_noise`` also ``noise_kernel`` K,
    ``noise_kernel_exact`` K*, ``sgd_sharpness`` λ_gen with ``sgd_residual``, ``sgd_edge_ratio`` ηλ_gen/2 and, for SAM,
    ``sam_factor`` φ.
    """
    config, objective, w, rate = point.config, point.task.everything(), point.params, point.learning_rate
    batch = config.batch_size or point.task.examples
    p = noise_fraction(point.task.examples, batch)
    blocks = ntk_blocks(objective, w)
    outputs = blocks.shape[1]
    trace = float(blocks.diagonal(dim1=1, dim2=2).sum(1).mean())
    kernel = TangentKernelOperator(objective, w)
    start = point.memory.get("ntk")
    explore = 6 if start is None else 0
    found = top_eigenpairs(kernel, PAIRS, v0=start, tol=TOLERANCE, generator=point.generator(), explore=explore)
    point.memory["ntk"] = tuple(found.model)
    low, high = kernel_norm_bounds(trace, found.values, rate, p, outputs)
    row = {
        "full_loss": float(objective.value(w)),
        "ntk_trace": trace,
        **{f"ntk_eigenvalue_{i + 1}": float(value) for i, value in enumerate(found.values)},
        "noise_fraction": p,
        "noise_kernel_trace": p * rate * trace / (2 * outputs),
        "noise_kernel_low": low,
        "noise_kernel_high": high,
    }
    return row | _exact(point, p, outputs) if config.exact_noise else row


def _exact(point: Point, p: float, outputs: int) -> dict[str, float]:
    config, objective = point.config, point.task.everything()
    theta = ntk_matrix(objective, point.params)
    exact, sharpness = exact_kernel_norm(theta, point.learning_rate, p, outputs), sgd_sharpness(theta, p, outputs)
    row = {
        "noise_kernel": kernel_norm(torch.linalg.eigvalsh(theta), point.learning_rate, p, outputs),
        "noise_kernel_exact": exact.value,
        "sgd_sharpness": sharpness.value,
        "sgd_residual": sharpness.residual,
        "sgd_edge_ratio": float(sgd_edge_ratio(sharpness.value, point.learning_rate)),
    }
    if config.sharpness_aware:
        batch = config.batch_size or point.task.examples
        row["sam_factor"] = sam_factor(objective, point.params, config.rho, batch, generator=point.generator())
    return {name: float(value) if value is not None else math.nan for name, value in row.items()}


NOISE_KERNEL = Observable("noise_kernel", _noise_kernel, NoiseSettings, _check)
