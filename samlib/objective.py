"""A module, a loss and a data set seen as one function of a flat parameter vector."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from .layers import plain

__all__ = ["Kernel", "Objective", "compiled_kernel", "flatten_parameters", "pure_loss"]

Loss = Callable[[Tensor, Tensor], Tensor]
Kernel = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def flatten_parameters(model: nn.Module) -> Tensor:
    """All parameters of a module as one vector (P,), in the order of ``model.parameters()``."""
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def pure_loss(model: nn.Module, loss: Loss) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The mean loss of some examples as a function (params, inputs, targets) → () for the transforms of ``torch.func``.

    A copy of the module is used, made of PyTorch's own operations only: those can be transformed and compiled.
    """
    forward = _functional(plain(copy.deepcopy(model)))
    return lambda params, inputs, targets: loss(forward(params, inputs), targets)


def compiled_kernel(model: nn.Module, loss: Loss, cuda_graph: bool = False) -> Kernel:
    """Gradient and value of the mean loss of some examples, (params, inputs, targets) → ((P,), ()), as one program.

    It saves passes over memory and Python's time, and gives the plain gradient up to rounding. The first call for a
    shape compiles, for half a minute or so, so it pays for long runs.

    Args:
        model: the module; a copy is compiled.
        loss: as for :class:`Objective`.
        cuda_graph: let a GPU launch the whole program at once. What it returned is overwritten by the next call.
    """
    kernel = torch.compile(
        torch.func.grad_and_value(pure_loss(model, loss)),
        fullgraph=True,
        dynamic=False,
        mode="reduce-overhead" if cuda_graph else "default",
    )

    def run(params: Tensor, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        torch.compiler.cudagraph_mark_step_begin()
        return kernel(params, inputs, targets)

    return run


def _functional(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """A module's outputs as a function of all its parameters as one vector (P,), and of the inputs."""
    names = [name for name, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]
    sizes = [p.numel() for p in model.parameters()]

    def forward(params: Tensor, inputs: Tensor) -> Tensor:
        weights = {n: p.view(s) for n, p, s in zip(names, params.split(sizes), shapes, strict=True)}
        return torch.func.functional_call(model, weights, (inputs,))

    return forward


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
        kernel: what computes the gradient of a chunk, see :func:`compiled_kernel`; by default autograd, as it comes.
            Hessian–vector products do not use it.

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
        kernel: Kernel | None = None,
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
        self.kernel = kernel
        self._forward = _functional(model)
        self.size = sum(p.numel() for p in model.parameters())
        """P, the number of parameters."""

    def forward(self, params: Tensor, inputs: Tensor) -> Tensor:
        """The model's outputs at parameters (P,)."""
        return self._forward(params, inputs)

    def chunk_losses(self, params: Tensor) -> Iterator[Tensor]:
        """Each chunk's contribution to ℓ(w), one at a time; they add up to ℓ(w)."""
        for x, y, share in self._chunks():
            yield self.loss(self.forward(params, x), y) * share

    def _chunks(self) -> Iterator[tuple[Tensor, Tensor, float]]:
        """Inputs, targets and share of the examples of each chunk."""
        chunks = zip(self.inputs.split(self.chunk_size), self.targets.split(self.chunk_size), strict=True)
        for x, y in chunks:
            yield x, y, len(x) / len(self.inputs)

    @torch.no_grad()
    def value(self, params: Tensor) -> Tensor:
        """ℓ(w), a scalar tensor."""
        return torch.stack(list(self.chunk_losses(params))).sum()

    def value_and_gradient(self, params: Tensor) -> tuple[Tensor, Tensor]:
        """ℓ(w) and ∇ℓ(w), shapes () and (P,)."""
        w = params.detach().requires_grad_()
        value, gradient = torch.zeros((), dtype=w.dtype, device=w.device), torch.zeros_like(w)
        if self.kernel:
            for x, y, share in self._chunks():
                part, mean = self.kernel(params.detach(), x, y)
                gradient.add_(part, alpha=share)
                value.add_(mean, alpha=share)
            return value, gradient
        for loss in self.chunk_losses(w):
            gradient += torch.autograd.grad(loss, w)[0]
            value += loss.detach()
        return value, gradient

    def gradient(self, params: Tensor) -> Tensor:
        """∇ℓ(w), shape (P,)."""
        return self.value_and_gradient(params)[1]
