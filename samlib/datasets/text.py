"""tiny_shakespeare as sequences of ASCII codes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .base import Source, Tensors, take
from .files import RemoteFile

__all__ = ["SHAKESPEARE"]


def _load_shakespeare(paths: list[Path]) -> str:
    return paths[0].read_text("ascii")


def _python_topics() -> str:
    """the topic texts of Python's own help system"""
    from pydoc_data import topics

    text = "\n".join(topics.topics[key] for key in sorted(topics.topics))
    return text.encode("ascii", "ignore").decode()


def _sequences(text: str, examples: int | None, label: str, sequence_length: int) -> tuple[list[np.ndarray], Tensors]:
    """Consecutive, disjoint sequences of ASCII codes and their successors; the last 10,000 lines are the test set.

    A text of under 20,000 lines gives a quarter of them to the test set instead.
    """
    lines = text.splitlines(keepends=True)
    held_out = 10_000 if len(lines) >= 20_000 else len(lines) // 4

    def tokens(part: list[str]) -> tuple[Tensor, Tensor]:
        codes = torch.frombuffer(bytearray("".join(part).encode("ascii")), dtype=torch.uint8).long()
        used = (len(codes) - 1) // sequence_length * sequence_length
        return codes[:used].view(-1, sequence_length), codes[1 : used + 1].view(-1, sequence_length)

    inputs, targets = tokens(lines[:-held_out])
    count = take(len(inputs), examples, label)
    tensors = (inputs[:count], targets[:count], *tokens(lines[-held_out:]))
    return [t.numpy() for t in tensors], tensors


SHAKESPEARE = Source(
    "shakespeare",
    (
        RemoteFile(
            "tiny_shakespeare/input.txt",
            "sha256",
            "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
            ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",),
        ),
    ),
    _load_shakespeare,
    _python_topics,
    _sequences,
)
