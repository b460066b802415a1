"""What a notebook takes: its parameters, their kinds and defaults, and the kernel that executes it."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .annotations import annotated, by_default
from .kinds import ANYTHING, NONE, Kind, union

__all__ = ["NotebookError", "Parameter", "content_hash", "kernel_of", "language_of", "parameters", "read"]

_PYTHON = ("python", "ipython")


class NotebookError(ValueError):
    """A file that is not a usable notebook; the message says why."""


@dataclass(frozen=True)
class Parameter:
    """One name of a notebook's parameters cell.

    Attributes:
        name: the variable.
        kind: what values it takes.
        default: the default, None also where it is not a literal.
        required: whether there is no default.
    """

    name: str
    kind: Kind = ANYTHING
    default: Any = None
    required: bool = False

    def convert(self, value: Any) -> Any:
        """A value as this parameter's kind.

        Raises:
            ValueError: naming parameter, value and what is allowed.
        """
        try:
            return self.kind.convert(value)
        except ValueError as error:
            raise ValueError(f"{self.name} {error}") from None


def parameters(source: Path) -> dict[str, Parameter] | None:
    """A notebook's parameters by name, from the cell tagged ``parameters``.

    Returns:
        The parameters, none without such a cell; None for a notebook in another language than Python, whose
        parameters cannot be read.

    Raises:
        NotebookError: if the file is not a notebook.
    """
    notebook = read(source)
    if _language(notebook) not in _PYTHON:
        return None
    cells = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", ())]
    if not cells:
        return {}
    # papermill.inspect_notebook reads line by line and overlooks annotations such as `float | None`.
    try:
        tree = ast.parse(cells[0].source)
    except SyntaxError as error:
        raise NotebookError(f"{source}: the parameters cell is not plain Python ({error})") from None
    found: dict[str, Parameter] = {}
    aliases: dict[str, ast.expr] = {}  # Activation = Literal["relu", "tanh"]
    for node in tree.body:
        if isinstance(node, ast.ImportFrom | ast.Import):
            renamed = [(n.asname, n.name.rpartition(".")[2]) for n in node.names if n.asname]
            aliases |= {alias: ast.Name(name) for alias, name in renamed if alias != name}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and _is_alias(node.annotation):
            if node.value:
                aliases[node.target.id] = node.value
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[node.target.id] = _parameter(node.target.id, node.annotation, node.value, aliases)
        elif isinstance(node, ast.Assign):
            names = [t.id for t in node.targets if isinstance(t, ast.Name)]
            found |= {name: _parameter(name, None, node.value, aliases) for name in names}
            aliases |= dict.fromkeys(names, node.value)
    return found


def _is_alias(annotation: ast.expr) -> bool:
    """Whether an annotation says that what is assigned is an annotation itself."""
    return ast.unparse(annotation).rpartition(".")[2] == "TypeAlias"


def _parameter(name: str, annotation: ast.expr | None, value: ast.expr | None, aliases: Any) -> Parameter:
    try:
        default = ast.literal_eval(value) if value else None
        none = value is not None and default is None
    except (ValueError, TypeError):
        default, none = None, False
    kind = (annotated(annotation, aliases) if annotation else None) or by_default(default)
    return Parameter(name, union(kind, NONE) if none else kind, default, value is None)


def kernel_of(source: Path, wanted: str | None = None) -> tuple[str, str]:
    """The kernel to execute a notebook with: the wanted one, else the one that it names, else one of its language.

    Returns:
        Its name and its language.

    Raises:
        NotebookError: if it is not installed, or its program is gone; the message says which are there.
    """
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    notebook, manager = read(source), KernelSpecManager()
    name: str | None = wanted or (notebook.metadata.get("kernelspec") or {}).get("name")
    if not name:
        language = _language(notebook)
        name = "python3" if language in _PYTHON else _speaking(manager, language)
    try:
        spec = manager.get_kernel_spec(name) if name else None
    except NoSuchKernel:
        spec = None
    if not name or spec is None:
        there = ", ".join(sorted(manager.find_kernel_specs())) or "none"
        what = f"the kernel {name}" if name else f"a kernel for {_language(notebook)}"
        raise NotebookError(f"{source}: {what} is not installed here; there are {there}; choose one with --kernel")
    program = spec.argv[0] if spec.argv else ""
    if os.path.isabs(program) and not shutil.which(program):
        raise NotebookError(f"{source}: the kernel {name} starts {program}, and there is no such program here")
    return name, spec.language


def language_of(notebook: Any) -> str | None:
    """The language that a notebook names, if it does."""
    about = notebook.metadata
    return (about.get("kernelspec") or {}).get("language") or (about.get("language_info") or {}).get("name")


def _language(notebook: Any) -> str:
    return (language_of(notebook) or "python").lower()


def _speaking(manager: Any, language: str) -> str | None:
    """An installed kernel for a language, if there is one."""
    specs = manager.get_all_specs().items()
    return next((name for name, about in sorted(specs) if about["spec"].get("language", "").lower() == language), None)


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
