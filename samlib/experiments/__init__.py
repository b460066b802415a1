"""The experiments: one module each, with data, model, loss, test metric and scales. Adding one is one more entry."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .base import PROFILES, Experiment, cross_entropy, error_rate, mean_loss, mean_squared_error
from .cifar10 import CIFAR10
from .dominoes import DIGITS_ON_CIFAR
from .mnist import MNIST
from .molecules import MOLECULES
from .own import is_own, own_experiment
from .shakespeare import SHAKESPEARE

if TYPE_CHECKING:
    from ..config import RunConfig

__all__ = [
    "EXPERIMENTS",
    "PROFILES",
    "Experiment",
    "cross_entropy",
    "error_rate",
    "find",
    "mean_loss",
    "mean_squared_error",
    "of_run",
    "title",
]

EXPERIMENTS = {experiment.name: experiment for experiment in (MNIST, CIFAR10, SHAKESPEARE, MOLECULES, DIGITS_ON_CIFAR)}


def find(name: str) -> Experiment:
    """An experiment by its name, or a reader's own by its file or function.

    Raises:
        ValueError: if there is none.
    """
    if name in EXPERIMENTS:
        return EXPERIMENTS[name]
    if isinstance(name, str) and is_own(name):
        return own_experiment(name)
    known = ", ".join(EXPERIMENTS)
    raise ValueError(
        f"experiment must be one of {known}, the path of a Python file or package.module:function, got {name!r}"
    )


def of_run(config: RunConfig) -> Experiment:
    """The experiment of a configuration.

    Raises:
        ValueError: if there is none; or if it is a reader's own, whose file is not what it was when the run was named.
    """
    experiment = find(config.experiment)
    if experiment.source != config.source:
        raise ValueError(
            f"{config.experiment} has changed since this run was planned, and the run's id stands for what it was; "
            "give the command again"
        )
    return experiment


def title(name: str) -> str:
    """What a page calls an experiment."""
    return EXPERIMENTS[name].title if name in EXPERIMENTS else name
