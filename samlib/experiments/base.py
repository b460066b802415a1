"""What an experiment is: data, model, loss, test metric and the scales at which it is run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from ..datasets import Dataset
from ..objective import Loss
from ..settings import Settings

if TYPE_CHECKING:
    from ..config import RunConfig
    from .task import Task

__all__ = [
    "PROFILES",
    "Experiment",
    "Metric",
    "cross_entropy",
    "error_rate",
    "joined",
    "mean_loss",
    "mean_squared_error",
]

PROFILES = ("quick", "reduced", "paper")

Metric = Callable[[Iterable[tuple[Any, Any]]], float]


@dataclass(frozen=True)
class Experiment:
    """An entry of the registry: what is trained, without how it steps and what is measured.

    Attributes:
        name: as a run's settings call it.
        title: as a page calls it.
        load: the data set of a configuration.
        model: the network of a configuration, with its initial weights; the random state is seeded before.
        loss: the mean loss of a configuration's outputs and targets.
        metric: of a configuration, the test metric of (outputs, targets), chunk by chunk.
        metric_name: as a page calls it.
        settings: its own settings.
        profiles: what each scale fixes, of its own settings and of a run's.
        chunk: examples at a time on a CPU; a GPU takes all at once.
        measure_on: which Hessian is meant with mini-batches, unless a run says otherwise.
        record: part of a run's id; raise it when the same configuration would be recorded differently.
        higher_is_better: whether a larger test metric is the better one.
        seeded_data: whether the data hang on the run's seed.
        source: SHA-256 of the file of a reader's own experiment; part of a run's id.
        check: raises a ValueError for settings that do not fit together.
        try_out: raises a ValueError, before anything is trained, for what a task cannot evaluate.
    """

    name: str
    title: str
    load: Callable[[RunConfig], Dataset]
    model: Callable[[RunConfig, Dataset], nn.Module]
    loss: Callable[[RunConfig], Loss]
    metric: Callable[[RunConfig], Metric]
    metric_name: str
    settings: type[Settings] = Settings
    profiles: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    chunk: int = 1000
    measure_on: Literal["batch", "all"] = "batch"
    record: int = 1
    higher_is_better: bool = False
    seeded_data: bool = False
    source: str | None = None
    check: Callable[[RunConfig], None] = lambda config: None
    try_out: Callable[[Task], None] = lambda task: None


def mean_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean over examples and classes of (output − target)², without a factor ½."""
    return (outputs - targets).square().mean()


def cross_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean over positions of −log p(token), in nats; logits (B, T, V), tokens (B, T)."""
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def error_rate(chunks: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The fraction of wrong labels; outputs (B, classes), labels (B,)."""
    wrong, count = 0.0, 0
    for outputs, labels in chunks:
        wrong += float((outputs.argmax(1) != labels).sum())
        count += len(labels)
    return wrong / count


def joined(function: Callable[[Any, Any], Any]) -> Metric:
    """A metric of all outputs and targets at once."""

    def metric(chunks: Iterable[tuple[Any, Any]]) -> float:
        outputs, targets = zip(*chunks, strict=True)
        return float(function(_together(outputs), _together(targets)))

    return metric


def _together(parts: tuple[Any, ...]) -> Any:
    return pytree.tree_map(lambda *tensors: torch.cat(tensors), *parts)


def mean_loss(loss: Loss) -> Metric:
    """The mean of a loss over all examples."""

    def metric(chunks: Iterable[tuple[Any, Tensor]]) -> float:
        total, count = 0.0, 0
        for outputs, targets in chunks:
            total += float(loss(outputs, targets)) * len(targets)
            count += len(targets)
        return total / count

    return metric
