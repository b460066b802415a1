"""How a run steps: rules, which say where the gradient is taken, around bases, which say what is done with it.

Each is a ``torch.optim.Optimizer`` that readers can import; which edge of stability it obeys says
:func:`samlib.edge_law`. Adding one is an entry here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import torch
from pydantic import BeforeValidator, Field
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR

from .cached_law import cached_law
from .cumulants import determinant, integral
from .gradient_parts import PartialSAM, named_slices
from .laws import EdgeLaw, edge_law
from .optim import SAM
from .settings import BelowOne, Count, Names, NonNegative, Positive, Settings, Share, Truth, number
from .universal import UniversalSAM

if TYPE_CHECKING:
    from .config import RunConfig
    from .experiments.task import Task

__all__ = ["BASES", "PLAIN", "RULES", "Base", "Making", "Rule", "law_of", "optimizer", "schedule"]


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


class Making(NamedTuple):
    """What a rule's optimizer is made of: parameters, a run's configuration, a base, and the steps of an epoch."""

    params: list[nn.Parameter]
    config: RunConfig
    base: Base
    epoch: int = 1

    def around(self, kind: Callable[..., Optimizer], **options: Any) -> Optimizer:
        """An optimizer of this class around the base."""
        return kind(
            self.params,
            self.base.kind,
            rho=self.config.rho,
            lr=self.config.learning_rate,
            **options,
            **self.base.options(self.config),
        )


@dataclass(frozen=True)
class Rule:
    """Where the gradient is taken that the base steps with.

    Attributes:
        name: as a run's settings call it.
        title: as a page calls it.
        build: makes the optimizer.
        settings: its own settings; ρ is every rule's.
        off: whether a configuration means the base alone.
        law: the edge of the optimizer as it is, or none and why.
        check: raises a ValueError, before anything is trained, if it cannot be had for a task.
    """

    name: str
    title: str
    build: Callable[[Making], Optimizer]
    settings: type[Settings] = Settings
    off: Callable[[Any], bool] = lambda config: config.rho == 0
    law: Callable[[Optimizer], EdgeLaw] = edge_law
    check: Callable[[Task], None] = lambda task: None


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


def _period(value: Any) -> Any:
    steps = number(value)
    whole = isinstance(steps, int | float) and not isinstance(steps, bool) and steps >= 1 and steps == int(steps)
    if not whole and value != "epoch":
        raise ValueError(f"every must be a whole number of steps, at least 1, or epoch, got {value!r}")
    return int(steps) if whole else value


class CacheSettings(Settings):
    """Steps between true gradients (or "epoch"), and how slowly the cached direction is averaged in between."""

    every: Annotated[int | Literal["epoch"], BeforeValidator(_period)]
    cache_beta: Share = 1.0


class UniversalSettings(Settings):
    """Strength of the sharpness, random directions per step, and whether each is taken in both signs."""

    strength: NonNegative
    samples: Count = 2
    paired: Truth = True


class SpreadSettings(UniversalSettings):
    """As above; one loss change has no spread."""

    samples: Annotated[int, BeforeValidator(number), Field(ge=2)] = 2


class DeterminantSettings(SpreadSettings):
    """As above, and β of log det(I + βH)."""

    determinant_beta: Positive = 0.3


class CubeSettings(Settings):
    """Strength, and half-width of the cube of directions, of the published determinant rule."""

    strength: NonNegative = 1.0
    cube: Positive = 0.01


class LayerSettings(Settings):
    """Beginnings of the names of the parameters that are perturbed; all by default."""

    layers: Names = ()


def _graph_sam(making: Making) -> Optimizer:
    config = making.config
    return making.around(SAM, every=making.epoch if config.every == "epoch" else config.every, beta=config.cache_beta)


def _universal(sharpness: Callable[[RunConfig], Any]) -> Callable[[Making], Optimizer]:
    def build(making: Making) -> Optimizer:
        config = making.config
        own = {name: getattr(config, name) for name in ("strength", "samples", "paired")}
        return making.around(UniversalSAM, sharpness=sharpness(config), seed=config.seed, **own)

    return build


def _published_determinant(making: Making) -> Optimizer:
    config = making.config
    # As in the public code: one direction, S = φ(E ψ(D)) with φ = m⁻², ψ = e^{−D/2}.
    published = integral(lambda m: m**-2.0, lambda d: (-d / 2).exp())
    own = {"samples": 1, "paired": False, "directions": ("cube", config.cube)}
    return making.around(UniversalSAM, sharpness=published, strength=config.strength, seed=config.seed, **own)


def _part(part: str) -> Callable[[Making], Optimizer]:
    return lambda making: making.around(PartialSAM, part=part, layers=making.config.layers)


def _own_objective(optimizer: Any) -> EdgeLaw:
    """Paired variants and the trace step as their base does on an objective of their own, in the mean."""
    return edge_law(optimizer.base_optimizer)


def _frobenius_law(optimizer: Any) -> EdgeLaw:
    """In the mean, plain Frobenius-SAM adds the gradient of ½‖g‖²: the edge of unnormalised SAM with ρ = strength."""
    law = edge_law(optimizer.base_optimizer)
    if optimizer.paired or law.reason or law.scale is not None:
        return law
    return replace(law, name="plain Frobenius-SAM", rho=optimizer.param_groups[0]["strength"], normalize=False)


def _determinant_law(optimizer: Any) -> EdgeLaw:
    if optimizer.paired:
        return _own_objective(optimizer)
    return EdgeLaw("plain determinant-SAM", reason="few directions are far from the mean that a law could be for")


def _strength_off(config: Any) -> bool:
    return config.rho == 0 or config.strength == 0


def _check_layers(task: Task) -> None:
    named_slices(task.everything().slices, task.config.layers)


def _no_law(optimizer: Optimizer) -> EdgeLaw:
    return EdgeLaw(type(optimizer).__name__, reason="no law is known for a part of SAM's gradient")


_OF_PARTS: dict[str, Any] = {"settings": LayerSettings, "law": _no_law, "check": _check_layers}

RULES = {
    rule.name: rule
    for rule in (
        Rule("sam", "SAM", lambda making: making.around(SAM)),
        Rule("usam", "unnormalised SAM", lambda making: making.around(SAM, normalize=False)),
        Rule("graphsam", "GraphSAM", _graph_sam, CacheSettings, law=cached_law),
        Rule(
            "frobenius_sam",
            "Frobenius-SAM",
            _universal(lambda config: "frobenius"),
            SpreadSettings,
            _strength_off,
            _frobenius_law,
        ),
        Rule("trace_sam", "trace-SAM", _universal(lambda c: "trace"), UniversalSettings, _strength_off, _own_objective),
        Rule(
            "determinant_sam",
            "determinant-SAM",
            _universal(lambda config: determinant(config.determinant_beta)),
            DeterminantSettings,
            _strength_off,
            _determinant_law,
        ),
        Rule(
            "published_determinant_sam",
            "published determinant-SAM",
            _published_determinant,
            CubeSettings,
            _strength_off,
            _own_objective,
        ),
        Rule("layer_sam", "SAM of some layers", _part("sam"), **_OF_PARTS),
        Rule("weights_sam", "SAM's weights", _part("weights"), **_OF_PARTS),
        Rule("jacobian_sam", "SAM's Jacobian", _part("jacobian"), **_OF_PARTS),
    )
}


def law_of(config: RunConfig, optimizer: Optimizer) -> EdgeLaw:
    """The edge that a run's optimizer is measured against, in its present state.

    No law is known for SAM around Adam: it is measured against Adam's.
    """
    law = RULES[config.rule].law(optimizer)
    base = getattr(optimizer, "base_optimizer", None)
    return edge_law(base) if law.reason and isinstance(base, torch.optim.Adam) else law


def optimizer(config: RunConfig, params: nn.Parameter, epoch: int = 1) -> Optimizer:
    """The optimizer of a run for its flat vector of parameters; an epoch has this many steps."""
    return RULES[config.rule].build(Making([params], config, BASES[config.base], epoch))


def schedule(config: RunConfig, optimizer: Optimizer) -> LRScheduler | None:
    """The schedule of a run's learning rate, whose highest value is the run's; None where it is constant."""
    points = config.steps + 1  # the last one is measured with a rate, too
    if config.schedule == "one_cycle":
        return OneCycleLR(optimizer, config.learning_rate, total_steps=points, cycle_momentum=False)
    return CosineAnnealingLR(optimizer, points) if config.schedule == "cosine" else None
