"""Kernels of the noise of stochastic gradient descent, for squared error.

A step on B of N examples moves the residual z = f − y, to first order, by −η(N/B) Θ P_S z, with the tangent kernel
Θ = (2/NC) J Jᵀ (eigenvalues λ_a, C outputs) and the projection P_S to the chosen examples. Its covariance follows

    Σ⁺ = (I − ηΘ) Σ (I − ηΘ) + p η² Θ [N bd(Σ) − Σ] Θ

where bd keeps the C × C blocks of each example and p = (N − B)/(B(N − 1)). Below, K_tr ≤ K ≤ K* bound its growth from
traces, from eigenvalues, and exactly (:mod:`samlib.mean_square`); the mean square is stable if and only if K* < 1,
hence unstable where K ≥ 1.

The derivation is this project's own, by the closure of Velikanov, Kuznedelev & Yarotsky (2023), arXiv:2206.11124. The
quantity is that of Agarwala & Pennington (2024), *High dimensional analysis reveals conservative sharpening and a
stochastic edge of stability*, arXiv:2404.19261; their definition may differ.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .elsewhere import elsewhere
from .objective import Objective
from .optim import sam_perturb
from .tangent import require_squared_error

__all__ = [
    "kernel_norm",
    "kernel_norm_bounds",
    "noise_fraction",
    "sam_factor",
    "sgd_edge_ratio",
]

# What takes the tangent kernel in full, or is one, is found here too.
__getattr__ = elsewhere(
    __name__,
    {
        "GaussNewtonOperator": "gauss_newton",
        "KernelNorm": "mean_square",
        "SgdSharpness": "mean_square",
        "exact_kernel_norm": "mean_square",
        "ntk_blocks": "tangent",
        "ntk_matrix": "tangent",
        "sgd_sharpness": "mean_square",
    },
)

Values = Any  # a tensor, an array or a list of numbers


def noise_fraction(examples: int, batch_size: int, replacement: bool = False) -> float:
    """p = (N − B)/(B(N − 1)), by which the noise of a mini-batch of B out of N examples enters; 1/B with replacement.

    Args:
        examples: N.
        batch_size: B, at most N without replacement.
        replacement: whether an example may be drawn more than once.

    Returns:
        From 0 (no noise) to 1 (single examples).

    Raises:
        ValueError: if a number is not a positive integer, or B is above N.

    >>> noise_fraction(100, 1), noise_fraction(100, 100)
    (1.0, 0.0)
    """
    for name, value in (("examples", examples), ("batch_size", batch_size)):
        if not 1 <= value < math.inf or value != int(value):
            raise ValueError(f"{name} must be a positive integer, got {value!r}")
    if replacement:
        return 1 / batch_size
    if batch_size > examples:
        raise ValueError(f"batch_size must be at most the {examples} examples, got {batch_size}")
    return 0.0 if examples == 1 else (examples - batch_size) / (batch_size * (examples - 1))


def kernel_norm(eigenvalues: Values, learning_rate: float, fraction: float, outputs: int = 1) -> float:
    """The kernel norm from the tangent kernel's eigenvalues, K = (p/C) Σ_a ηλ_a/(2 − (1 − p)ηλ_a).

    K ≥ 1 implies that SGD is unstable in mean square. K < 1 does not imply that it is stable, unless all examples
    carry the noise alike: see :func:`~samlib.mean_square.exact_kernel_norm`.

    Args:
        eigenvalues: those of Θ (or of the Gauss–Newton matrix), in loss per parameter²; zeros may be left out.
        learning_rate: step size η.
        fraction: p, from :func:`noise_fraction`.
        outputs: C.

    Returns:
        K; infinite if (1 − p)ηλ ≥ 2 for an eigenvalue, where SGD is unstable on its own account.

    Raises:
        ValueError: if an argument is out of range.

    >>> kernel_norm([2.0, 1.0], learning_rate=0.5, fraction=1.0)  # (η/2) · trace for single examples
    0.75
    """
    check_noise(learning_rate, fraction, outputs)
    total = float(_gains(_eigenvalues(eigenvalues), learning_rate, fraction).sum())
    return math.inf if math.isinf(total) else fraction / outputs * total


def kernel_norm_bounds(
    trace: float, top_eigenvalues: Values, learning_rate: float, fraction: float, outputs: int = 1
) -> tuple[float, float]:
    """Bounds on :func:`kernel_norm` from the trace and the k leading eigenvalues of the tangent kernel.

    What the trace has beyond these belongs to eigenvalues between 0 and λ_k, each of which adds at least p/C · ηλ/2 and
    at most p/C · ηλ/(2 − (1 − p)ηλ_k).

    Args:
        trace: of Θ, from :func:`~samlib.tangent.ntk_blocks`.
        top_eigenvalues: the k ≥ 1 leading ones, all of them (no gaps), in any order.
        learning_rate, fraction, outputs: as for :func:`kernel_norm`.

    Returns:
        The lower and the upper bound; without a tail they coincide. Both infinite where (1 − p)ηλ_1 ≥ 2.

    Raises:
        ValueError: if an argument is out of range, or the eigenvalues add up to more than the trace.

    >>> kernel_norm_bounds(3.0, [2.0], learning_rate=0.4, fraction=0.5)  # λ_1 = 2, and more that add up to 1
    (0.35, 0.375)
    """
    check_noise(learning_rate, fraction, outputs)
    top = _eigenvalues(top_eigenvalues)
    tail = trace - float(top.sum())
    if not tail >= -1e-4 * trace:
        raise ValueError(f"the leading eigenvalues add up to {float(top.sum()):g}, more than the trace {trace:g}")
    sure = float(_gains(top, learning_rate, fraction).sum())
    if math.isinf(sure):
        return math.inf, math.inf
    low, high = (
        sure + max(tail, 0) * learning_rate / (2 - (1 - fraction) * learning_rate * largest)
        for largest in (0.0, float(top.min()))
    )
    return fraction / outputs * low, fraction / outputs * high


def sgd_edge_ratio(sharpness: float, learning_rate: float) -> float:
    """η λ_gen/2, which is 1 at the stochastic edge of stability.

    Args:
        sharpness: λ_gen, from :func:`~samlib.mean_square.sgd_sharpness`.
        learning_rate: step size η.
    """
    check_noise(learning_rate, 0.0, 1)
    if math.isnan(sharpness):
        raise ValueError("sharpness must be a number, got NaN")
    return learning_rate * sharpness / 2


def sam_factor(
    objective: Objective,
    params: Tensor,
    rho: float,
    batch_size: int,
    batches: int = 10,
    generator: torch.Generator | None = None,
) -> float:
    """By how much SAM lengthens the gradient along itself: φ = E⟨g_SAM, g⟩/E‖g‖² over mini-batches.

    g_SAM is the gradient of the same mini-batch at w + ρ g/(‖g‖ + 1e-5). The natural stochastic edge of SAM is
    φηλ_gen = 2. It is a guide, not a law: exact for B = N, but for B < N not even to first order in ρ.

    Args:
        objective: the examples and the network, with squared error as its loss.
        params: w, shape (P,).
        rho: radius ρ ≥ 0; zero gives 1.
        batch_size: B.
        batches: mini-batches to average over, each drawn without replacement. With B = N one is enough, and taken.
        generator: source of the mini-batches; seeded with 0 if not given.

    Returns:
        φ; NaN where all gradients vanish.

    Raises:
        ValueError: if an argument is out of range, or the loss is not squared error.
    """
    examples = len(objective.inputs)
    noise_fraction(examples, batch_size)
    if not 0 <= rho < math.inf:
        raise ValueError(f"rho must be non-negative and finite, got {rho!r}")
    if batches < 1:
        raise ValueError(f"batches must be at least 1, got {batches!r}")
    require_squared_error(objective, params)
    generator = generator or torch.Generator().manual_seed(0)
    products = torch.zeros(2, dtype=torch.float64)
    for _ in range(batches if batch_size < examples else 1):
        chosen = torch.randperm(examples, generator=generator)[:batch_size].to(objective.inputs.device)
        x, y = objective.inputs[chosen], objective.targets[chosen]
        part = Objective(objective.model, objective.loss, x, y, chunk_size=objective.chunk_size)
        grad = part.gradient(params)
        sam_grad = part.gradient(sam_perturb(params, grad, rho)) if rho else grad
        products += torch.stack([(sam_grad.double() @ grad.double()), grad.double().square().sum()]).cpu()
    return float(products[0] / products[1])


def check_noise(learning_rate: float, fraction: float, outputs: int) -> None:
    """Raise a ValueError for an argument out of range."""
    if not 0 < learning_rate < math.inf:
        raise ValueError(f"learning_rate must be positive and finite, got {learning_rate!r}")
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction must lie between 0 and 1, got {fraction!r}; see noise_fraction")
    if not 1 <= outputs < math.inf or outputs != int(outputs):
        raise ValueError(f"outputs must be a positive integer, got {outputs!r}")


def _eigenvalues(values: Values) -> Tensor:
    """Eigenvalues in float64, with those that rounding made negative set to zero."""
    found = torch.as_tensor(values, dtype=torch.float64).flatten()
    if not len(found) or not bool(found.isfinite().all()) or float(found.min()) < -1e-5 * float(found.max().abs()):
        raise ValueError(f"eigenvalues of a tangent kernel must be finite and not negative, got {values!r}")
    return found.clamp_min(0)


def _gains(values: Tensor, learning_rate: float, fraction: float) -> Tensor:
    """ηλ/(2 − (1 − p)ηλ), infinite from its pole on."""
    room = 2 - (1 - fraction) * learning_rate * values
    return torch.where(room > 0, learning_rate * values / room, math.inf)
