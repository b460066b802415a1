"""The experiments: one module each, with data, model, loss, test metric and scales. Adding one is one more entry."""

from __future__ import annotations

from .base import PROFILES, Experiment, cross_entropy, error_rate, mean_loss, mean_squared_error
from .cifar10 import CIFAR10
from .dominoes import DIGITS_ON_CIFAR
from .mnist import MNIST
from .molecules import MOLECULES
from .own import is_own, own_experiment
from .shakespeare import SHAKESPEARE

__all__ = [
    "EXPERIMENTS",
    "PROFILES",
    "Experiment",
    "cross_entropy",
    "error_rate",
    "find",
    "mean_loss",
    "mean_squared_error",
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


def title(name: str) -> str:
    """What a page calls an experiment."""
    return EXPERIMENTS[name].title if name in EXPERIMENTS else name
