"""Everything that determines a run, as flat settings: what is trained, how it steps, what is measured."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from .datasets import DataPolicy, Dataset
from .experiments import EXPERIMENTS, Experiment, find, of_run
from .observables import OBSERVABLES, PATHS
from .rules import BASES, RULES
from .settings import (
    Count,
    Levels,
    Names,
    NonNegative,
    Positive,
    Settings,
    Truth,
    Whole,
    details,
    explain,
    names,
    number,
    validated,
)

__all__ = ["RunConfig", "default_of", "explain", "grid", "known_settings", "of_notebook"]

# What the records of the first three experiments hold of every run, null where an experiment does not take it.
_ALWAYS = (
    *("experiment", "profile", "learning_rate", "rho", "seed", "steps", "measure_every", "examples", "width", "depth"),
    *("heads", "sequence_length", "batch_size", "eigenvalues", "tolerance", "dtype", "device"),
)
_NO_IDENTITY = ("data", "compiled", "source")


class RunConfig(BaseModel):
    """Everything that determines a run. Frozen; settings left out come from the experiment's profile.

    Beside those below, a run takes the settings of its experiment, of its rule and base, and of its observables, as
    attributes like the others.

    Attributes:
        experiment: an entry of :data:`samlib.experiments.EXPERIMENTS`, or a reader's own: the path of a Python file,
            or "package.module:function".
        profile: "quick", "reduced" or "paper": the scale, and the defaults of the settings below.
        learning_rate: η > 0.
        rho: ρ ≥ 0; zero is the base alone.
        rule: how the gradient is taken, an entry of :data:`samlib.rules.RULES`.
        base: what steps with it, an entry of :data:`samlib.rules.BASES`.
        seed: of the initial weights and the mini-batches.
        steps: number of updates.
        measure_every: steps between measurements; the first and the last point are always measured.
        measure_at_losses: also where the full training loss first passes these values, falling.
        loss_every: steps between looks at the full training loss, where something hangs on it.
        stop_at_loss: end the run there.
        observables: what a measurement reads, entries of :data:`samlib.observables.OBSERVABLES`.
        path: what is read at every step, entries of :data:`samlib.observables.PATHS`.
        test_every: steps between test metrics along the way, in the path.
        measure_on: with mini-batches, which Hessian is meant: that of the step's "batch", or of "all" examples.
        schedule: of the learning rate: "constant", "one_cycle" or "cosine", as PyTorch's.
        warmup_steps: first steps of the base alone.
        examples: training examples or sequences, from the first on; None for all.
        batch_size: of mini-batches; None for the full batch.
        eigenvalues: number of leading eigenvalues recorded.
        tolerance: relative residual of the eigenpairs.
        dtype: "float32" or "float64".
        device: "cpu", "cuda" or "auto" (resolved on creation).
        data: "auto", "real" or "standin", see :func:`samlib.load_dataset`. Not part of a run's identity: the
            fingerprint of the data that was used is.
        compiled: compute the gradients of the steps by a compiled program, see
            :func:`samlib.objective.compiled_kernel`. Not part of a run's identity either: it changes rounding only.
        source: SHA-256 of a reader's own experiment; filled in.

    Raises:
        pydantic.ValidationError: naming each bad field, what was given and what is allowed.

    >>> RunConfig(experiment="mnist", learning_rate=0.3, rho=0.1).steps
    600
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    experiment: str
    profile: Literal["quick", "reduced", "paper"] = "quick"
    learning_rate: Positive
    rho: NonNegative
    rule: str = "sam"
    base: str = "sgd"
    seed: int = Field(0, ge=0, lt=2**31)
    steps: Count
    measure_every: Count
    measure_at_losses: Levels = ()
    loss_every: Count = 10
    stop_at_loss: Positive | None = None
    observables: Names = ("edge",)
    path: Names = ()
    test_every: Count | None = None
    measure_on: Literal["batch", "all"]
    schedule: Literal["constant", "one_cycle", "cosine"] = "constant"
    warmup_steps: Whole = 0
    examples: Count | None = None
    batch_size: Count | None = None
    eigenvalues: int = Field(1, ge=1, le=20)
    tolerance: Positive = Field(3e-3, lt=1)
    dtype: Literal["float32", "float64"] = "float32"
    device: Literal["cpu", "cuda"] = "cpu"
    data: DataPolicy = "auto"
    compiled: Truth = False
    source: str | None = None

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    @model_validator(mode="wrap")
    @classmethod
    def _whole(cls, given: Any, handler: Any, info: ValidationInfo) -> Self:
        if not isinstance(given, Mapping) or (info.context or {}).get("stored"):
            return handler(given)
        try:
            experiment: Experiment | None = find(given.get("experiment", ""))
        except ValueError as error:
            experiment, unknown = None, error
        scale = experiment or EXPERIMENTS["mnist"]  # else keep the report to what is wrong
        values, problems = _filled_in(cls, given, scale)
        if experiment is None:
            problems.insert(0, _problem(str(unknown)))
        else:
            values["source"] = experiment.source
        try:
            config = handler(values)
            if not problems:
                _check(config, scale)
        except ValidationError as error:
            problems += details(error)
        except ValueError as error:
            problems.append(_problem(str(error)))
        if problems:
            raise ValidationError.from_exception_data(cls.__name__, problems)
        return config

    def identity(self, fingerprint: str, record: int | None = None) -> str:
        """The run's id: 16 hexadecimal digits of SHA-256 over the configuration, the data's fingerprint and the
        version of the record, by default the present one. The same configuration and data have the same id on every
        machine; a setting at its default leaves the id as it is."""
        given = self.model_dump(exclude=set(_NO_IDENTITY))
        chosen = {name: v for name, v in given.items() if name in _ALWAYS or v != default_of(self, name)}
        settings = dict.fromkeys(_ALWAYS) | chosen
        if self.source:  # wherever the file lies
            settings |= {"experiment": self.experiment.replace("\\", "/").rpartition("/")[2], "source": self.source}
            settings["record"] = 1
        else:
            settings["record"] = record or find(self.experiment).record
        settings["fingerprint"] = fingerprint
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]

    def load_dataset(self) -> Dataset:
        """The data set this configuration asks for."""
        return of_run(self).load(self)

    @property
    def sharpness_aware(self) -> bool:
        """Whether the rule takes its gradient elsewhere than at w."""
        return not RULES[self.rule].off(self)


