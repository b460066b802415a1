"""Evaluate as if called from nowhere."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize

__all__ = ["isolated", "leaf", "random_numbers_kept", "undisturbed"]


@contextmanager
def isolated(device: torch.device, keep_random_state: bool = False) -> Iterator[None]:
    """The caller's autocast, ``no_grad``, ``inference_mode``, default device and cache of parametrizations stay outside
    of this context.

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
        if torch.get_default_device().type != device.type:
            stack.enter_context(device)
        stack.callback(vars(parametrize).update, _cache_enabled=parametrize._cache_enabled, _cache=parametrize._cache)
        parametrize._cache_enabled, parametrize._cache = 0, {}
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


@contextmanager
def random_numbers_kept() -> Iterator[None]:
    """All the usual sources of random numbers are afterwards as they were."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=list(devices)):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


@contextmanager
def undisturbed(model: nn.Module, data: Any = None, evaluation: bool = True) -> Iterator[None]:
    """Modes of a module and all random numbers are afterwards what they were.

    Args:
        model: the module. Its flags are set one by one: ``eval()`` may be overridden to do more.
        data: what may be a loader with random generators of its own.
        evaluation: whether the module is in evaluation mode inside.
    """
    modes = [(module, module.training) for module in model.modules()]
    samplers = [data, getattr(data, "sampler", None), getattr(data, "batch_sampler", None)]
    samplers.append(getattr(samplers[2], "sampler", None))
    owned = {id(g): g for s in samplers if isinstance(g := getattr(s, "generator", None), torch.Generator)}
    states = [(g, g.get_state()) for g in owned.values()]
    with random_numbers_kept():
        try:
            for module, training in modes:
                module.training = training and not evaluation
            yield
        finally:
            for module, training in modes:
                module.training = training
            for generator, state in states:
                generator.set_state(state)
