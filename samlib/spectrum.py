"""What a whole spectrum looks like: stochastic estimates of sums and of its density, with their errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .eigen import top_eigenpairs
from .lowrank import LowRank
from .ritz import inner, orthonormal
from .symmetric import Operator, SymmetricOperator, as_operator

__all__ = [
    "SpectralDensity",
    "SpectralSums",
    "curvature_measures",
    "hutchinson_trace",
    "spectral_density",
    "spectral_sums",
]


@torch.no_grad()
def hutchinson_trace(operator: Any, probes: int = 30, generator: torch.Generator | None = None) -> tuple[float, float]:
    """The trace of a symmetric operator, and the standard error of the estimate.

    Averages v·(H v) over random sign vectors v; each costs one product.

    Args:
        operator: the Hessian, or any symmetric (P, P) operator that :func:`samlib.eigen.as_operator` takes.
        probes: number of random vectors, at least 2.
        generator: source of the signs; seeded with 0 if not given.

    Raises:
        ValueError: with fewer than two probes, which have no standard error.

    Source: Hutchinson (1990), *A stochastic estimator of the trace of the influence matrix*.

    >>> hutchinson_trace(torch.diag(torch.tensor([3.0, -1.0, 2.0])))  # exact for diagonal matrices
    (4.0, 0.0)
    """
    if probes < 2:
        raise ValueError(f"probes must be at least 2, got {probes}")
    operator = as_operator(operator)
    samples = torch.stack(
        [inner(v[None], (operator @ v)[None])[0, 0].real for v in _signs(operator, probes, generator)]
    )
    return float(samples.mean()), float(samples.std() / probes**0.5)


@dataclass(frozen=True)
class SpectralDensity:
    """A quadrature of a spectrum: each probe's nodes θ and weights, which sum to one, shapes (probes, steps)."""

    nodes: Tensor
    weights: Tensor

    def __call__(self, at: Tensor, width: float) -> Tensor:
        """The density at some points (n,), each node smoothed to a Gaussian of standard deviation ``width``."""
        bumps = torch.exp(-(((at[:, None, None] - self.nodes) / width) ** 2) / 2) / (width * (2 * torch.pi) ** 0.5)
        return (bumps * self.weights).sum(-1).mean(-1)

    def moment(self, power: int) -> float:
        """The mean of λ to a power over the spectrum, trace(Hᵖ)/P: exact in expectation for p < 2 · steps."""
        return float((self.nodes**power * self.weights).sum(-1).mean())


@torch.no_grad()
def spectral_density(
    operator: Any, probes: int = 4, steps: int = 60, generator: torch.Generator | None = None
) -> SpectralDensity:
    """How the eigenvalues of a symmetric operator are spread: stochastic Lanczos quadrature.

    Args:
        operator: the Hessian, or any symmetric (P, P) operator that :func:`samlib.eigen.as_operator` takes.
        probes: number of random sign vectors.
        steps: Lanczos steps for each; a probe costs as many products, and keeps as many vectors (P,) in memory.
        generator: source of the signs; seeded with 0 if not given.

    Raises:
        ValueError: if ``probes`` or ``steps`` is less than 1.

    Source: Ubaru, Chen & Saad (2017), *Fast estimation of tr(f(A)) via stochastic Lanczos quadrature*; Ghorbani,
    Krishnan & Xiao (2019), arXiv:1901.10159.
    """
    if probes < 1 or steps < 1:
        raise ValueError(f"probes and steps must be at least 1, got {probes} and {steps}")
    operator = as_operator(operator)
    steps = min(steps, operator.size)
    nodes, weights = torch.zeros(2, probes, steps, dtype=torch.float64)
    for probe, start in enumerate(_signs(operator, probes, generator)):
        basis = start.new_zeros(steps, operator.size)
        basis[0] = start / operator.size**0.5
        tridiagonal = torch.zeros(steps, steps, dtype=torch.float64)
        for step in range(steps):
            image = operator @ basis[step]
            tridiagonal[step, step] = inner(basis[step : step + 1], image[None])[0, 0].real
            # Full orthogonalisation: without it, copies of converged values appear.
            vector, length = orthonormal(basis[: step + 1], image)
            scale = float(tridiagonal.abs().max())
            if vector is None or step + 1 == steps or length <= 100 * torch.finfo(image.dtype).eps * scale:
                break
            basis[step + 1] = vector
            tridiagonal[step, step + 1] = tridiagonal[step + 1, step] = length
        theta, vectors = torch.linalg.eigh(tridiagonal[: step + 1, : step + 1])
        nodes[probe, : len(theta)], weights[probe, : len(theta)] = theta, vectors[0].square()
    return SpectralDensity(nodes, weights)


