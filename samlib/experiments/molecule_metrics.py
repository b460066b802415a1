"""How well the properties of molecules are predicted, each property for itself, where it was measured."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from torch import Tensor

__all__ = ["rmse", "roc_auc"]


def roc_auc(scores: Tensor, labels: Tensor) -> float:
    """Area under the ROC curve: the probability that a positive molecule scores above a negative one.

    The mean over the properties that have molecules of both kinds; NaN if none has.

    Args:
        scores: shape (M, tasks); logits will do.
        labels: 0 or 1, shape (M, tasks); NaN where nothing was measured.

    Raises:
        ValueError: if the shapes differ.

    Source: scikit-learn's ``roc_auc_score``.

    >>> import torch
    >>> roc_auc(torch.tensor([[0.1], [0.4], [0.35], [0.8]]), torch.tensor([[0.0], [0.0], [1.0], [1.0]]))
    0.75
    """
    from sklearn.metrics import roc_auc_score

    return _mean(lambda y, s: roc_auc_score(y, s) if len(np.unique(y)) == 2 else math.nan, scores, labels)


def rmse(predictions: Tensor, values: Tensor) -> float:
    """Root of the mean squared error, in the unit of the values; the mean over the properties.

    Args:
        predictions: shape (M, tasks).
        values: shape (M, tasks); NaN where nothing was measured.

    Raises:
        ValueError: if the shapes differ.

    Source: scikit-learn's ``root_mean_squared_error``.

    >>> import torch
    >>> rmse(torch.tensor([[1.0], [2.0]]), torch.tensor([[4.0], [5.0]]))
    3.0
    """
    from sklearn.metrics import root_mean_squared_error

    return _mean(lambda y, p: root_mean_squared_error(y, p) if len(y) else math.nan, predictions, values)


def _mean(metric: Callable[[np.ndarray, np.ndarray], float], outputs: Tensor, targets: Tensor) -> float:
    """Mean of a metric over the columns that have one; NaN where an output is not a number any more."""
    if outputs.shape != targets.shape:
        raise ValueError(f"need outputs and targets of one shape, got {tuple(outputs.shape)}, {tuple(targets.shape)}")
    given, true = (t.detach().cpu().double().numpy() for t in (outputs, targets))
    if not np.isfinite(given).all():
        return math.nan
    known = ~np.isnan(true)
    columns = [metric(true[known[:, j], j], given[known[:, j], j]) for j in range(true.shape[1])]
    defined = [value for value in columns if not math.isnan(value)]
    return float(np.mean(defined)) if defined else math.nan
