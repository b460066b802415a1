"""What a classifier learns from, and what it has learnt: the examples' weights, and probes of its features."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

__all__ = [
    "Labelled",
    "Probe",
    "ProbeSets",
    "effective_share",
    "example_weights",
    "gini",
    "lorenz_curve",
    "lorenz_deciles",
    "probe_features",
    "ridge_probe",
]

STRENGTHS = (1.0, 1e-1, 1e-2, 1e-3)


def example_weights(logits: Tensor, labels: Tensor) -> Tensor:
    """1 − p_y, the weight with which each example enters the gradient of the cross-entropy.

    Computed as σ(log Σ_{k≠y} e^{f_k} − f_y), which cancels nowhere: 1 − p_y, and log p_y for a p_y near 1 as well,
    lose a weight below the rounding error of 1.

    Args:
        logits: f, shape (…, classes).
        labels: y, whole numbers, shape (…).

    Returns:
        The weights in float64, shape (…).

    Raises:
        ValueError: if the shapes do not belong together.

    Source: Springer, Nagarajan & Raghunathan (2024), arXiv:2405.20439, importance weights.

    >>> example_weights(torch.tensor([[0.0, 0.0], [50.0, 0.0]]), torch.tensor([0, 0]))
    tensor([5.0000e-01, 1.9287e-22], dtype=torch.float64)
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(f"need one label per row of logits, got {tuple(labels.shape)} for {tuple(logits.shape)}")
    f, y = logits.detach().double(), labels[..., None]
    others = f.scatter(-1, y, -torch.inf).logsumexp(-1)
    return torch.sigmoid(others - f.gather(-1, y).squeeze(-1))


def gini(weights: ArrayLike | Tensor) -> float:
    """Gini coefficient Σᵢⱼ|λᵢ − λⱼ|/(2n²λ̄), from 0 (all equal) to 1 − 1/n (all weight on one).

    Without the factor n/(n − 1) of small samples, so that repeating all examples changes nothing.

    >>> gini([1.0, 1.0, 2.0, 4.0])
    0.3125
    """
    values = np.sort(_weights(weights))
    n = len(values)
    return float((2 * np.arange(1, n + 1) - n - 1) @ values / n)


def effective_share(weights: ArrayLike | Tensor) -> float:
    """(Σλ)²/(nΣλ²), the share of the examples that would weigh as much if they weighed equally: from 1/n to 1.

    >>> effective_share([1.0, 1.0, 0.0, 0.0])
    0.5
    """
    values = _weights(weights)
    return float(1 / (len(values) * (values @ values)))


def lorenz_curve(weights: ArrayLike | Tensor) -> np.ndarray:
    """Share of all weight that the lightest k examples hold, k = 0 … n: shape (n + 1,), from 0 to 1, convex.

    Of two curves, the weights of the upper one are more uniform; curves may cross.

    >>> lorenz_curve([4.0, 1.0, 2.0, 1.0])
    array([0.   , 0.125, 0.25 , 0.5  , 1.   ])
    """
    return np.concatenate([[0.0], np.sort(_weights(weights)).cumsum()])


def lorenz_deciles(weights: ArrayLike | Tensor) -> np.ndarray:
    """The Lorenz curve at 10 %, 20 % … 90 % of the examples, linear between two of them: shape (9,).

    >>> lorenz_deciles([1.0, 1.0]).round(2).tolist()
    [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    """
    curve = lorenz_curve(weights)
    return np.interp(np.arange(1, 10) / 10, np.linspace(0, 1, len(curve)), curve)


def _weights(weights: ArrayLike | Tensor) -> np.ndarray:
    """Weights as shares of their sum, in float64; NaN if one is NaN, or if all are zero."""
    values = weights.detach().cpu().numpy() if isinstance(weights, Tensor) else np.asarray(weights)
    values = values.astype(np.float64).ravel()
    if len(values) == 0 or (values < 0).any():
        raise ValueError(f"weights must be at least one non-negative number, got {values}")
    with np.errstate(invalid="ignore"):
        values = values / values.max()  # so that no sum leaves the range of floating-point numbers
        return values / values.sum()


@dataclass(frozen=True)
class Labelled:
    """Examples, and what each of them shows.

    Attributes:
        inputs: shape (N, …).
        labels: by name, whole numbers of shape (N,): "object" and "digit", say.

    Raises:
        ValueError: without labels, or if they are not as many as the examples.
    """

    inputs: Tensor
    labels: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        if not self.labels:
            raise ValueError("there are no labels to probe; name at least one, as in {'object': labels}")
        for name, labels in self.labels.items():
            if labels.shape != (len(self.inputs),):
                raise ValueError(
                    f"label {name!r} must have shape ({len(self.inputs)},), one per example, got {tuple(labels.shape)}"
                )


