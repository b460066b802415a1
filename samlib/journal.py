"""What a run says on its way, for whoever watches it: JSON lines appended to the file that SAMLIB_PROGRESS names."""

from __future__ import annotations

import decimal
import json
import numbers
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

__all__ = ["PROGRESS", "Journal", "note", "record"]

PROGRESS = "SAMLIB_PROGRESS"


def note(event: str, **values: Any) -> None:
    """Append an event to the journal; without ``SAMLIB_PROGRESS`` in the environment do nothing."""
    if path := os.environ.get(PROGRESS):
        append(Path(path), event, **values)


def append(path: Path, event: str, **values: Any) -> None:
    """Append an event to a journal."""
    # One write, and a newline before it: a line that a killed process left half-written stays alone.
    line = "\n" + json.dumps({"event": event, **values}, default=float) + "\n"
    with path.open("ab", buffering=0) as file:
        file.write(line.encode())


def record(**values: Any) -> None:
    """Put results of a notebook of one's own into the sweep's table; outside a sweep only check that they could be.

    Args:
        values: one column each; the last value counts. Numbers, text, truth values and None; also lists, dictionaries
            and arrays of these, which the table shows as text.

    Raises:
        TypeError: naming the first value that is nothing of these.
    """
    note("record", values={name: _plain(name, value) for name, value in values.items()})


def _plain(name: str, value: Any, within: tuple[int, ...] = ()) -> Any:
    """A value as JSON knows it: NumPy's and PyTorch's numbers and arrays are the numbers and lists that they hold.

    Args:
        name: where it stands, for the message.
        value: the value.
        within: identities of the lists and dictionaries that it stands in.
    """
    if value is None or isinstance(value, str | bool | float):
        return value
    if isinstance(value, int) and value.bit_length() < 4096:  # what Python reads back as text
        return value
    path = (*within, id(value))
    kind = getattr(getattr(value, "dtype", None), "kind", "")  # NumPy's times would become numbers
    if id(value) not in within and len(path) < 100 and kind not in ("m", "M", "V"):
        if isinstance(value, Mapping) and len({str(key) for key in value}) == len(value):
            return {str(key): _plain(f"{name}[{key!r}]", entry, path) for key, entry in value.items()}
        if isinstance(value, list | tuple | set | frozenset):
            return [_plain(f"{name}[{i}]", entry, path) for i, entry in enumerate(value)]
        held = value
        with suppress(TypeError, ValueError, RuntimeError):
            if isinstance(value, numbers.Integral):
                held = int(value)
            elif isinstance(value, numbers.Real | decimal.Decimal):
                held = float(value)
            elif hasattr(value, "tolist") and not isinstance(value, type):
                held = value.tolist()
        if held is not value:
            return _plain(name, held, path)
    raise TypeError(
        "record takes numbers, text, truth values and None, and lists, dictionaries and arrays of these; "
        f"{name} is of type {type(value).__name__}, or cannot be written as such"
    )


class Journal:
    """A journal being read while others append to it.

    Args:
        path: the file; it need not exist yet.
        skip: ignore what it holds now.
    """

    def __init__(self, path: Path, skip: bool = False) -> None:
        self.path = path
        self._offset = path.stat().st_size if skip and path.exists() else 0

    def read(self) -> list[dict[str, Any]]:
        """The events since the last call; incomplete lines are left for the next."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset)
                content = file.read()
        except FileNotFoundError:
            return []
        complete = content[: content.rfind(b"\n") + 1]
        self._offset += len(complete)
        events = []
        for line in complete.splitlines():
            try:
                events.append(json.loads(line))
            except ValueError:  # blank, or cut short by a kill
                continue
        return events