def _signs(operator: Operator, count: int, generator: torch.Generator | None) -> Iterator[Tensor]:
    """Random vectors (P,) of ±1."""
    generator = generator or torch.Generator().manual_seed(0)
    for _ in range(count):
        signs = 2 * torch.randint(2, (operator.size,), generator=generator) - 1
        yield signs.to(operator.device, operator.dtype)


@dataclass(frozen=True)
class SpectralSums:
    """Functions of a spectrum, summed over it.

    Attributes:
        values: each sum, by name.
        errors: the standard error of each.
        eigenvalues: those taken exactly, largest in magnitude first, shape (k,).
        matvecs: operator–vector products spent.
        converged: whether the exact ones met the tolerance.
        model: the start for the next, nearby operator, as ``v0``.
    """

    values: dict[str, float]
    errors: dict[str, float]
    eigenvalues: Tensor
    matvecs: int
    converged: bool
    model: LowRank


class _Deflated:
    """(I − VVᵀ) H (I − VVᵀ) for orthonormal columns V (P, k)."""

    def __init__(self, operator: SymmetricOperator, vectors: Tensor) -> None:
        self.operator, self.vectors, self.shape = operator, vectors, operator.shape
        self.dtype, self.device, self.matvecs = vectors.dtype, vectors.device, 0

    def _project(self, vector: Tensor) -> Tensor:
        return vector - self.vectors @ (self.vectors.mT @ vector)

    def __matmul__(self, vector: Tensor) -> Tensor:
        self.matvecs += 1
        return self._project(self.operator @ self._project(vector))