@dataclass(frozen=True)
class ProbeSets:
    """What probes are trained on, and what their error is measured on: independent examples with the same labels."""

    train: Labelled
    test: Labelled

    def __post_init__(self) -> None:
        if set(self.train.labels) != set(self.test.labels):
            raise ValueError(
                "the probes' training and test examples must have the same labels, got "
                f"{', '.join(self.train.labels)} and {', '.join(self.test.labels)}"
            )


@dataclass(frozen=True)
class Probe:
    """What a probe found.

    Attributes:
        error: share of the test examples that it gets wrong.
        strength: the λ that was chosen.
        held_out_error: the error on the held-out quarter by which it was chosen.
    """

    error: float
    strength: float
    held_out_error: float


def probe_features(
    features: Callable[[Tensor], Tensor], sets: ProbeSets, *, seed: int = 0, chunk_size: int = 1000
) -> dict[str, Probe]:
    """What a model's features know of each label, by :func:`ridge_probe`.

    Args:
        features: maps inputs (n, …) to features (n, d), in evaluation mode; called without gradients.
        sets: the examples.
        seed: of the held-out quarter.
        chunk_size: examples per call of ``features``.

    Returns:
        A probe for each name of a label.

    Raises:
        ValueError: as for :func:`ridge_probe`, naming the label.
    """
    with torch.no_grad():
        train, test = (
            torch.cat([features(x).flatten(1) for x in part.inputs.split(chunk_size)])
            for part in (sets.train, sets.test)
        )
    found = {}
    for name, labels in sets.train.labels.items():
        try:
            found[name] = ridge_probe(train, labels, test, sets.test.labels[name], seed=seed)
        except ValueError as error:
            raise ValueError(f"label {name!r} cannot be probed: {error}") from None
    return found


def ridge_probe(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    strengths: Sequence[float] = STRENGTHS,
    seed: int = 0,
) -> Probe:
    """Error of the best linear reading of a label from features: ridge regression on ±1 targets, one per class.

        min over W, b of  mean ‖W x + b − y‖² + λ‖W‖²,  x standardised over the examples of the fit

    λ is the one with the smallest error on a held-out quarter of the training examples (the largest of several); the
    probe is then fitted to all of them. Two classes share one target.

    Args:
        train_features, test_features: shapes (n, d) and (m, d).
        train_labels, test_labels: whole numbers, shapes (n,) and (m,).
        strengths: the values of λ to choose from, on the scale of the *mean* squared error.
        seed: of the held-out quarter.

    Returns:
        A :class:`Probe`.

    Raises:
        ValueError: for fewer than two classes or four examples, features that are not finite or λ that is not positive.

    Source: scikit-learn's ``RidgeClassifier`` with alpha = nλ, and ``StandardScaler``.
    """
    from sklearn.linear_model import RidgeClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, y, x_test, y_test = (
        t.detach().cpu().numpy() for t in (train_features.double(), train_labels, test_features.double(), test_labels)
    )
    if not strengths or min(strengths) <= 0:
        raise ValueError(f"strengths must be positive, got {tuple(strengths)}")
    if len(np.unique(y)) < 2:
        raise ValueError(f"a probe needs at least two classes among its training examples, got {np.unique(y).tolist()}")
    if not np.isfinite(x).all() or not np.isfinite(x_test).all():
        raise ValueError("features must be finite; has the run diverged?")

    def error(fit: np.ndarray, strength: float, x_new: np.ndarray, y_new: np.ndarray) -> float:
        probe = make_pipeline(StandardScaler(), RidgeClassifier(alpha=strength * len(fit)))
        return float((probe.fit(x[fit], y[fit]).predict(x_new) != y_new).mean())

    order = np.random.default_rng(seed).permutation(len(x))
    held_out, rest = np.split(order, [len(x) // 4])
    if len(held_out) == 0 or len(np.unique(y[rest])) < 2:
        raise ValueError(f"{len(x)} examples are too few to hold out a quarter of them")
    held_out_errors = {
        strength: error(rest, strength, x[held_out], y[held_out]) for strength in sorted(strengths, reverse=True)
    }
    best = min(held_out_errors, key=held_out_errors.__getitem__)
    return Probe(error(order, best, x_test, y_test), best, held_out_errors[best])
