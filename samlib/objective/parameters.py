"""A module's parameters as one vector."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

__all__ = ["Layout", "flatten_parameters"]

PRECISE = (torch.float32, torch.float64)


def flatten_parameters(model: nn.Module, parameters: Iterable[str] | None = None) -> Tensor:
    """Parameters of a module as one vector (P,), in the order of ``model.parameters()``.

    Args:
        model: the module.
        parameters: names of parameters, or of modules for all that they hold; by default all that are trainable.

    Raises:
        ValueError: as :class:`Layout`.

    >>> flatten_parameters(nn.Linear(3, 2), ["bias"]).shape
    torch.Size([2])
    """
    return Layout(model, parameters).join()


class Layout:
    """Where the chosen parameters of a module lie in a vector w of shape (P,).

    Args:
        model: the module.
        parameters: names of parameters, or of modules for all that they hold; by default all that are trainable.

    Attributes:
        chosen: the parameters by name; tied ones once.
        constants: the trainable ones that were not chosen.
        slices: where each lies in w.
        size: P.
        dtype, device: those of the parameters.

    Raises:
        ValueError: if no parameter is chosen or a name is unknown; if the parameters are not all float32 or all
            float64, on one device and initialised.
    """

    def __init__(self, model: nn.Module, parameters: Iterable[str] | None = None) -> None:
        every = dict(model.named_parameters())
        if parameters is None:
            self.chosen = {name: p for name, p in every.items() if p.requires_grad}
        else:
            wanted = _named(model, parameters)
            self.chosen = {name: p for name, p in every.items() if id(p) in wanted}
        if not self.chosen:
            raise ValueError(
                f"no parameter to differentiate by: of the model's {len(every)} none is trainable, or none was chosen"
            )
        self.constants = {name: p for name, p in every.items() if p.requires_grad and name not in self.chosen}
        self.dtype, self.device = _checked(self.chosen)
        self.shapes = [p.shape for p in self.chosen.values()]
        self.sizes = [p.numel() for p in self.chosen.values()]
        self.slices: dict[str, slice] = {}
        self.size = 0
        for name, size in zip(self.chosen, self.sizes, strict=True):
            self.slices[name] = slice(self.size, self.size + size)
            self.size += size

    def join(self) -> Tensor:
        """The parameters as they are, (P,)."""
        return torch.cat([p.detach().reshape(-1) for p in self.chosen.values()])

    def split(self, params: Tensor) -> dict[str, Tensor]:
        """Views of w (P,) as the chosen parameters, by name; and the constants."""
        parts = params.split(self.sizes)
        weights = {n: p.view(s) for n, p, s in zip(self.chosen, parts, self.shapes, strict=True)}
        weights.update({name: p.detach() for name, p in self.constants.items()})
        return weights


def _named(model: nn.Module, names: Iterable[str]) -> set[int]:
    """Identities of the parameters that are named, or lie in a module that is; a tied one has several names."""
    names = [names] if isinstance(names, str) else list(names)
    every = dict(model.named_parameters(remove_duplicate=False))
    found = {name: [p for n, p in every.items() if n == name or n.startswith(f"{name}.")] for name in names}
    if unknown := [name for name, parameters in found.items() if not parameters]:
        raise ValueError(f"no parameters named {', '.join(map(repr, unknown))}; the model has {', '.join(every)}")
    return {id(p) for parameters in found.values() for p in parameters}


def _checked(chosen: dict[str, nn.Parameter]) -> tuple[torch.dtype, torch.device]:
    for name, p in chosen.items():
        if isinstance(p, UninitializedParameter):
            raise ValueError(f"parameter {name!r} has no values yet; run the model once on an example first")
        if p.dtype not in PRECISE:
            raise ValueError(
                f"parameter {name!r} is {p.dtype}; derivatives are taken in float32 or float64. If a model is in half "
                "precision, pass a copy, copy.deepcopy(model).float(), with inputs in the same precision"
            )
    kinds = {(p.dtype, p.device) for p in chosen.values()}
    if len(kinds) > 1:
        found = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
        raise ValueError(f"the parameters make one vector, so they must share dtype and device, but are {found}")
    return kinds.pop()
