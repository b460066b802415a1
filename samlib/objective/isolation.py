"""Evaluate as if called from nowhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["isolated", "leaf"]


@contextmanager
def isolated(device: torch.device, keep_random_state: bool = False) -> Iterator[None]:
    """The caller's autocast, ``no_grad`` and ``inference_mode`` stay outside of this context.

    Attention is computed by its definition: the fused kernels have no second derivative.

    Args:
        device: of the parameters.
        keep_random_state: leave PyTorch's random state as it was; loaders draw from it whenever they are read.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in {"cpu", device.type}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        if keep_random_state:
            stack.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
        yield


@torch.inference_mode(False)
def leaf(params: Tensor, own: bool = False) -> Tensor:
    """A leaf to differentiate by, with the values of a vector; its ``own`` ones, or shared where that can be."""
    w = params.detach()
    return (w.clone() if own or w.is_inference() else w).requires_grad_()
