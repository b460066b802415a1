"""A module, a loss and a data set seen as one function of a flat parameter vector."""

from __future__ import annotations

import codecs
import copy
import locale
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..layers import plain
from .batches import Chunk, Chunks, apply, arguments
from .checks import examine
from .isolation import isolated, leaf
from .parameters import Layout, flatten_parameters

__all__ = ["Kernel", "Objective", "compiled_kernel", "flatten_parameters", "pure_loss"]

Loss = Callable[[Any, Any], Tensor]
Kernel = Callable[[Tensor, Any, Any], tuple[Tensor, Tensor]]
T = TypeVar("T")


class Objective:
    """ℓ(w): the loss of a module over a fixed set of examples, as a pure function of its trainable parameters w, (P,).

    Value, gradient and Hessian–vector products are exact, in the modes (training or evaluation) that the modules have
    at construction; examples are processed in chunks, whose mean losses are
    added with their share of the examples, so that the activations of one chunk bound the memory. They do not depend
    on what surrounds the call (autocast, ``no_grad``, ``inference_mode``), and attention takes its mathematical form,
    the only one with a second derivative.

    Args:
        model: the module. Its own parameters are never used or changed. Frozen ones are constants.
        loss: maps outputs and targets of a chunk to its *mean* loss (a scalar). A mean of another kind (class weights,
            ignored targets) or a sum is noticed by the check, and the chunks are weighted so that ℓ is the loss of all
            examples together. It may use ``model``'s parameters, looked up when it is called.
        inputs: shape (N, …): a tensor or an array; or a tuple, list or dict of them, which the module takes as
            positions or keywords where its ``forward`` can. Or, without targets, an iterable of pairs (inputs,
            targets), such as a loader, that gives the same batches on each pass; it is read anew by each evaluation.
        targets: shape (N, …), likewise.
        chunk_size: examples per chunk; all (or a batch) at once by default.
        retain_graph: keep the gradient's graph between Hessian–vector products of one operator (twice as fast;
            memory grows with N). Turn it off where N is large: each product then rebuilds the graph chunk by chunk.
            By default on for tensors and off for batches.
        kernel: what computes the gradient of a chunk, see :func:`compiled_kernel`; by default autograd, as it comes.
            Hessian–vector products do not use it.
        parameters: names of the parameters to differentiate by, or of modules that hold them: one block of the
            Hessian. All trainable ones by default.
        check: see once, at the price of at most two evaluations, whether the loss is what it is taken for: a function
            of w that adds up over chunks; see :func:`samlib.checks.examine`.

    Attributes:
        size: P, the number of parameters.
        slices: where each parameter lies in w, by name.

    Raises:
        TypeError: if the examples are of another kind, or can be read only once.
        ValueError: if a check fails; if there are no examples, or not as many inputs as targets; if parameters are
            complex or of half precision, or none is trainable.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        inputs: Any,
        targets: Any = None,
        *,
        chunk_size: int | None = None,
        retain_graph: bool | None = None,
        kernel: Kernel | None = None,
        parameters: Iterable[str] | None = None,
        check: bool = True,
    ) -> None:
        self.model = getattr(model, "_orig_mod", model)  # compiled modules have no second derivative
        if not isinstance(self.model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        self.loss, self.kernel = loss, kernel
        self.layout = Layout(self.model, parameters)
        self.size, self.slices = self.layout.size, self.layout.slices
        with isolated(self.layout.device):
            self.data = Chunks(inputs, targets, chunk_size, self.layout.dtype, self.layout.device)
        self.retain_graph = not self.data.streamed if retain_graph is None else retain_graph
        self._carrier = _Carrier(self.model)
        self._modes = [(module, module.training) for module in self.model.modules()]
        self._shares: list[float] | None = None
        self.unseen = check  # whether the second derivative has yet to be looked at
        if check:
            self._shares = examine(self)
        elif self.data.streamed:
            self.data.total = sum(chunk.size for chunk in self.data)

    @property
    def inputs(self) -> Any:
        """The inputs of all examples, where they are no batches."""
        return self._all.inputs

    @property
    def targets(self) -> Any:
        """The targets of all examples, where they are no batches."""
        return self._all.targets

    @property
    def _all(self) -> Chunk:
        if self.data.streamed:
            raise AttributeError("the examples come in batches; iterate over objective.data")
        return next(iter(self.data.batches))

    @property
    def chunk_size(self) -> int | None:
        """Examples per chunk."""
        return self.data.chunk_size or (None if self.data.streamed else self.data.total)

    def within(self, params: Tensor, function: Callable[[], T], fixed: Mapping[str, Tensor] | None = None) -> T:
        """What a function returns while the module's parameters are w (P,), isolated from the caller's context.

        All that computes with the loss runs in here, derivatives too: activation checkpointing evaluates modules
        again during a backward pass.

        Args:
            params: w, shape (P,).
            function: what is computed.
            fixed: values of other parameters and buffers, by name, where they are not to be those of the module.
        """
        params = self.checked(params)
        with isolated(self.layout.device, self.data.streamed):
            return self.replacing({**self.layout.split(params), **(fixed or {})}, function)

    def checked(self, params: Tensor, numbers: bool = False) -> Tensor:
        """The parameters, if they are a vector (P,) that can be used as w.

        Args:
            params: w.
            numbers: whether what is computed has no graph, so that nothing can be differentiated by w.

        Raises:
            TypeError: if they are no tensor, or one of ``torch.func`` where there is no graph.
            ValueError: if they have another shape, or another type than the module's own.
        """
        gives = "flatten_parameters(model, parameters) gives one"
        if not isinstance(params, Tensor):
            raise TypeError(f"params must be a vector, a tensor (P,), got {type(params).__name__}; {gives}")
        if numbers and torch._C._functorch.is_functorch_wrapped_tensor(params):
            raise TypeError(
                "an objective cannot be differentiated or mapped by torch.func: its values and gradients are numbers. "
                "Use gradient, HessianOperator, or samlib.objective.pure_loss(model, loss)"
            )
        if params.shape != (self.size,) or params.dtype != self.layout.dtype:
            raise ValueError(
                f"params must be a vector of {self.size} numbers in {str(self.layout.dtype).removeprefix('torch.')} as "
                f"the module's, got {params.dtype} of shape {tuple(params.shape)}; {gives}"
            )
        return params

    def replacing(self, tensors: dict[str, Tensor], function: Callable[[], T]) -> T:
        """What a function returns while parameters or buffers of the module are replaced."""
        with self._as_constructed():
            return torch.func.functional_call(self._carrier, {f"model.{n}": t for n, t in tensors.items()}, (function,))

    @contextmanager
    def _as_constructed(self) -> Iterator[None]:
        """Modules have the modes of the construction; tensors that they keep beside parameters and buffers (made of the
        weights by a hook, or once per evaluation) are put back, or they would outlive the weights."""
        changed = [module for module, training in self._modes if module.training != training]
        kept = [
            (vars(module), {n: v for n, v in vars(module).items() if v is None or isinstance(v, Tensor)})
            for module, _ in self._modes
            if module._forward_pre_hooks or not type(module).__module__.startswith("torch.nn.")
        ]
        try:
            for module in changed:
                module.training = not module.training
            yield
        finally:
            for module in changed:
                module.training = not module.training
            for now, before in kept:
                for name in [n for n, v in now.items() if isinstance(v, Tensor)]:
                    if name in before:
                        now[name] = before[name]
                    else:
                        del now[name]

    def forward(self, params: Tensor, inputs: Any) -> Any:
        """The model's outputs at parameters (P,)."""
        return self.within(params, lambda: apply(self.model, inputs))

    def chunk_loss(self, params: Tensor, chunk: Chunk) -> Tensor:
        """The loss of some examples."""
        return self.within(params, lambda: self.loss(apply(self.model, chunk.inputs), chunk.targets))

    def chunk_losses(self, params: Tensor | None = None) -> Iterator[Tensor]:
        """Each chunk's contribution to ℓ(w), one at a time; they add up to ℓ(w).

        Args:
            params: w, shape (P,). None inside of :meth:`within`, where it is given already; there modules with
                activation checkpointing are right, too.
        """
        for chunk, share in self.weighted_chunks():
            if params is None:
                yield self.loss(apply(self.model, chunk.inputs), chunk.targets) * share
            else:
                yield self.chunk_loss(params, chunk) * share

    def weighted_chunks(self) -> Iterator[tuple[Chunk, float]]:
        """The examples chunk by chunk, each with its share of the whole loss; those without one are left out."""
        assert self.data.total is not None
        for i, chunk in enumerate(self.data):
            share = chunk.size / self.data.total if self._shares is None else self._shares[i]
            if share:
                yield chunk, share

    def value(self, params: Tensor) -> Tensor:
        """ℓ(w), a scalar tensor without a graph."""

        @torch.no_grad()
        def total() -> Tensor:
            value = torch.zeros((), dtype=params.dtype, device=params.device)
            for loss in self.chunk_losses():
                value += loss
            return value

        return self.within(self.checked(params, numbers=True), total)

    def value_and_gradient(self, params: Tensor) -> tuple[Tensor, Tensor]:
        """ℓ(w) and ∇ℓ(w), shapes () and (P,)."""
        w = leaf(self.checked(params, numbers=True))

        def accumulate() -> tuple[Tensor, Tensor]:
            value, gradient = torch.zeros((), dtype=w.dtype, device=w.device), None
            for loss in self.chunk_losses():
                (part,) = torch.autograd.grad(loss, w)
                gradient = part if gradient is None else gradient + part
                value += loss.detach()
            return value, torch.zeros_like(w) if gradient is None else gradient

        return self._by_kernel(self.kernel, w.detach()) if self.kernel else self.within(w, accumulate)

    def _by_kernel(self, kernel: Kernel, params: Tensor) -> tuple[Tensor, Tensor]:
        with isolated(self.layout.device, self.data.streamed):
            value, gradient = torch.zeros((), dtype=params.dtype, device=params.device), None
            for chunk, share in self.weighted_chunks():
                # Copied: a CUDA graph writes its next result to the same place.
                part, mean = kernel(params, chunk.inputs, chunk.targets)
                gradient = part * share if gradient is None else gradient.add_(part, alpha=share)
                value.add_(mean, alpha=share)
        return value, torch.zeros_like(params) if gradient is None else gradient

    def gradient(self, params: Tensor) -> Tensor:
        """∇ℓ(w), shape (P,)."""
        return self.value_and_gradient(params)[1]


