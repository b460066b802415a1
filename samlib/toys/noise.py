"""Stochastic gradient descent on problems small enough to know everything: linear and quadratic regression.

What :mod:`samlib.noise` and :mod:`samlib.mean_square` derive for a linear model is compared here with simulation, and
with a model whose curvature moves. Loss: the mean over examples and outputs of the squared residual. Results are lists
of rows, plain dictionaries; the same seed gives the same rows. Everything is in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from ..mean_square import sgd_sharpness
from ..noise import kernel_norm, noise_fraction

__all__ = ["kernel_rate", "linear_thresholds", "pathwise_rate", "quadratic_runs", "random_kernel"]

Row = dict[str, float]
Sampling = Literal["subsets", "epochs"]


def random_kernel(examples: int, outputs: int = 1, decay: float = 0.0, seed: int = 0) -> Tensor:
    """The tangent kernel (2/NC) J Jᵀ of a linear regression with a Gaussian J of 2NC columns.

    Args:
        examples: N.
        outputs: C.
        decay: α; the i-th column is scaled by i^−α. With 0 ("white") all examples are alike.
        seed: of J.

    Returns:
        Shape (NC, NC).
    """
    rows = examples * outputs
    jacobian = _normal(torch.Generator().manual_seed(seed), rows, 2 * rows) * _scales(2 * rows, decay)
    return 2 / rows * jacobian @ jacobian.mT


def kernel_rate(eigenvalues: Tensor, fraction: float, outputs: int = 1) -> float:
    """The learning rate at which the kernel norm K is 1; SGD is unstable in mean square from there on.

    Without noise, p = 0, it is 2/λ_max by convention.

    Args:
        eigenvalues, fraction, outputs: as for :func:`~samlib.noise.kernel_norm`.

    >>> round(kernel_rate(torch.tensor([2.0, 1.0]), fraction=1.0), 9)  # 2/trace for single examples
    0.666666667
    """
    low, high = 0.0, 2 / float(eigenvalues.max()) / max(1 - fraction, torch.finfo(torch.float64).tiny)
    if fraction:  # K ≥ p η trace/(2C)
        high = min(high, 2 * outputs / (fraction * float(eigenvalues.sum())))
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if kernel_norm(eigenvalues, middle, fraction, outputs) < 1 else (low, middle)
    return high


def linear_thresholds(
    examples: int,
    batch_sizes: Sequence[int],
    seeds: Sequence[int],
    outputs: int = 1,
    decay: float = 0.0,
    simulate: Sequence[Sampling] = (),
) -> list[Row]:
    """Largest stable learning rates of linear regressions, by every criterion.

    Args:
        examples: N.
        batch_sizes: B, each at most N.
        seeds: of the regressions.
        outputs, decay: as for :func:`random_kernel`.
        simulate: ways of drawing mini-batches for which to find the pathwise threshold too, which takes seconds each.

    Returns:
        One row for each seed and batch size, with ``fraction`` p and the learning rates ``gd_rate`` 2/λ_max,
        ``trace_rate`` min(2C/(p trΘ), 2/λ_max), ``kernel_rate`` (K = 1), ``exact_rate`` 2/λ_gen, and where asked for
        ``subsets_rate`` and ``epochs_rate`` of :func:`pathwise_rate`.
    """
    rows = []
    for seed in seeds:
        theta = random_kernel(examples, outputs, decay, seed)
        values = torch.linalg.eigvalsh(theta).clamp_min(0)
        largest, trace = float(values[-1]), float(values.sum())
        for batch_size in batch_sizes:
            fraction = noise_fraction(examples, batch_size)
            row: Row = {"examples": examples, "outputs": outputs, "decay": decay, "seed": seed}
            row |= {"batch_size": batch_size, "fraction": fraction, "gd_rate": 2 / largest}
            row["trace_rate"] = min(2 * outputs / (fraction * trace) if fraction else math.inf, 2 / largest)
            row["kernel_rate"] = kernel_rate(values, fraction, outputs)
            row["exact_rate"] = 2 / sgd_sharpness(theta, fraction, outputs).value
            for sampling in simulate:
                found = pathwise_rate(theta, batch_size, outputs, sampling, seed=seed)
                row[f"{sampling}_rate"] = found
            rows.append(row)
    return rows


def pathwise_rate(
    theta: Tensor,
    batch_size: int,
    outputs: int = 1,
    sampling: Sampling = "subsets",
    chains: int = 16,
    steps: int = 2000,
    seed: int = 0,
) -> float:
    """The learning rate beyond which a typical run of SGD on a linear regression diverges, by simulation.

    Rates from 0.6 to 2 times the mean-square threshold are tried on the same mini-batches; the answer is where the
    median chain's growth, over the second half of its steps, changes sign, to 0.3 %. The mean square may diverge
    before that, by rare large excursions.

    Args:
        theta: the tangent kernel, (NC, NC).
        batch_size: B.
        outputs: C.
        sampling: "subsets" draws each mini-batch afresh; "epochs" runs through a permutation of the examples, and
            leaves out those that do not fill a mini-batch.
        chains: independent runs.
        steps: steps of each.
        seed: of the initial residuals and the mini-batches.

    Returns:
        The learning rate; NaN if growth has one sign at all rates tried.
    """
    low, high = 0.6, 2.0
    edge = 2 / sgd_sharpness(theta, noise_fraction(len(theta) // outputs, batch_size), outputs).value
    for grid in ("coarse", "fine"):  # the fine one lies where growth changes its sign
        rates = edge * torch.logspace(math.log10(low), math.log10(high), 16, dtype=torch.float64)
        growth = _growth(theta, rates, batch_size, outputs, sampling, chains, steps, seed)
        stable = int((growth <= 0).cumprod(0).sum())
        if grid == "coarse" and stable in (0, len(rates)):
            return math.nan
        stable = min(max(stable, 1), len(rates) - 1)
        low, high = (float(rate) / edge for rate in rates[stable - 1 : stable + 1])
    return edge * math.sqrt(low * high)


def _growth(
    theta: Tensor,
    rates: Tensor,
    batch_size: int,
    outputs: int,
    sampling: Sampling,
    chains: int,
    steps: int,
    seed: int,
) -> Tensor:
    """Median over chains of the growth of log|z| over the second half of the steps, for each rate."""
    examples, generator = len(theta) // outputs, torch.Generator().manual_seed(seed)
    z = _normal(generator, chains, len(theta), 1).repeat(1, 1, len(rates))
    batches = _batches(examples, batch_size, sampling, chains, generator)
    growth, run = torch.zeros(chains, len(rates), dtype=torch.float64), torch.arange(chains)[:, None]
    for step in range(1, steps + 1):
        chosen = (next(batches)[:, :, None] * outputs + torch.arange(outputs)).flatten(1)
        z -= theta[chosen].mT @ (z[run, chosen] * rates) * (examples / batch_size)
        if step % 50 == 0 or step in (steps // 2, steps):
            length = z.norm(dim=1)
            z /= length[:, None]
            growth = growth + length.log() if step > steps // 2 else growth
    return growth.median(0).values


def quadratic_runs(
    rates: Sequence[float],
    batch_sizes: Sequence[int],
    seeds: Sequence[int],
    decay: float = 0.5,
    curvature: float = 0.3,
    examples: int = 50,
    parameters: int = 100,
    steps: int = 600,
) -> list[Row]:
    """SGD on quadratic regressions f_i = J_i·w + ½ wᵀQ_i w, from w = 0, whose tangent kernel moves.

    J and the symmetric Q_i are Gaussian, their columns scaled by i^−α and (Q's, from both sides) i^−α/2; the targets
    are standard normal. All runs of a seed share regression and mini-batches, and a run with the full batch is added.

    Args:
        rates: learning rates, in units of 1/λ_0, with λ_0 the sharpness at w = 0.
        batch_sizes: B, each below N.
        seeds: of regression and mini-batches.
        decay: α.
        curvature: standard deviation of Q's elements, before scaling.
        examples: N.
        parameters: P.
        steps: length of the runs.

    Returns:
        One row for each seed, rate and batch size: ``loss`` and ``initial_loss``; ``trained``, 1 if the loss is finite
        and below the initial one; ``sharpness`` and ``initial_sharpness``, the largest eigenvalue of Θ, and
        ``ntk_trace``, NaN after overflow; ``full_edge_ratio`` ηλ_max/2 and ``kernel_trace`` p η trΘ/2, where the full
        batch ends with this learning rate.
    """
    rows = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        problem = _quadratic_regression(generator, examples, parameters, decay, curvature)
        start = _spectrum(problem[0])
        cells = [(rate, batch_size) for rate in rates for batch_size in (*batch_sizes, examples)]
        learning_rates = torch.tensor([rate / start[0] for rate, _ in cells], dtype=torch.float64)
        sizes = torch.tensor([batch_size for _, batch_size in cells])
        initial, losses, jacobians = _descend(problem, learning_rates, sizes, steps, generator)
        ends = [_spectrum(jacobian) for jacobian in jacobians]
        full = {rate: end for (rate, batch_size), end in zip(cells, ends, strict=True) if batch_size == examples}
        for (rate, batch_size), loss, end in zip(cells, losses.tolist(), ends, strict=True):
            fraction, learning_rate = noise_fraction(examples, batch_size), rate / start[0]
            rows.append(
                {"seed": seed, "decay": decay, "curvature": curvature, "rate": rate, "learning_rate": learning_rate}
                | {"batch_size": batch_size, "fraction": fraction, "initial_loss": initial, "loss": loss}
                | {"trained": float(loss < initial), "initial_sharpness": start[0], "sharpness": end[0]}
                | {"ntk_trace": end[1], "full_edge_ratio": learning_rate * full[rate][0] / 2}
                | {"kernel_trace": fraction * learning_rate * full[rate][1] / 2}
            )
    return rows


Regression = tuple[Tensor, Tensor, Tensor]  # J (N, P), Q (N, P, P), targets (N,)


def _quadratic_regression(
    generator: torch.Generator, examples: int, parameters: int, decay: float, curvature: float
) -> Regression:
    scales = _scales(parameters, decay)
    jacobian = _normal(generator, examples, parameters) * scales
    half = _normal(generator, examples, parameters, parameters) * (scales[:, None] * scales).sqrt()
    return jacobian, curvature * (half + half.mT) / math.sqrt(2), _normal(generator, examples)


def _descend(
    problem: Regression, learning_rates: Tensor, batch_sizes: Tensor, steps: int, generator: torch.Generator
) -> tuple[float, Tensor, Tensor]:
    """Initial loss, final losses (M,) and final Jacobians (M, N, P) of M runs on the same mini-batches."""
    jacobian, curvature, targets = problem
    examples, parameters = jacobian.shape
    w, initial = torch.zeros(len(learning_rates), parameters, dtype=torch.float64), float(targets.square().mean())
    for step in range(steps + 1):
        moved = (w @ curvature.flatten(0, 1).mT).view(len(w), examples, parameters)
        residuals = w @ jacobian.mT + (moved @ w[:, :, None])[:, :, 0] / 2 - targets
        losses = residuals.square().mean(1)
        w[~(losses < 1e6 * initial)] = math.nan  # on the way to overflow
        if step == steps:
            return initial, losses, jacobian + moved
        # The first B of one random order are a random subset for each B.
        place = torch.rand(examples, generator=generator).argsort().argsort()
        shares = (place < batch_sizes[:, None]).double() / batch_sizes[:, None]
        gradients = 2 * ((shares * residuals)[:, None] @ (jacobian + moved))[:, 0]
        w = w - learning_rates[:, None] * gradients
    raise AssertionError("unreachable")


def _spectrum(jacobian: Tensor) -> tuple[float, float]:
    """Largest eigenvalue and trace of Θ = (2/N) J Jᵀ."""
    theta = 2 / len(jacobian) * jacobian @ jacobian.mT
    if not bool(theta.isfinite().all()):
        return math.nan, math.nan
    return float(torch.linalg.eigvalsh(theta)[-1]), float(theta.trace())


def _batches(
    examples: int, batch_size: int, sampling: Sampling, chains: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """Mini-batches of every chain (chains, B), without end."""
    if sampling not in ("subsets", "epochs"):
        raise ValueError(f"sampling must be 'subsets' or 'epochs', got {sampling!r}")
    while True:
        order = torch.rand(chains, examples, generator=generator).argsort(1)
        whole = order.split(batch_size, dim=1)[: examples // batch_size]
        yield from whole if sampling == "epochs" else whole[:1]


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _scales(count: int, decay: float) -> Tensor:
    return torch.arange(1, count + 1, dtype=torch.float64) ** -decay
