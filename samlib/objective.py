"""A module, a loss and a data set seen as one function of a flat parameter vector."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

__all__ = ["Objective", "flatten_parameters"]

Loss = Callable[[Tensor, Tensor], Tensor]


def flatten_parameters(model: nn.Module) -> Tensor:
    """All parameters of a module as one vector (P,), in the order of ``model.parameters()``."""
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


class Objective:
    """ℓ(w): the mean loss of a module over a fixed set of examples, as a pure function of w, shape (P,).

    Value, gradient and Hessian–vector products are exact; examples are processed in chunks, whose mean losses are
    added with their share of the examples, so that the activations of one chunk bound the memory.

    Args:
        model: the module. Its own parameters are never used or changed.
        loss: maps outputs and targets of a chunk to its *mean* loss (a scalar).
        inputs: shape (N, …).
        targets: shape (N, …).
        chunk_size: examples per chunk; all at once by default.
        retain_graph: keep the gradient's graph between Hessian–vector products of one operator (twice as fast;
            memory grows with N). Turn it off where N is large: each product then rebuilds the graph chunk by chunk.

    Raises:
        ValueError: if the model holds BatchNorm or dropout in training mode, whose value is not a function of w;
            or if there are no examples, or not as many inputs as targets.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        inputs: Tensor,
        targets: Tensor,
        *,
        chunk_size: int | None = None,
        retain_graph: bool = True,
    ) -> None:
        for name, module in model.named_modules():
            stochastic = isinstance(module, nn.modules.batchnorm._BatchNorm | nn.modules.dropout._DropoutNd)
            if isinstance(module, nn.RNNBase | nn.MultiheadAttention):
                stochastic = module.dropout > 0
            if stochastic and module.training:
                raise ValueError(
                    f"module {name!r} ({type(module).__name__}) is in training mode, so the loss is not a function of "
                    "the parameters; call model.eval() first"
                )
        if len(inputs) == 0 or len(inputs) != len(targets):
            raise ValueError(f"need as many targets as inputs and at least one, got {len(inputs)} and {len(targets)}")
        self.model, self.loss = model, loss
        self.inputs, self.targets = inputs, targets
        self.chunk_size = chunk_size or len(inputs)
        self.retain_graph = retain_graph
        self._names = [name for name, _ in model.named_parameters()]
        self._shapes = [p.shape for p in model.parameters()]
        self._sizes = [p.numel() for p in model.parameters()]
        self.size = sum(self._sizes)
        """P, the number of parameters."""

    def forward(self, params: Tensor, inputs: Tensor) -> Tensor:
        """The model's outputs at parameters (P,)."""
        pieces = params.split(self._sizes)
        weights = {n: p.view(s) for n, p, s in zip(self._names, pieces, self._shapes, strict=True)}
        return torch.func.functional_call(self.model, weights, (inputs,))

    def chunk_losses(self, params: Tensor) -> Iterator[Tensor]:
        """Each chunk's contribution to ℓ(w), one at a time; they add up to ℓ(w)."""
        chunks = zip(self.inputs.split(self.chunk_size), self.targets.split(self.chunk_size), strict=True)
        for x, y in chunks:
            yield self.loss(self.forward(params, x), y) * (len(x) / len(self.inputs))

    @torch.no_grad()
    def value(self, params: Tensor) -> Tensor:
        """ℓ(w), a scalar tensor."""
        return torch.stack(list(self.chunk_losses(params))).sum()

    def value_and_gradient(self, params: Tensor) -> tuple[Tensor, Tensor]:
        """ℓ(w) and ∇ℓ(w), shapes () and (P,)."""
        w = params.detach().requires_grad_()
        value, gradient = torch.zeros((), dtype=w.dtype, device=w.device), torch.zeros_like(w)
        for loss in self.chunk_losses(w):
            gradient += torch.autograd.grad(loss, w)[0]
            value += loss.detach()
        return value, gradient

    def gradient(self, params: Tensor) -> Tensor:
        """∇ℓ(w), shape (P,)."""
        return self.value_and_gradient(params)[1]
