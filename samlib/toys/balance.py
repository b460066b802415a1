"""Two features of different difficulty in models small enough to solve: does SAM even them out, and why?

Two toys under the logistic loss ℓ = mean log(1 + e^{−mᵢ}) with margins mᵢ = ⟨θ, zᵢ⟩, where zᵢ is an example times its
label. In the *linear* model θ is trained itself; in the two-layer *diagonal* net θⱼ = aⱼuⱼ. Each example pulls with the
weight λᵢ = σ(−mᵢ). SAM takes its gradient at a perturbed point, where the weights are λ̃ᵢ and, in the diagonal net, the
derivatives ∂θ/∂(a, u) differ too: these are the two parts of its effect.

Everything is NumPy in float64; there is no 1e-5 in SAM's normaliser here.

Reference: Springer, Nagarajan & Raghunathan (2024), *Sharpness-Aware Minimization Enhances Feature Quality via Balanced
Learning*, arXiv:2405.20439. What is solved here was derived for the chapter on balanced features.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

__all__ = [
    "at_loss",
    "diagonal_flow",
    "diagonal_invariant",
    "diagonal_steps",
    "linear_steps",
    "logistic_weights",
    "phantom_weights",
    "two_groups",
]

Array: TypeAlias = np.ndarray
Part = Literal["plain", "weights", "jacobian", "sam"]


def logistic_weights(margins: ArrayLike) -> Array:
    """λ = σ(−m), the weight with which an example of margin m enters the gradient, and 1 − p of its label.

    >>> logistic_weights([0.0, 800.0]).tolist()
    [0.5, 0.0]
    """
    return np.exp(-np.logaddexp(0, np.asarray(margins, dtype=np.float64)))


def phantom_weights(margins: ArrayLike, gram: ArrayLike, rho: float) -> Array:
    """The examples' weights of a linear model at SAM's perturbed point.

        λ̃ᵢ = σ(−mᵢ + ρcᵢ),  c = Kλ/√(λᵀKλ),  λ = σ(−m)

    since the point moves by ρ against the unit vector along Σ λᵢzᵢ. To first order d log λ̃ᵢ/dρ = (1 − λ̃ᵢ)cᵢ. With
    equal cᵢ, that is where all examples share the gradient's direction, the weights are *more* uniform at the perturbed
    point; for orthogonal zᵢ of equal norm, all λᵢ ≤ ½ and small ρ they are *less* uniform.

    Args:
        margins: m, shape (n,).
        gram: K with Kᵢⱼ = ⟨zᵢ, zⱼ⟩, shape (n, n).
        rho: radius ρ of the perturbation, in units of θ.

    Returns:
        λ̃, shape (n,); λ where the gradient vanishes.

    Source: derived here; the importance weights of Springer et al. (2024), for a linear model.

    >>> phantom_weights([1.0, 3.0], np.eye(2), 0.0).round(3).tolist()
    [0.269, 0.047]
    >>> phantom_weights([1.0, 3.0], np.eye(2), 1.0).round(3).tolist()
    [0.496, 0.056]
    """
    m, k = _floats(margins, gram)
    weights = logistic_weights(m)
    pull = k @ weights
    norm = np.sqrt(max(weights @ pull, 0.0))
    return logistic_weights(m - rho * pull / norm) if norm else weights


def two_groups(examples: int = 10, without_easy: int = 1, easy: float = 1.0, hard: float = 0.5) -> Array:
    """Examples (n, 2) of which all have a hard feature and all but a few an easy one: the linear counterexample.

    Here SAM learns *less* of the hard feature than gradient descent at equal loss, although the weights at each
    method's perturbed point are more uniform than at the point itself.

    >>> two_groups(3)
    array([[1. , 0.5],
           [1. , 0.5],
           [0. , 0.5]])
    """
    return np.array([[easy, hard]] * (examples - without_easy) + [[0.0, hard]] * without_easy)


def linear_steps(examples: ArrayLike, rho: float, learning_rate: float, steps: int) -> Array:
    """Full-batch SAM on the linear model from θ = 0: θ ← θ + η mean λ̃ᵢzᵢ. ρ = 0 is gradient descent.

    Args:
        examples: z, shape (n, d).
        rho: radius ρ ≥ 0.
        learning_rate: step size η.
        steps: number of steps.

    Returns:
        θ before the first step and after each, shape (steps + 1, d).
    """
    (z,) = _floats(examples)
    gram, path = z @ z.T, np.zeros((steps + 1, z.shape[1]))
    for step, theta in enumerate(path[:-1]):
        path[step + 1] = theta + learning_rate * phantom_weights(z @ theta, gram, rho) @ z / len(z)
    return path


def diagonal_flow(example: ArrayLike, start: ArrayLike, rho: float, s: ArrayLike) -> Array:
    """The flow of gradient descent (ρ = 0) or SAM on the diagonal net with one repeated example μ and a = u.

        d log aⱼ/ds = μⱼ(1 − ρμⱼ/D),  D² = 2Σ μⱼ²aⱼ²

    Time runs in s with ds = λ̃ dt (λ dt for gradient descent), so the examples' weights only set the clock: in this net
    SAM's whole effect on the path is its Jacobian's. The step of the larger feature shrinks more. The solution is

        log aⱼ(s) = log aⱼ(0) + μⱼs − μⱼ²ψ(s),  dψ/ds = ρ/D,  ψ(0) = 0,

    in closed form for ρ = 0; else one scalar equation, integrated by the fourth-order Runge–Kutta rule from one given s
    to the next. Where ρ is large against D the net collapses: all aⱼ reach zero at some s and stay there.

    Args:
        example: μ, shape (d,).
        start: a(0) = u(0) > 0, shape (d,).
        rho: radius ρ ≥ 0.
        s: rising values of s from 0 on, shape (n,); distances of 1e-3 leave errors below 1e-10 where nothing collapses.

    Returns:
        θⱼ = aⱼuⱼ = aⱼ² at each s, shape (n, d).

    Raises:
        ValueError: if s does not rise from 0, or a start is not positive.

    >>> diagonal_flow([1.0, 0.5], [0.1, 0.1], 0.0, [0.0, 1.0]).round(4).tolist()
    [[0.01, 0.01], [0.0739, 0.0272]]
    """
    mu, a0, s = _floats(example, start, s)
    if s.ndim != 1 or len(s) == 0 or s[0] != 0 or (np.diff(s) <= 0).any():
        raise ValueError(f"s must rise from 0, got {s}")
    if not (a0 > 0).all():
        raise ValueError(f"start must be positive in every feature, got {a0}")

    def weights(s: float | Array, psi: float | Array) -> Array:
        return a0**2 * np.exp(2 * (np.multiply.outer(s, mu) - np.multiply.outer(psi, mu**2)))

    def slope(s: float, psi: float) -> float:
        return float(rho / np.sqrt(2 * weights(s, psi) @ mu**2))

    psi = np.zeros_like(s)
    with np.errstate(divide="ignore", over="ignore"):  # after a collapse ψ = ∞ and θ = 0
        for i, (before, after) in enumerate(pairwise(s) if rho else ()):
            h, middle, p = after - before, (before + after) / 2, psi[i]
            k1 = slope(before, p)
            k2 = slope(middle, p + h / 2 * k1)
            k3 = slope(middle, p + h / 2 * k2)
            k4 = slope(after, p + h * k3)
            psi[i + 1] = p + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return weights(s, psi)


def diagonal_invariant(example: ArrayLike, weights: ArrayLike, s: ArrayLike) -> Array:
    """μ₂² log a₁ − μ₁² log a₂ + μ₁μ₂(μ₁ − μ₂)s, which :func:`diagonal_flow` keeps for two features at any ρ.

    Args:
        example: μ, shape (2,).
        weights: θ = a², shape (…, 2).
        s: shape (…).
    """
    (first, second), theta, s = _floats(example, weights, s)
    logs = np.log(theta) / 2
    return second**2 * logs[..., 0] - first**2 * logs[..., 1] + first * second * (first - second) * s


def diagonal_steps(
    example: ArrayLike,
    start: ArrayLike,
    rho: float,
    learning_rate: float,
    steps: int,
    part: Part = "sam",
    perturbed: Sequence[Literal["a", "u"]] = ("a", "u"),
) -> Array:
    """Discrete steps of the diagonal net from a = u, of SAM or of one part of it.

    The gradient with respect to a is −λμu, to u it is −λμa. "sam" takes both λ and the layers at the perturbed point,
    "weights" only λ, "jacobian" only the layers, "plain" neither.

    Args:
        example: μ, shape (d,).
        start: a(0) = u(0), shape (d,).
        rho: radius ρ ≥ 0.
        learning_rate: step size η.
        steps: number of steps.
        part: which part of SAM's gradient to follow.
        perturbed: the layers that the perturbation moves, normalised by their own gradient.

    Returns:
        θ = au before the first step and after each, shape (steps + 1, d).

    Raises:
        ValueError: for an unknown part or layer.
    """
    if part not in ("plain", "weights", "jacobian", "sam"):
        raise ValueError(f"part must be 'plain', 'weights', 'jacobian' or 'sam', got {part!r}")
    if not set(perturbed) <= {"a", "u"} or not perturbed:
        raise ValueError(f"perturbed must name layers out of 'a' and 'u', got {perturbed!r}")
    mu, a0 = _floats(example, start)
    layers, moves = np.stack([a0, a0]), np.array([["a" in perturbed], ["u" in perturbed]])
    path = np.empty((steps + 1, len(mu)))
    for step in range(steps + 1):
        path[step] = layers.prod(0)
        ascent = -mu * layers[::-1] * moves  # the gradient of ℓ over λ, in the layers that move
        uphill = layers + rho * ascent / np.linalg.norm(ascent)
        weight = logistic_weights(mu @ (uphill if part in ("weights", "sam") else layers).prod(0))
        layers = layers + learning_rate * weight * mu * (uphill if part in ("jacobian", "sam") else layers)[::-1]
    return path


def at_loss(path: ArrayLike, examples: ArrayLike, loss: float) -> Array:
    """θ where a path first reaches a mean logistic loss, between two of its points linearly in the loss.

    Args:
        path: θ, shape (n, d).
        examples: z, shape (d,) or (examples, d).
        loss: the level.

    Returns:
        θ, shape (d,).

    Raises:
        ValueError: if the loss never falls to that level.

    >>> at_loss([[0.0], [1.0], [2.0]], [1.0], np.log(2))
    array([0.])
    """
    theta, z = _floats(path, examples)
    losses = np.logaddexp(0, -theta @ np.atleast_2d(z).T).mean(-1)
    reached = np.flatnonzero(losses <= loss)
    if not len(reached):
        raise ValueError(
            f"the loss never falls to {loss:g}: the lowest on the path is {losses.min():.3g}; "
            "follow it further, or with a smaller rho"
        )
    last = reached[0]
    if last == 0:
        return theta[0]
    share = (losses[last - 1] - loss) / (losses[last - 1] - losses[last])
    return theta[last - 1] + share * (theta[last] - theta[last - 1])


def _floats(*values: ArrayLike) -> list[Array]:
    return [np.asarray(value, dtype=np.float64) for value in values]
