"""What the commands share: a terminal that may know no Greek, settings given as text, and how a command fails."""

from __future__ import annotations

import codecs
import collections
import io
import os
import re
import sys
from collections.abc import Mapping
from typing import Any, NoReturn

import typer.core

__all__ = ["Command", "Group", "fail", "given_once", "invalid", "pairs", "seconds", "values"]

_SPELLED = {"η": "eta", "ρ": "rho", "λ": "lambda", "β": "beta", "δ": "delta", "∇": "grad", "‖": "||", "²": "^2"}
_SPELLED |= {"×": "x", "…": "...", "–": "-", "−": "-", "’": "'", "“": '"', "”": '"'}


def _spelled(error: UnicodeError) -> tuple[bytes, int]:
    """Characters that a terminal does not know, spelled out; bytes of a file's name as they were."""
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end]
    spelled = (chr(ord(c) - 0xDC00) if "\udc80" <= c <= "\udcff" else _SPELLED.get(c, "?") for c in text)
    return "".join(spelled).encode("latin-1"), error.end


codecs.register_error("samlib.spelled", _spelled)


class Group(typer.core.TyperGroup):
    """A command whose output no terminal stops: not a Windows console, not a pipe in the locale C."""

    def main(self, *args: Any, **options: Any) -> Any:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="samlib.spelled")
        return super().main(*args, **options)


class Command(typer.core.TyperCommand):
    """A command that refuses an option given twice, of which the last would count without a word."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        _, _, order = self.make_parser(ctx).parse_args(args=list(args))
        for option, times in collections.Counter(order).items():
            if times > 1 and not (getattr(option, "multiple", False) or getattr(option, "is_flag", False)):
                invalid(f"{option.opts[0]} is given twice; give it once")
        return super().parse_args(ctx, args)


def pairs(texts: list[str] | None, option: str) -> dict[str, str]:
    """The settings that a repeatable option gives as NAME=VALUE."""
    found: dict[str, str] = {}
    for text in texts or []:
        name, equals, value = _decoded(text).partition("=")
        name, value = name.strip().replace("-", "_"), value.strip()
        if not equals or not name or not value:
            invalid(f"{option} takes NAME=VALUE, got {text!r}")
        if name in found:
            invalid(f"{option} names {name} twice")
        found[name] = value
    return found


def _decoded(text: str) -> str:
    """Where the locale knows less than UTF-8, Python leaves the bytes of an argument as they are: make them text."""
    raw = any("\udc80" <= c <= "\udcff" for c in text)
    return os.fsencode(text).decode("utf-8", "replace") if raw else text


def given_once(*sources: Mapping[str, Any]) -> None:
    """Fail if several of the places where settings are given name the same."""
    names = collections.Counter(name for source in sources for name in source)
    twice = [name for name, times in names.items() if times > 1]
    values = {name: " and as ".join(str(s[name]) for s in sources if name in s) for name in twice}
    if twice:
        invalid("\n".join(f"{name} is given twice, as {values[name]}; give it once" for name in twice))


def values(text: str) -> list[str]:
    """The values of a grid: not cut at the commas inside of brackets, since a value may be a list."""
    return re.split(r",(?![^\[{]*[\]}])", text)


def seconds(text: str, option: str) -> float:
    """A time such as 90s, 9m or 2h."""
    units = {"s": 1, "m": 60, "h": 3600}
    try:
        value = float(text[:-1]) * units[text[-1]] if text[-1:] in units else float(text)
        if value > 0:
            return value
    except ValueError:
        pass
    invalid(f"{option} takes a positive time such as 90s, 9m or 2h, got {text!r}")


def invalid(message: str) -> NoReturn:
    """End with exit code 2: the request cannot be carried out, and nothing was written."""
    fail(message, 2)


def fail(message: str, code: int) -> NoReturn:
    """End with a message and an exit code."""
    print(f"samlib: {message}", file=sys.stderr)
    raise SystemExit(code)
