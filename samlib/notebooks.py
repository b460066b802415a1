"""Notebooks with parameters: what they take, and executing one in a process of its own with papermill."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

__all__ = ["Execution", "NotebookError", "Parameter", "Workers", "content_hash", "execute", "parameters"]

_DEAD = 3  # exit code of the process below when its kernel died
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
    notebook = _read(source)
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
    cells = [(c.cell_type, c.source, c.metadata.get("tags", [])) for c in _read(source).cells]
    return hashlib.sha256(json.dumps(cells).encode()).hexdigest()


def _read(source: Path) -> Any:
    import nbformat

    try:
        return nbformat.read(source, as_version=4)
    except OSError as error:
        raise NotebookError(f"{source} cannot be read ({error.strerror}); give the path of a notebook") from None
    except Exception as error:  # nbformat raises many kinds for a damaged file
        raise NotebookError(f"{source} is not a notebook ({str(error).splitlines()[0]})") from None


@dataclass(frozen=True)
class Execution:
    """How an execution ended.

    Attributes:
        outcome: "finished"; "failed" if a cell raised; "killed" if the kernel or its papermill process died;
            "timed out"; "stopped" on request.
        error: the end of the log unless finished: the traceback of the cell that failed.
        seconds: wall time.
    """

    outcome: Literal["finished", "failed", "killed", "timed out", "stopped"]
    error: str
    seconds: float


def execute(
    source: Path,
    target: Path,
    values: Mapping[str, Any],
    cwd: Path,
    log: Path,
    *,
    timeout: float | None = None,
    env: Mapping[str, str] | None = None,
    stop: threading.Event | None = None,
    workers: Workers | None = None,
) -> Execution:
    """Execute one notebook with papermill in a process of its own, which ends when this one does.

    Args:
        source: the notebook.
        target: the executed copy; it appears, whole, only if every cell succeeded. Otherwise what there is stands
            in ``failed.ipynb`` beside it.
        values: parameters.
        cwd: the kernel's working folder.
        log: file to append all messages to.
        timeout: seconds.
        env: additional environment variables.
        stop: set from another thread to give up.
        workers: where to take the process from; by default it is started now.
    """
    # A temporary name until it succeeds: papermill writes the output notebook even when its kernel was killed.
    part = target.with_name(f"{target.stem}.part.ipynb")
    paths = {"source": source, "part": part, "cwd": cwd, "log": log}
    request = {"values": dict(values), "env": dict(env or {}), **{k: str(p.absolute()) for k, p in paths.items()}}
    log.touch()
    before = log.stat().st_size
    started = time.monotonic()
    process = workers.take() if workers else _start()
    try:
        code = _converse(process, request, timeout, stop)
    finally:
        process.kill()
        process.wait()
    seconds = time.monotonic() - started
    if code == 0:
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(target)
        target.with_name("failed.ipynb").unlink(missing_ok=True)
        return Execution("finished", "", seconds)
    if part.exists():
        part.replace(target.with_name("failed.ipynb"))
    if isinstance(code, str):
        return Execution(code, f"{code} after {seconds:.0f} s", seconds)
    with log.open("rb") as file:
        file.seek(before)
        lines = file.read().decode(errors="replace").strip().splitlines()
    reason = [f"killed by signal {-code}"] if code < 0 else []
    outcome: Literal["killed", "failed"] = "killed" if code < 0 or code == _DEAD else "failed"
    return Execution(outcome, "\n".join(lines[-30:] + reason), seconds)


def _converse(
    process: subprocess.Popen[bytes], request: dict[str, Any], timeout: float | None, stop: threading.Event | None
) -> int | Literal["timed out", "stopped"]:
    """Hand over the request, keep the pipe open as a sign of life, and wait: the exit code, or why we gave up."""
    assert process.stdin
    deadline = None if timeout is None else time.monotonic() + timeout
    try:
        with suppress(BrokenPipeError):  # then it is dead already, and its exit code says so
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
        while True:
            try:
                return process.wait(0.2)
            except subprocess.TimeoutExpired:
                if stop and stop.is_set():
                    return "stopped"
                if deadline and time.monotonic() > deadline:
                    return "timed out"
    finally:
        with suppress(BrokenPipeError):
            process.stdin.close()


class Workers:
    """Processes that have imported papermill and wait for a notebook, so that the next one need not."""

    def __init__(self) -> None:
        self._ready: list[subprocess.Popen[bytes]] = []
        self._closed = False

    def take(self) -> subprocess.Popen[bytes]:
        """A process, and start its successor."""
        try:
            process = self._ready.pop()
        except IndexError:
            process = _start()
        if not self._closed:
            self._ready.append(_start())
        return process if process.poll() is None else _start()

    def close(self) -> None:
        """End those that still wait."""
        self._closed = True
        while self._ready:
            process = self._ready.pop()
            process.kill()
            process.communicate()


def _start() -> subprocess.Popen[bytes]:
    # In a session of its own: Ctrl-C is for this process, which then ends the other.
    command = [sys.executable, "-m", "samlib.notebooks"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


def _main() -> int:
    import papermill
    from papermill.exceptions import PapermillExecutionError

    line = sys.stdin.buffer.readline()
    if not line:  # nothing to do, nobody there any more
        return 0
    request = json.loads(line)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with open(request["log"], "ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ.update(request["env"])
    os.chdir(request["cwd"])

    metadata = _read(Path(request["source"])).metadata
    kernel = metadata.get("kernelspec", {}).get("name", "python3")
    language = None if {"kernelspec", "language_info"} & metadata.keys() else "python"
    try:
        papermill.execute_notebook(
            request["source"],
            request["part"],
            request["values"],
            kernel_name=kernel,
            language=language,
            progress_bar=False,
            cwd=request["cwd"],
            # All cells are done and all files written: nothing is gained by waiting seconds for PyTorch's teardown.
            shutdown_kernel="immediate",
        )
    except PapermillExecutionError as error:
        print(re.sub(r"\x1b\[[0-9;]*m", "", str(error)), file=sys.stderr)
        return 1
    except RuntimeError as error:  # also DeadKernelError, and a kernel that dies before it answers
        print(error, file=sys.stderr)
        return _DEAD
    return 0


def _end_with_parent() -> None:
    """The other end of standard input closes when the process that asked is gone; the kernel follows this one."""
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(_main())