def default_of(config: RunConfig, name: str) -> Any:
    """What a setting of a run is where nobody says otherwise, profiles aside."""
    experiment = None if config.source else find(config.experiment)
    if name == "measure_on":
        return experiment.measure_on if experiment else "batch"
    if name in RunConfig.model_fields:
        return RunConfig.model_fields[name].default
    kinds = _kinds(experiment, config.rule, config.base, config.observables)
    fields = [kind.model_fields[name] for kind in kinds if name in kind.model_fields]
    return fields[0].default if fields else None


def _kinds(experiment: Experiment | None, rule: str, base: str, observables: Iterable[str]) -> list[type[Settings]]:
    """The classes of settings that a run takes beside its common ones."""
    chosen = [experiment, RULES.get(rule), BASES.get(base), *(OBSERVABLES.get(o) for o in observables)]
    return list(dict.fromkeys(entry.settings for entry in chosen if entry is not None))


def _filled_in(
    cls: type[RunConfig], given: Mapping[str, Any], experiment: Experiment
) -> tuple[dict[str, Any], list[InitErrorDetails]]:
    """All settings of a run: those given, those of the profile, and the own ones of its parts, checked by these."""
    known = known_settings(experiment)
    values = {name: v for name, v in given.items() if v is not None or name not in known or name == "examples"}
    scale = values.get("profile", "quick")
    profile = experiment.profiles.get(scale if isinstance(scale, str) else "quick", experiment.profiles["quick"])
    values = {**profile, "measure_on": experiment.measure_on, **values}
    if values.get("device", "auto") == "auto":
        values["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    rule, base = values.get("rule", "sam"), values.get("base", "sgd")
    problems = _clashes(cls, experiment) if experiment.source else []
    problems += [
        _problem(f"{what} must be one of {', '.join(registry)}, got {name!r}")
        for what, name, registry in (("rule", rule, RULES), ("base", base, BASES))
        if not isinstance(name, str) or name not in registry
    ]
    for what, registry, default in (("observables", OBSERVABLES, ["edge"]), ("path", PATHS, [])):
        try:
            chosen = names(values.get(what, ()))
        except ValueError:
            chosen = None
        if not isinstance(chosen, list) or not all(isinstance(name, str) and name in registry for name in chosen):
            problems.append(_problem(f"{what} must be some of {', '.join(registry)}, got {values[what]!r}"))
            chosen = []
        values[what] = tuple(name for name in registry if name in (chosen or default))  # each once, in one order

    if problems:  # keep the report to what is wrong
        rule, base = (name if isinstance(name, str) else "" for name in (rule, base))
    kinds = _kinds(experiment, rule, base, values["observables"])
    taken = [*cls.model_fields, *(name for kind in kinds for name in kind.model_fields)]
    # A profile is for its own rule and base: what others do not take of it is not asked of them.
    asked = {name for name, value in given.items() if value is not None or name not in known}
    values = {name: value for name, value in values.items() if name in taken or name in asked}
    own, wrong = validated(kinds, values)
    problems += wrong
    parts = {"experiment": experiment.name, "rule": rule, "base": base}
    for name in [n for n in values if n not in taken]:
        del values[name]
        problems.append(_not_taken(name, parts, [n for n in taken if n != "source"]))
    values |= own
    values["rho"] = number(values.get("rho"))
    if not problems and isinstance(values["rho"], int | float) and RULES[rule].off(SimpleNamespace(**values)):
        # The base alone, whatever the rule: one run, one identity.
        values = {n: v for n, v in values.items() if n not in RULES[rule].settings.model_fields}
        values |= {"rule": "sam", "rho": 0.0}
    if values["rho"] is None:
        del values["rho"]
    return values, problems


def _clashes(cls: type[RunConfig], experiment: Experiment) -> list[InitErrorDetails]:
    """Arguments of a reader's own experiment that mean something else in every run. ``seed`` is the run's."""
    entries: list[Any] = [*RULES.values(), *BASES.values(), *OBSERVABLES.values()]
    taken = {*cls.model_fields, *(name for entry in entries for name in entry.settings.model_fields), *dir(BaseModel)}
    taken |= {name for name in vars(cls) if not name.startswith("__")}
    clashing = [name for name in experiment.settings.model_fields if name in taken - {"seed"}]
    if not clashing:
        return []
    word = "are names" if len(clashing) > 1 else "is a name"
    return [
        _problem(
            f"experiment {experiment.name}: {', '.join(clashing)} {word} that a run has already; rename the argument"
        )
    ]


def known_settings(experiment: Experiment | None = None) -> set[str]:
    """The names of all settings that any run takes, one of this experiment too."""
    entries = [experiment, *EXPERIMENTS.values(), *RULES.values(), *BASES.values(), *OBSERVABLES.values()]
    own = {name for entry in entries if entry for name in entry.settings.model_fields}
    return own | set(RunConfig.model_fields) - {"source"}


def of_notebook(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the run that a notebook trains, from its parameters: those named so, and all in ``settings``."""
    own = set(parameters.get("settings") or {})
    try:
        known = known_settings(find(parameters.get("experiment", "")))
    except ValueError:  # the run's own message says so better
        known = known_settings()
    flat = {**parameters, **(parameters.get("settings") or {})}
    return {name: v for name, v in flat.items() if (name in known and v is not None) or name in own}


def _not_taken(name: str, parts: Mapping[str, Any], taken: Iterable[str]) -> InitErrorDetails:
    """Why a run does not take a setting: another experiment, rule, base or observable does, or none."""
    registries: dict[str, Any] = {"experiment": EXPERIMENTS, "rule": RULES, "base": BASES, "observable": OBSERVABLES}
    owners = [
        f"the {what} {entry.name}"
        for what, registry in registries.items()
        for entry in registry.values()
        if name in entry.settings.model_fields
    ]
    here = ", ".join(f"{what} {entry}" for what, entry in parts.items())
    if owners:
        return _problem(f"{name} belongs to {' and '.join(owners)}; leave it out for {here}")
    return _problem(f"{name} is not a setting of a run; there are {', '.join(taken)}")


def _check(config: RunConfig, experiment: Experiment) -> None:
    """Raise a ValueError for settings that do not fit together."""
    experiment.check(config)
    BASES[config.base].check(config)
    levels = config.measure_at_losses
    if any(later >= earlier for earlier, later in itertools.pairwise(levels)):
        raise ValueError(f"measure_at_losses must fall from value to value, got {list(levels)}")
    if config.warmup_steps and config.warmup_steps >= config.steps:
        raise ValueError(f"warmup_steps must be less than the {config.steps} steps, got {config.warmup_steps}")


def _problem(message: str) -> InitErrorDetails:
    # A message of one's own is a template, in which braces are placeholders.
    return InitErrorDetails(
        type=PydanticCustomError("value_error", "{message}", {"message": message}), loc=(), input=None
    )


def grid(
    experiment: str, learning_rates: Iterable[float], rhos: Iterable[float], seeds: Iterable[int], **settings: Any
) -> list[RunConfig]:
    """The configurations of all combinations of learning rate, rho and seed; settings that are None are left out."""
    given = {name: value for name, value in settings.items() if value is not None}
    points = itertools.product(learning_rates, rhos, seeds)
    return [
        RunConfig(**{"experiment": experiment, "learning_rate": rate, "rho": rho, "seed": seed, **given})
        for rate, rho, seed in points
    ]
