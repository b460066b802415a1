"""What an annotation such as ``Literal["a", "b"] | None`` allows."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

from .kinds import ANYTHING, NONE, Kind, union

__all__ = ["annotated", "by_default"]

_NAMES = {name: Kind(name) for name in ("float", "int", "bool", "str", "list", "dict")}
_NAMES |= dict.fromkeys(("List", "Sequence", "Iterable", "Collection", "tuple", "Tuple"), Kind("list"))
_NAMES |= dict.fromkeys(("Dict", "Mapping", "MutableMapping"), Kind("dict"))
_NAMES |= {"None": NONE, "NoneType": NONE, "Any": ANYTHING, "object": ANYTHING, "Real": Kind("float")}


def annotated(node: ast.expr, aliases: Mapping[str, ast.expr] | None = None) -> Kind | None:
    """The kind that an annotation means; None for one that is not known here, of a class of one's own say.

    Args:
        node: the annotation.
        aliases: names for annotations, ``Activation = Literal["relu", "tanh"]`` say.
    """
    aliases = aliases or {}
    if isinstance(node, ast.Constant) and node.value is None:
        return NONE
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        try:
            return annotated(ast.parse(node.value, mode="eval").body, aliases)
        except SyntaxError:
            return None
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _union_of([node.left, node.right], aliases)
    if isinstance(node, ast.Subscript):
        inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        return _subscripted(_known_name(node.value, aliases), inner, aliases)
    name = _last_name(node)
    if name in aliases:
        return annotated(aliases[name], {n: a for n, a in aliases.items() if n != name})
    return _NAMES.get(name)


def _last_name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _known_name(node: ast.expr, aliases: Mapping[str, ast.expr]) -> str:
    """The name of a type, by which it may have been imported as another."""
    for _ in aliases:
        node = aliases.get(_last_name(node), node)
    return _last_name(node)


def _union_of(nodes: list[ast.expr], aliases: Mapping[str, ast.expr]) -> Kind:
    return union(*(annotated(node, aliases) or ANYTHING for node in nodes))


def _subscripted(name: str, inner: list[ast.expr], aliases: Mapping[str, ast.expr]) -> Kind | None:
    if name == "Literal":
        nested = [node for node in inner if isinstance(node, ast.Subscript)]  # a Literal within, whose values these are
        if nested:
            plain = [node for node in inner if node not in nested]
            rest = [_subscripted(name, plain, aliases) or ANYTHING] if plain else []
            return union(*rest, *(annotated(node, aliases) or ANYTHING for node in nested))
        try:
            choices = tuple(ast.literal_eval(node) for node in inner)
        except (ValueError, TypeError):  # a member of an Enum, say
            return ANYTHING
        known = all(choice is None or isinstance(choice, (str, int, float)) for choice in choices)
        return Kind("choice", choices=choices) if known else ANYTHING
    if name == "Union":
        return _union_of(inner, aliases)
    if name == "Optional":
        return union(_union_of(inner, aliases), NONE)
    if name in ("Annotated", "Final", "ClassVar"):
        return annotated(inner[0], aliases)
    kind = _NAMES.get(name)
    if kind and kind.name in ("list", "dict"):
        inner = [node for node in inner if not (isinstance(node, ast.Constant) and node.value is ...)]
        of = {annotated(node, aliases) for node in (inner[1:] if kind.name == "dict" else inner)}
        part = of.pop() if len(of) == 1 else None
        return Kind(kind.name, (part,)) if part and part != ANYTHING else kind
    return kind


def by_default(default: Any) -> Kind:
    """The kind of a parameter that has nothing but a default."""
    if default is None:
        return ANYTHING
    name = {"tuple": "list", "int": "number", "float": "number"}.get(type(default).__name__, type(default).__name__)
    return Kind(name) if name in ("number", "bool", "str", "list", "dict") else ANYTHING
