"""How a run steps: rules, which say where the gradient is taken, around bases, which say what is done with it.

Each is a ``torch.optim.Optimizer`` that readers can import; which edge of stability it obeys says
:func:`samlib.edge_law`. Adding one is an entry here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR

from .laws import EdgeLaw, edge_law
from .optim import SAM
from .settings import BelowOne, NonNegative, Settings, Truth

if TYPE_CHECKING:
    from .config import RunConfig

__all__ = ["BASES", "PLAIN", "RULES", "Base", "Rule", "law_of", "optimizer", "schedule"]


@dataclass(frozen=True)
class Base:
    """An optimizer that steps with a given gradient.

    Attributes:
        name: as a run's settings call it.
        kind: its class.
        options: keyword arguments of the class, of a configuration.
        settings: its own settings.
        check: raises a ValueError for settings that do not fit together.
    """

    name: str
    kind: type[Optimizer]
    options: Callable[[RunConfig], Mapping[str, Any]]
    settings: type[Settings] = Settings
    check: Callable[[RunConfig], None] = lambda config: None


@dataclass(frozen=True)
class Rule:
    """Where the gradient is taken that the base steps with.

    Attributes:
        name: as a run's settings call it.
        title: as a page calls it.
        build: makes the optimizer of parameters and a configuration, around a base with options.
        settings: its own settings; ρ is every rule's.
        off: whether a configuration means the base alone.
        law: the edge of the optimizer as it is, or none and why.
    """

    name: str
    title: str
    build: Callable[[Iterable[Any], RunConfig, Base], Optimizer]
    settings: type[Settings] = Settings
    off: Callable[[Any], bool] = lambda config: config.rho == 0
    law: Callable[[Optimizer], EdgeLaw] = edge_law


class SGDSettings(Settings):
    """Momentum β, Nesterov's form of it, and L2 decay δ, as PyTorch's SGD takes them."""

    momentum: BelowOne = 0.0
    nesterov: Truth = False
    weight_decay: NonNegative = 0.0


class AdamSettings(Settings):
    """Decay rates of Adam's two averages."""

    beta1: BelowOne = 0.9
    beta2: BelowOne = 0.999


def _nesterov_needs_momentum(config: RunConfig) -> None:
    if config.nesterov and not config.momentum:
        raise ValueError("nesterov needs a momentum above 0, got momentum 0")


PLAIN = Base("plain", torch.optim.SGD, lambda config: {})
"""Gradient descent, whatever the configuration."""

BASES = {
    base.name: base
    for base in (
        Base(
            "sgd",
            torch.optim.SGD,
            lambda c: {"momentum": c.momentum, "nesterov": c.nesterov, "weight_decay": c.weight_decay},
            SGDSettings,
            _nesterov_needs_momentum,
        ),
        Base("adam", torch.optim.Adam, lambda c: {"betas": (c.beta1, c.beta2)}, AdamSettings),
    )
}


def _sam(**options: Any) -> Callable[[Iterable[Any], RunConfig, Base], Optimizer]:
    def build(params: Iterable[Any], config: RunConfig, base: Base) -> Optimizer:
        return SAM(params, base.kind, rho=config.rho, lr=config.learning_rate, **options, **base.options(config))

    return build


RULES = {
    rule.name: rule
    for rule in (
        Rule("sam", "SAM", _sam()),
        Rule("usam", "unnormalised SAM", _sam(normalize=False)),
    )
}


def law_of(config: RunConfig, optimizer: Optimizer) -> EdgeLaw:
    """The edge that a run's optimizer is measured against, in its present state.

    No law is known for SAM around Adam: it is measured against Adam's.
    """
    law = RULES[config.rule].law(optimizer)
    base = getattr(optimizer, "base_optimizer", None)
    return edge_law(base) if law.reason and isinstance(base, torch.optim.Adam) else law


def optimizer(config: RunConfig, params: Iterable[Any]) -> Optimizer:
    """The optimizer of a run for some parameters."""
    return RULES[config.rule].build(params, config, BASES[config.base])


def schedule(config: RunConfig, optimizer: Optimizer) -> LRScheduler | None:
    """The schedule of a run's learning rate, whose highest value is the run's; None where it is constant."""
    points = config.steps + 1  # the last one is measured with a rate, too
    if config.schedule == "one_cycle":
        return OneCycleLR(optimizer, config.learning_rate, total_steps=points, cycle_momentum=False)
    return CosineAnnealingLR(optimizer, points) if config.schedule == "cosine" else None
