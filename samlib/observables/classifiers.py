"""What a classifier learns from, and what it has learnt: weights of its examples, and probes of its features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..experiments.task import Task
from ..features import ProbeSets, effective_share, example_weights, gini, lorenz_deciles, probe_features
from ..optim import sam_perturb
from ..settings import NonNegative, Settings
from .base import Observable, Point

__all__ = ["EXAMPLE_WEIGHTS", "PROBES"]


class WeightSettings(Settings):
    """Radius of the perturbed point at which the weights are looked at, where the run itself has none."""

    weights_rho: NonNegative = 0.3


def _labels(targets: Tensor) -> Tensor:
    return targets.argmax(1) if targets.dim() == 2 else targets


def _check_classifier(task: Task) -> None:
    targets = task.everything().targets
    labels = isinstance(targets, Tensor) and targets.dim() == 1 and not targets.is_floating_point()
    if not labels and not (isinstance(targets, Tensor) and targets.dim() == 2 and _one_hot(targets)):
        shape = tuple(targets.shape) if isinstance(targets, Tensor) else type(targets).__name__
        raise ValueError(
            f"example_weights needs a label for each example, (N,), or one-hot targets (N, classes), got {shape}"
        )


def _one_hot(targets: Tensor) -> bool:
    return targets.shape[1] > 1 and bool(((targets == 0) | (targets == 1)).all() and (targets.sum(1) == 1).all())


def _weights(point: Point) -> dict[str, float]:
    """How evenly the examples weigh in the gradient, at w and at w + ρ g/‖g‖ of all examples, in evaluation mode.

    Columns, each also with the beginning ``perturbed_``: ``weights_gini``, ``weights_share`` (effective share), and
    ``weights_decile_1`` … ``9`` of the Lorenz curve.
    """
    objective, w = point.task.everything(), point.params
    rho = point.config.rho or point.config.weights_rho
    gradient = point.gradient if point.objective is objective else objective.gradient(w)
    row: dict[str, float] = {}
    for place, at in (("", w), ("perturbed_", sam_perturb(w, gradient, rho))):
        with torch.no_grad():
            logits = torch.cat([objective.forward(at, chunk.inputs) for chunk, _ in objective.weighted_chunks()])
        weights = example_weights(logits, _labels(objective.targets))
        row |= {f"{place}weights_gini": gini(weights), f"{place}weights_share": effective_share(weights)}
        deciles = lorenz_deciles(weights)
        row |= {f"{place}weights_decile_{i + 1}": float(value) for i, value in enumerate(deciles)}
    return row


EXAMPLE_WEIGHTS = Observable("example_weights", _weights, WeightSettings, _check_classifier)


def _probe_sets(task: Task) -> ProbeSets:
    sets = getattr(task.dataset, "probes", None)
    if sets is None or not hasattr(task.model, "features"):
        raise ValueError(
            "probes need labels to probe and features to read: a data set with probes, and a model with a method "
            "features(inputs); an experiment of your own returns them as 'probes', a pair of (inputs, labels by name)"
        )
    return sets


def _check_probes(task: Task) -> None:
    for name, labels in _probe_sets(task).train.labels.items():
        if len(labels.unique()) < 2:
            raise ValueError(f"the label {name} to probe has one class only")


def _probes(point: Point) -> dict[str, float]:
    """``probe_<label>``: error of a ridge probe of the features before the last layer, for each named label."""
    task, objective = point.task, point.task.everything()

    def features(inputs: Any) -> Tensor:
        with torch.no_grad():
            x = task.move(inputs)
            return objective.within(point.params, lambda: task.model.features(x))  # type: ignore[operator]

    found = probe_features(features, _probe_sets(task), seed=point.config.seed)
    return {f"probe_{name}": probe.error for name, probe in found.items()}


PROBES = Observable("probes", _probes, check=_check_probes)