@torch.no_grad()
def spectral_sums(
    operator: SymmetricOperator,
    functions: Mapping[str, Callable[[Tensor], Tensor]],
    k: int = 12,
    probes: int = 3,
    steps: int = 8,
    generator: torch.Generator | None = None,
    v0: Tensor | tuple[Tensor, Tensor] | None = None,
    tol: float = 1e-2,
) -> SpectralSums:
    """tr f(H) for several functions f at once: the leading pairs exactly, the rest by stochastic Lanczos quadrature.

    The k eigenvalues largest in magnitude are found, and summed over, first; what is left has a small norm, so that a
    few random sign vectors in the complement of their eigenvectors are enough. With P ≤ k all is exact.

    Args:
        operator: the Hessian, or any symmetric (P, P) tensor or operator.
        functions: what to sum, by name; each maps eigenvalues to values of the same shape, finite also at 0.
        k: number of leading pairs, at least 1.
        probes: number of random vectors, at least 1; each costs ``steps`` products.
        steps: Lanczos steps, at least 2. Polynomials of degree < 2 · steps are exact for each probe.
        generator: source of the random directions; seeded with 0 if not given.
        v0: start for the leading pairs, such as an earlier result's ``model``.
        tol: residual of the leading pairs relative to the norm.

    Returns:
        :class:`SpectralSums`. The standard error of a sum is √(2 tr f(H_c)²/probes) for H_c the operator in the
        complement, from the same quadrature: the error of Gaussian vectors, and an upper bound for that of signs. A
        sample deviation of three would say less. It is joined by the change from the last Lanczos step.

    Raises:
        ValueError: if ``k`` or ``probes`` is less than 1, or ``steps`` less than 2.

    Source: Ubaru, Chen & Saad (2017), *Fast estimation of tr(f(A)) via stochastic Lanczos quadrature*; deflation as in
    Meyer, Musco, Musco & Woodruff (2021), *Hutch++*, arXiv:2010.09649.

    >>> sums = spectral_sums(torch.diag(torch.tensor([3.0, -1.0, 2.0])), {"trace": lambda x: x})
    >>> round(sums.values["trace"], 3), sums.errors["trace"]
    (4.0, 0.0)
    """
    if k < 1 or probes < 1 or steps < 2:
        raise ValueError(f"k and probes must be at least 1 and steps at least 2, got {k}, {probes} and {steps}")
    size, generator = operator.shape[0], generator or torch.Generator().manual_seed(0)
    # A warm start needs no check: a pair that is missed is among those the probes stand for. From cold, copies show.
    explore = 1 if v0 is None else 0
    leading = top_eigenpairs(operator, min(k, size), "LM", v0, tol, generator=generator, explore=explore)
    top, matvecs = leading.values.double().cpu(), leading.matvecs
    nodes, weights = torch.zeros(2, 1, 2, dtype=torch.float64)
    if len(top) < size:
        rest = _Deflated(operator, leading.vectors)
        density = spectral_density(rest, probes, steps, generator)
        nodes, weights, matvecs = density.nodes, density.weights, matvecs + rest.matvecs
    shorter = _without_last_step(nodes, weights)
    values, errors = {}, {}
    for name, f in functions.items():
        at_zero = f(torch.zeros(1, dtype=torch.float64))  # what the k deflated directions give to the quadrature
        tail = ((f(nodes) - at_zero) * weights).sum(1).mean() * size
        spread = ((f(nodes) - at_zero).square() * weights).sum(1).mean() * size
        before = ((f(shorter[0]) - at_zero) * shorter[1]).sum(1).mean() * size
        values[name] = float(f(top).sum() + (size - len(top)) * at_zero + tail)
        errors[name] = float((2 * spread / probes + (tail - before).square()).sqrt())
    return SpectralSums(values, errors, top, matvecs, leading.converged, leading.model)


def curvature_measures(operator: SymmetricOperator, beta: float = 1.0, **settings: Any) -> SpectralSums:
    """``trace`` tr H, ``frobenius_norm`` ‖H‖_F and ``log_determinant`` log det(I + βH), with standard errors.

    Negative eigenvalues count as 0 in the determinant.

    Args:
        operator: the Hessian, or any symmetric (P, P) tensor or operator.
        beta: β > 0.
        settings: as for :func:`spectral_sums`.

    Raises:
        ValueError: if an argument is out of range.

    >>> {name: round(value, 3) for name, value in curvature_measures(torch.eye(3)).values.items()}
    {'trace': 3.0, 'frobenius_norm': 1.732, 'log_determinant': 2.079}
    """
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta must be positive and finite, got {beta!r}")
    functions = {
        "trace": lambda x: x,
        "frobenius_norm": torch.square,
        "log_determinant": lambda x: torch.log1p(beta * x.clamp_min(0)),
    }
    sums = spectral_sums(operator, functions, **settings)
    norm = sums.values["frobenius_norm"] ** 0.5
    error = sums.errors["frobenius_norm"] / (2 * norm) if norm else 0.0
    return replace(sums, values=sums.values | {"frobenius_norm": norm}, errors=sums.errors | {"frobenius_norm": error})


def _without_last_step(nodes: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The quadrature of one Lanczos step fewer, from that of all m: Rayleigh–Ritz in the Krylov space of m − 1.

    Shapes (probes, m) → (probes, m − 1). Powers lose digits, so this is for an estimate of the error only.
    """
    scale = nodes.abs().amax(1, keepdim=True).clamp_min(torch.finfo(nodes.dtype).tiny)
    powers = (nodes / scale)[..., None] ** torch.arange(nodes.shape[1] - 1)
    basis = torch.linalg.qr(weights.sqrt()[..., None] * powers).Q
    theta, vectors = torch.linalg.eigh(basis.mT @ (nodes[..., None] * basis))
    return theta, vectors[:, 0].square()