class _Carrier(nn.Module):
    """Lets ``torch.func.functional_call`` run any function while a module's parameters are replaced."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[], T]) -> T:
        return function()


def pure_loss(
    model: nn.Module, loss: Loss, parameters: Iterable[str] | None = None
) -> Callable[[Tensor, Any, Any], Tensor]:
    """The mean loss of some examples as a function (params, inputs, targets) → () for the transforms of ``torch.func``.

    A copy of the module is used, made of PyTorch's own operations only: those can be transformed and compiled.
    """
    module = plain(copy.deepcopy(model))
    layout = Layout(module, parameters)

    def value(params: Tensor, inputs: Any, targets: Any) -> Tensor:
        outputs = torch.func.functional_call(module, layout.split(params), *arguments(module, inputs))
        return loss(outputs, targets)

    return value


def compiler_unread() -> str | None:
    """The locale's encoding, if PyTorch's compiler, which reads its own files in it, cannot; else None."""
    encoding = "utf-8" if sys.flags.utf8_mode else locale.getencoding()
    return encoding if codecs.lookup(encoding).name == "ascii" else None


def compiled_kernel(
    model: nn.Module, loss: Loss, cuda_graph: bool = False, parameters: Iterable[str] | None = None
) -> Kernel:
    """Gradient and value of the mean loss of some examples, (params, inputs, targets) → ((P,), ()), as one program.

    It saves passes over memory and Python's time, and gives the plain gradient up to rounding. The first call for a
    shape compiles, for half a minute or so, so it pays for long runs.

    Args:
        model: the module; a copy is compiled.
        loss: as for :class:`Objective`, except that it may not use the module's parameters.
        cuda_graph: let a GPU launch the whole program at once. What it returned is overwritten by the next call.
        parameters: as for :class:`Objective`.

    Raises:
        RuntimeError: in a locale of ASCII alone, in which PyTorch's compiler cannot read its own files.
    """
    if encoding := compiler_unread():
        raise RuntimeError(
            f"the locale's encoding is {encoding}, in which PyTorch's compiler cannot read its own files; set "
            "PYTHONUTF8=1, or do without the compiler (compiled=False)"
        )
    kernel = torch.compile(
        torch.func.grad_and_value(pure_loss(model, loss, parameters)),
        fullgraph=True,
        dynamic=False,
        mode="reduce-overhead" if cuda_graph else "default",
    )

    def run(params: Tensor, inputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
        torch.compiler.cudagraph_mark_step_begin()
        return kernel(params, inputs, targets)

    return run
