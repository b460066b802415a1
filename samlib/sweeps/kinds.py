"""Kinds of parameters, and what a value from the command line or from YAML means as one of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

__all__ = ["ANYTHING", "NONE", "Kind", "load_yaml", "union"]

_NOTHING = ("None", "none", "null", "~")
_TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_ARTICLE = {
    "None": "None",
    "float": "a number",
    "int": "a whole number",
    "number": "a number",
    "bool": "true or false",
    "str": "a text",
    "list": "a list",
    "dict": "a dict",
    "": "a number, text, truth value, list or dict",
}
_NARROW_FIRST = ("None", "choice", "int", "number", "float", "bool", "list", "dict", "str", "")


@dataclass(frozen=True)
class Kind:
    """What values a parameter takes.

    Attributes:
        name: "float", "int", "number" for a default such as ``3`` without a type, "bool", "str", "list", "dict",
            "None", "choice", "union", or "" where neither annotation nor default tells.
        parts: the alternatives of a union; the kind of a list's entries, of a dict's values, if known.
        choices: the values of a choice.
    """

    name: str
    parts: tuple[Kind, ...] = ()
    choices: tuple[Any, ...] = ()

    @property
    def optional(self) -> bool:
        """Whether None is allowed."""
        return self.name == "None" or None in self.choices or any(part.optional for part in self.parts_of_union)

    @property
    def parts_of_union(self) -> tuple[Kind, ...]:
        return self.parts if self.name == "union" else ()

    def __str__(self) -> str:
        if self.name == "choice":
            return " or ".join(map(repr, self.choices))
        if self.name == "union":
            return " or ".join(map(str, self.parts))
        entries = f", each entry {self.parts[0]}" if self.parts else ""
        return _ARTICLE[self.name] + entries

    def convert(self, value: Any) -> Any:
        """A value as this kind: what the command line and YAML give as text becomes what it means.

        >>> union(Kind("float"), NONE).convert("1e-3")
        0.001

        Raises:
            ValueError: if it is not allowed.
        """
        try:
            if hasattr(value, "item") and not getattr(value, "shape", None):  # a number of NumPy or PyTorch
                value = value.item()
            return self._convert(value)
        except (ValueError, TypeError, OverflowError, KeyError, AttributeError, yaml.YAMLError):
            raise ValueError(f"must be {self}, got {value!r}") from None

    def takes(self, value: Any) -> bool:
        """Whether a value is allowed, as it is."""
        try:
            return self.convert(value) == value
        except ValueError:
            return False

    def _convert(self, value: Any) -> Any:
        if self.name == "choice":
            return _choose(self.choices, value)
        if self.name == "union":
            if self.optional and (value is None or (isinstance(value, str) and value in _NOTHING)):
                return None
            for part in sorted(self.parts, key=lambda part: _NARROW_FIRST.index(part.name)):
                try:
                    return part.convert(value)
                except ValueError:
                    continue
            raise ValueError
        value = _CONVERT[self.name](value)
        if self.parts and isinstance(value, list):
            return [self.parts[0].convert(entry) for entry in value]
        if self.parts:
            return {name: self.parts[0].convert(entry) for name, entry in value.items()}
        return value


NONE, ANYTHING = Kind("None"), Kind("")


def union(*kinds: Kind) -> Kind:
    """What any of several kinds allows."""
    flat = [part for kind in kinds for part in (kind.parts_of_union or (kind,))]
    parts = tuple(dict.fromkeys(flat))
    if ANYTHING in parts:
        return ANYTHING
    return parts[0] if len(parts) == 1 else Kind("union", parts)


def _choose(choices: tuple[Any, ...], value: Any) -> Any:
    for choice in choices:
        if type(choice) is type(value) and choice == value:
            return choice
    for choice in choices:  # a text that means one of them
        name = "None" if choice is None else type(choice).__name__
        try:
            if name != "str" and Kind(name).convert(value) == choice:
                return choice
        except ValueError:
            continue
    raise ValueError


def _none(value: Any) -> None:
    if value is not None and value not in _NOTHING:
        raise ValueError


def _number(value: Any) -> float:
    if isinstance(value, bool):
        raise ValueError
    return float(value) + 0.0  # -0.0 is 0.0


def _integer(value: Any) -> int:
    number = _number(value)
    if number != int(number):
        raise ValueError
    return int(value) if isinstance(value, (int, str)) and str(value).lstrip("+-").isdigit() else int(number)


def _any_number(value: Any) -> int | float:
    """A whole number however it is written: ``3.0`` and ``3`` are one value, so they are one point of a sweep."""
    try:
        return _integer(value)
    except (ValueError, OverflowError):
        return _number(value)


def _truth(value: Any) -> bool:
    return value if isinstance(value, bool) else _TRUTH[value.lower()]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _container(kind: type) -> Callable[[Any], Any]:
    def convert(value: Any) -> Any:
        value = load_yaml(value) if isinstance(value, str) else value
        value = list(value) if kind is list and isinstance(value, tuple) else value
        if not isinstance(value, kind):
            raise TypeError
        return _plain(value)

    return convert


def _anything(value: Any) -> Any:
    if not isinstance(value, str):
        return _plain(value)
    if value in _NOTHING:
        return None
    try:
        return _plain(load_yaml(value))
    except yaml.YAMLError:
        if value.lstrip().startswith(("[", "{")):
            raise
        return value  # a text that YAML would want in quotes


def _plain(value: Any) -> Any:
    """A value as JSON knows it. YAML reads ``1e-3`` as a string: make it, and nothing else, the number it means."""
    if isinstance(value, Mapping):
        return {str(name): _plain(v) for name, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) or (isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value)):
        return float(value) + 0.0
    if value is None or isinstance(value, (str, int)):
        return value
    raise TypeError


_CONVERT: dict[str, Callable[[Any], Any]] = {
    "None": _none,
    "float": _number,
    "int": _integer,
    "number": _any_number,
    "bool": _truth,
    "str": _text,
    "list": _container(list),
    "dict": _container(dict),
    "": _anything,
}


class _Loader(yaml.SafeLoader):
    """YAML in which a name stands once and a date is the text that it is."""

    yaml_implicit_resolvers = {  # noqa: RUF012, as PyYAML has it
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        names = [(key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for name in names:
            if names.count(name) > 1 and name[1] != "<<":
                raise yaml.constructor.ConstructorError(None, None, f"{name[1]} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def load_yaml(text: str) -> Any:
    """What a YAML text says.

    Raises:
        yaml.YAMLError: if it is none, or names something twice.
    """
    return yaml.load(text, _Loader)  # a SafeLoader
