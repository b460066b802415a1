"""Where a number comes from: versions, machine, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import __version__
from .files import PROJECT

if TYPE_CHECKING:
    from .experiments.task import Task

__all__ = ["commit", "processor", "provenance"]


def provenance(task: Task) -> dict[str, Any]:
    """What a record says of how its run came about, before it is trained."""
    dataset = task.dataset
    return {
        "samlib": __version__,
        "record": task.experiment.record,
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if task.config.device == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "dataset": dataset.name,
        "fingerprint": dataset.fingerprint,
        "standin": dataset.standin,
        "parameters": task.initial_parameters().numel(),
    }


def processor() -> str:
    """The name of this machine's processor."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str | None:
    """The project's git commit, with "+" for uncommitted changes to the package; None outside a checkout.

    ``SAMLIB_COMMIT`` names it where the checkout has no history, in a container say.
    """
    if named := os.environ.get("SAMLIB_COMMIT"):
        return named
    if not PROJECT or not (PROJECT / ".git").exists():
        return None
    commands = (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "samlib"])
    try:
        head, changes = (
            subprocess.run(
                ["git", "-C", str(PROJECT), *c], capture_output=True, encoding="utf-8", check=True
            ).stdout.strip()
            for c in commands
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changes else "")
