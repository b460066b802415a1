"""BatchNorm where a closure runs twice: its running statistics should move once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["frozen_batch_statistics"]


@contextmanager
def frozen_batch_statistics(model: nn.Module, frozen: bool = True) -> Iterator[None]:
    """Keep BatchNorm's running statistics as they are inside the block; batch statistics still normalise.

    In a SAM closure: ``with frozen_batch_statistics(model, optimizer.repeated): loss = ...``
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    norms = [m for m in norms if m.training and m.track_running_stats]
    saved = [(m, m.running_mean, m.running_var, m.num_batches_tracked) for m in norms]
    try:
        if frozen:
            for m in norms:
                m.track_running_stats, m.running_mean, m.running_var = False, None, None
        yield
    finally:
        if frozen:
            for m, mean, var, count in saved:
                m.track_running_stats, m.running_mean, m.running_var, m.num_batches_tracked = True, mean, var, count
