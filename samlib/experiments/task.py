"""A configuration made concrete: model and data on their device, and the objectives of each step."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils import deterministic

from ..datasets import Dataset
from ..objective import Kernel, Objective, compiled_kernel, flatten_parameters
from . import of_run
from .training_mode import TrainingMode, changes_with_mode

if TYPE_CHECKING:
    from ..config import RunConfig

__all__ = ["Task", "exact_on_cuda"]

_RETAIN = 20_000  # most examples whose gradient graph is kept between Hessian–vector products
_KERNELS: dict[tuple[object, ...], Kernel] = {}  # compiled ones of this process: the runs of a grid share theirs


def exact_on_cuda() -> None:
    """For this process: full float32, and the same bits every time where PyTorch can; it warns where it cannot."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs for that
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a debugging aid that costs time


class Task:
    """An experiment at one configuration.

    What the steps descend (:meth:`descended`) and what is measured (:meth:`measured`) are two things: the first is in
    training mode, and its buffers are part of the run's state; the second is in evaluation mode, a function of w. For
    networks that know no such difference they are the same object.

    Args:
        config: the run.
        dataset: its data, by default those that the configuration asks for.

    Attributes:
        model: in evaluation mode.
        training: what training mode adds, or None where it adds nothing.
    """

    def __init__(self, config: RunConfig, dataset: Dataset | None = None) -> None:
        self.config, self.experiment = config, of_run(config)
        self.dataset = dataset = dataset or config.load_dataset()
        if config.device == "cuda":
            exact_on_cuda()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = self.experiment.model(config, dataset)
        model = model.to(config.device, getattr(torch, config.dtype))
        self.model: nn.Module = model.eval()
        self.loss = self.experiment.loss(config)
        self._train = self.move(dataset.train_inputs), self.move(dataset.train_targets)
        self.examples = len(pytree.tree_leaves(self._train[0])[0])
        self._epoch, self._order = -1, torch.empty(0)
        self._whole: Objective | None = None
        some = self._select(slice(0, min(16, self.examples)))
        trained = copy.deepcopy(model).train()
        differs = changes_with_mode(trained, self.model, self.loss, *some)
        self.training = TrainingMode(trained, self.loss, config.seed) if differs else None

    def move(self, part: Any) -> Any:
        """Examples as the network takes them: on its device and in its precision."""

        def move(tensor: Tensor) -> Tensor:
            dtype = getattr(torch, self.config.dtype) if tensor.is_floating_point() else tensor.dtype
            # Max-pooling is an order of magnitude faster on a CPU with the channels last.
            images = tensor.dim() == 4 and self.config.device == "cpu"
            layout = torch.channels_last if images else torch.preserve_format
            return tensor.to(self.config.device, dtype, memory_format=layout)

        return pytree.tree_map(move, part)

    def _select(self, which: Any) -> tuple[Any, Any]:
        return _rows(self._train[0], which), _rows(self._train[1], which)

    def _objective(self, inputs: Any, targets: Any, *, kernel: Kernel | None = None, check: bool = False) -> Objective:
        gpu = self.config.device == "cuda"
        limits: Any = {} if gpu else {"chunk_size": self.experiment.chunk}
        keep = gpu or len(pytree.tree_leaves(inputs)[0]) <= _RETAIN
        options = {"retain_graph": keep, "kernel": kernel, "check": check, **limits}
        return Objective(self.model, self.loss, inputs, targets, **options)

    def _kernel(self) -> Kernel | None:
        if not self.config.compiled:
            return None
        own = tuple(getattr(self.config, name) for name in self.experiment.settings.model_fields)
        shapes = tuple(t.shape[1:] for t in pytree.tree_leaves(self._train[0]))
        key = (self.config.experiment, own, self.config.dtype, self.config.device, shapes)
        if key not in _KERNELS:
            _KERNELS[key] = compiled_kernel(self.model, self.loss, cuda_graph=self.config.device == "cuda")
        return _KERNELS[key]

    def initial_parameters(self) -> Tensor:
        """w at step 0, shape (P,)."""
        return flatten_parameters(self.model)

    def everything(self) -> Objective:
        """The loss over the whole training set."""
        if self._whole is None:
            kernel = self._kernel() if self.config.batch_size is None else None
            # The one objective of a run that is looked at, where the experiment is a reader's own.
            self._whole = self._objective(*self._train, kernel=kernel, check=bool(self.experiment.source))
        return self._whole

    def objective(self, step: int) -> Objective:
        """The loss that a step is about, in evaluation mode: of the full batch, or of the step's mini-batch.

        Mini-batches run through a fresh permutation of the training set in each epoch. They are a function of seed
        and step alone, so that the step is all the sampler's state a checkpoint needs.
        """
        if self.config.batch_size is None:
            return self.everything()
        return self._objective(*self._select(self._batch(step)), kernel=self._kernel())

    @property
    def epoch(self) -> int:
        """Steps in which all examples are seen once."""
        return self.examples // (self.config.batch_size or self.examples)

    def _batch(self, step: int) -> Tensor:
        size = self.config.batch_size
        assert size is not None
        epoch, position = divmod(step, self.epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + epoch)
            order = torch.randperm(self.examples, generator=generator)
            self._epoch, self._order = epoch, order.to(self.config.device)  # once: a copy waits for the device
        return self._order[position * size : (position + 1) * size]

    def measured(self, step: int, objective: Objective | None = None) -> Objective:
        """The loss whose Hessian is measured at a step: that of :meth:`objective`, or over all examples."""
        return self.everything() if self.config.measure_on == "all" else objective or self.objective(step)

    def sync(self) -> None:
        """Let the network in evaluation mode have the buffers that training has moved."""
        if self.training:
            for name, buffer in self.model.named_buffers():
                buffer.copy_(self.training.buffers[name])

    def evaluation_objective(self) -> Objective | None:
        """With mini-batches that are measured, a fixed larger batch: the first four batches' worth of training
        examples; else None."""
        if self.config.batch_size is None or self.config.measure_on == "all":
            return None
        size = min(4 * self.config.batch_size, self.examples)
        return self._objective(*self._select(slice(0, size)))

    @torch.no_grad()
    def test_metric(self, params: Tensor) -> float:
        """The experiment's test metric at parameters (P,)."""
        return self.experiment.metric(self.config)(self._test_chunks(params))

    def _test_chunks(self, params: Tensor) -> Iterator[tuple[Any, Any]]:
        forward = self.everything().forward
        inputs, targets = self.dataset.test_inputs, self.dataset.test_targets
        for start in range(0, len(pytree.tree_leaves(targets)[0]), 250):
            chosen = slice(start, start + 250)
            yield forward(params, self.move(_rows(inputs, chosen))), self.move(_rows(targets, chosen))


def _rows(part: Any, which: Any) -> Any:
    """The chosen examples of a tensor, or of each tensor in a tuple or dictionary."""
    return pytree.tree_map(lambda tensor: tensor[which], part)
