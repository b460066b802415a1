"""Kinds of settings, what they mean when they come as text, and how a bad one is explained."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import InitErrorDetails

__all__ = [
    "BelowOne",
    "Count",
    "Levels",
    "Names",
    "NonNegative",
    "Positive",
    "Settings",
    "Share",
    "Truth",
    "Whole",
    "explain",
    "in_one_line",
    "names",
    "number",
    "validated",
]


def number(value: Any) -> Any:
    """YAML reads ``1e-3`` as a string; accept it, and nothing else, as the number it means. −0.0 is 0.0."""
    if isinstance(value, bool):
        return repr(value)  # which is refused as no number
    if isinstance(value, str):
        if value in ("None", "none", "null"):
            return None
        try:
            value = float(value)
        except ValueError:
            return value
    if isinstance(value, numbers.Real | Decimal) and not isinstance(value, numbers.Integral):
        value = float(value)
    return value + 0.0 if isinstance(value, float) else value


def _truth(value: Any) -> Any:
    return {"true": True, "false": False}.get(value.lower(), value) if isinstance(value, str) else value


def names(value: Any) -> Any:
    """``a,b`` and ``[a, b]`` as text are the list that they mean."""
    if isinstance(value, str):
        try:
            value = yaml.safe_load(value) if value.lstrip().startswith("[") else value.split(",")
        except yaml.YAMLError:
            raise ValueError("must be a list such as a,b or [a, b]") from None
    return [v.strip() if isinstance(v, str) else v for v in value] if isinstance(value, (list, tuple)) else value


# Beyond these bounds nothing trains and float32 overflows.
Positive = Annotated[float, BeforeValidator(number), Field(gt=0, ge=1e-12, le=1e12, allow_inf_nan=False)]
NonNegative = Annotated[float, BeforeValidator(number), Field(ge=0, le=1e12, allow_inf_nan=False)]
Share = Annotated[float, BeforeValidator(number), Field(ge=0, le=1, allow_inf_nan=False)]
BelowOne = Annotated[float, BeforeValidator(number), Field(ge=0, lt=1, allow_inf_nan=False)]
Count = Annotated[int, BeforeValidator(number), Field(ge=1)]
Whole = Annotated[int, BeforeValidator(number), Field(ge=0)]
Truth = Annotated[bool, BeforeValidator(_truth)]
Names = Annotated[tuple[str, ...], BeforeValidator(names)]
Levels = Annotated[tuple[Positive, ...], BeforeValidator(names)]


class Settings(BaseModel):
    """Settings of one experiment, rule, base or observable, beside those that every run has."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def validated(
    kinds: Iterable[type[Settings]], given: Mapping[str, Any]
) -> tuple[dict[str, Any], list[InitErrorDetails]]:
    """The settings of several kinds, each checked by its own: all values, and what is wrong with them."""
    values: dict[str, Any] = {}
    problems: list[InitErrorDetails] = []
    for kind in kinds:
        part = {name: given[name] for name in kind.model_fields if name in given}
        try:
            values |= kind.model_validate(part).model_dump()
        except ValidationError as error:
            problems += details(error)
    return values, problems


def details(error: ValidationError) -> list[InitErrorDetails]:
    """The parts of an error, of which another one can be made."""
    return [
        InitErrorDetails(type=e["type"], loc=e["loc"], input=e["input"], ctx=e.get("ctx", {})) for e in error.errors()
    ]


def explain(error: ValidationError) -> list[str]:
    """A validation error as one line per setting: its name, the value given and what is allowed."""
    lines = []
    for problem in error.errors():
        name, message = ".".join(map(str, problem["loc"])), problem["msg"]
        if problem["type"] == "missing":
            lines.append(f"{name} is required (--{name.replace('_', '-')})")
        else:
            message = message.removeprefix("Value error, ").replace("Input should be", "must be")
            whole = problem["type"] == "value_error" and not message.startswith("must ")
            lines.append(message if whole or not name else f"{name} {message}, got {problem['input']!r}")
    return list(dict.fromkeys(lines))


def in_one_line(error: BaseException) -> str:
    """An error's kind and the first line of what it says."""
    return f"{type(error).__name__}: {error}".splitlines()[0]
