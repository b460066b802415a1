"""Names that a module offers although another one, which builds on it, defines them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

__all__ = ["elsewhere"]


def elsewhere(module: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """A module's ``__getattr__`` that looks some names up in other modules of the package, when they are asked for.

    Args:
        module: its ``__name__``.
        homes: the module of samlib that defines a name, by name.
    """

    def look_up(name: str) -> Any:
        if name in homes:
            return getattr(import_module(f"samlib.{homes[name]}"), name)
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return look_up
