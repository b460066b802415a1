"""What a notebook takes: its parameters, their types and defaults."""

from __future__ import annotations

import ast
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

__all__ = ["NotebookError", "Parameter", "content_hash", "parameters", "read"]

_NOTHING = ("None", "none", "null", "~")

_TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}

_ARTICLE = {
    "float": "a number",
    "int": "a whole number",
    "number": "a number",
    "bool": "true or false",
    "str": "a text",
}


class NotebookError(ValueError):
    """A file that is not a usable notebook; the message says why."""


@dataclass(frozen=True)
class Parameter:
    """One name of a notebook's parameters cell.

    Attributes:
        name: the variable.
        kind: "float", "int", "bool", "str", "list", "dict", "number" for a default such as ``3`` without a type, or
            "" where neither annotation nor default tells.
        optional: whether None is allowed.
        default: the default, None also where it is not a literal.
        required: whether there is no default.
    """

    name: str
    kind: str
    optional: bool
    default: Any
    required: bool

    def convert(self, value: Any) -> Any:
        """A value as this parameter's type: what the command line and YAML give as text becomes what it means.

        >>> Parameter("rho", "float", False, 0.1, False).convert("1e-3")
        0.001

        Raises:
            ValueError: naming parameter, value and what is allowed.
        """
        if self.optional and (value is None or (isinstance(value, str) and value in _NOTHING)):
            return None
        try:
            return _CONVERT[self.kind](value)
        except (ValueError, TypeError, OverflowError, KeyError, AttributeError, yaml.YAMLError):
            allowed = _ARTICLE.get(self.kind, f"a {self.kind}") + (" or None" if self.optional else "")
            raise ValueError(f"{self.name} must be {allowed}, got {value!r}") from None


def _number(value: Any) -> float:
    if isinstance(value, bool):
        raise ValueError
    return float(value)


def _integer(value: Any) -> int:
    number = _number(value)
    if number != int(number):
        raise ValueError
    return int(value) if isinstance(value, (int, str)) and str(value).lstrip("+-").isdigit() else int(number)


def _any_number(value: Any) -> int | float:
    try:
        return _integer(value) if not (isinstance(value, str) and re.search(r"[.eE]", value)) else _number(value)
    except ValueError:
        return _number(value)


def _truth(value: Any) -> bool:
    return value if isinstance(value, bool) else _TRUTH[value.lower()]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _container(kind: type) -> Any:
    def convert(value: Any) -> Any:
        value = yaml.safe_load(value) if isinstance(value, str) else value
        if not isinstance(value, kind):
            raise TypeError
        return _floats(value)

    return convert


def _anything(value: Any) -> Any:
    return _floats(yaml.safe_load(value) if isinstance(value, str) else value)


def _floats(value: Any) -> Any:
    """YAML reads ``1e-3`` as a string: make it, and nothing else, the number it means."""
    if isinstance(value, dict):
        return {name: _floats(v) for name, v in value.items()}
    if isinstance(value, list):
        return [_floats(v) for v in value]
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        return float(value)
    return value


_CONVERT = {
    "float": _number,
    "int": _integer,
    "number": _any_number,
    "bool": _truth,
    "str": _text,
    "list": _container(list),
    "dict": _container(dict),
    "": _anything,
}


def parameters(source: Path) -> dict[str, Parameter] | None:
    """A notebook's parameters by name, from the cell tagged ``parameters``.

    Returns:
        The parameters, none without such a cell; None for a notebook in another language than Python, whose
        parameters cannot be read.

    Raises:
        NotebookError: if the file is not a notebook.
    """
    notebook = read(source)
    metadata = notebook.metadata
    language = metadata.get("kernelspec", {}).get("language") or metadata.get("language_info", {}).get("name")
    if (language or "python").lower() not in ("python", "ipython"):
        return None
    cells = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", ())]
    if not cells:
        return {}
    # papermill.inspect_notebook reads line by line and overlooks annotations such as `float | None`.
    try:
        tree = ast.parse(cells[0].source)
    except SyntaxError as error:
        raise NotebookError(f"{source}: the parameters cell is not plain Python ({error})") from None
    found = {}
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[node.target.id] = _parameter(node.target.id, node.annotation, node.value)
        elif isinstance(node, ast.Assign):
            found |= {t.id: _parameter(t.id, None, node.value) for t in node.targets if isinstance(t, ast.Name)}
    return found


def _parameter(name: str, annotation: ast.expr | None, value: ast.expr | None) -> Parameter:
    try:
        default = ast.literal_eval(value) if value else None
        none = value is not None and default is None
    except ValueError:
        default, none = None, False
    text = (ast.unparse(annotation) if annotation else "").strip("'\"").replace("typing.", "")
    inner = re.sub(r"^Optional\[(.*)\]$|\s*\|\s*None\b|\bNone\s*\|\s*", r"\1", text)
    kind = inner.partition("[")[0].lower()
    if kind not in _CONVERT or not kind:
        kind = type(default).__name__
        kind = {"tuple": "list", "int": "number", "float": "number"}.get(kind, kind)
    return Parameter(name, kind if kind in _CONVERT else "", none or inner != text, default, value is None)


def content_hash(source: Path) -> str:
    """SHA-256 of a notebook's cells; outputs and metadata do not count.

    Raises:
        NotebookError: if the file is not a notebook.
    """
    cells = [(c.cell_type, c.source, c.metadata.get("tags", [])) for c in read(source).cells]
    return hashlib.sha256(json.dumps(cells).encode()).hexdigest()


def read(source: Path) -> Any:
    import nbformat

    try:
        return nbformat.read(source, as_version=4)
    except OSError as error:
        raise NotebookError(f"{source} cannot be read ({error.strerror}); give the path of a notebook") from None
    except Exception as error:  # nbformat raises many kinds for a damaged file
        raise NotebookError(f"{source} is not a notebook ({str(error).splitlines()[0]})") from None
