"""Is a training at the edge of stability? The edge of somebody's own optimizer, for their model, as they train it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .cached_law import cached_law
from .edge_row import EdgeRow, Solver, both_ends
from .eigen import EigenResult, LowRank
from .hessian import HessianOperator
from .lanczos import lanczos_ends
from .laws import EdgeLaw, edge_law
from .objective import Loss, Objective
from .objective.isolation import isolated, undisturbed
from .objective.parameters import Layout
from .optim import DIRECTION, SAM, uphill
from .optim.precision import norm
from .processes import Processes, SharedHessian

__all__ = ["EdgeMonitor", "Row"]

EDGES = ("gd_edge", "sam_edge", "edge", "edge_ratio")

# Beyond so many parameters memory counts: how many vectors the solver keeps, and examples at a time, by default.
LARGE, FEW, CHUNK = 3_000_000, 4, 32


class Row(dict[str, float]):
    """A measurement: numbers by name, which loggers take as they are.

    An edge that is not known is not among the keys, and ``row["edge"]`` and ``row["edge_ratio"]`` are then None.

    Attributes:
        law: what the optimizer is, as "SAM with momentum 0.9".
        reason: why its edge is not known; empty if it is.
    """

    law: str = ""
    reason: str = ""

    def __missing__(self, name: str) -> None:
        if name not in EDGES:
            raise KeyError(name)


class EdgeMonitor:
    """Measures sharpness, and the edge of stability that the optimizer sets it, during one's own training.

    Learning rate, momentum, weight decay, SAM's ρ and Adam's preconditioner are read from the optimizer at each
    measurement, see :func:`samlib.edge_law`. Model, gradients, optimizer, modes, running statistics and random numbers
    stay exactly as they are, so that a training is the same with and without. Derivatives are taken in the parameters'
    precision, float32 or float64, also where the training computes in another (autocast).

    Args:
        model: the module in training; one that is compiled, or wrapped for several processes, is seen through.
        loss: maps the model's outputs and the targets to the mean loss of a batch; of a dict it picks what counts.
        data: the examples to measure on: a pair (inputs, targets); or batches, a list of such pairs or a loader that
            gives the same examples on each pass.
        optimizer: what trains the model.
        parameters: names of parameters, or of modules that hold them: their block of the Hessian; by default all that
            are trainable.
        evaluation: measure in evaluation mode, and restore the modes. If false, the model is measured as it is, and
            refused if that is random, with dropout or BatchNorm in training mode.
        eigenvalues: how many of the largest.
        tol: bound on residuals, relative to the operator norm.
        chunk_size: examples at a time, which bounds the memory; by default all of a pair, or a batch, and at most 32
            for more than three million parameters.
        retain_graph: keep the gradient's graph between products: half the time, in memory that grows with the
            examples. By default for a pair of at most three million parameters.
        max_basis: let the solver keep one vector more than this, at least ``eigenvalues + 3``, rather than 80: less
            memory, more products. By default 4 for more than three million parameters.
        group: of ``torch.distributed``, ``torch.distributed.group.WORLD`` say: all its processes construct a monitor
            and measure at the same time, each with its own share of the examples, and all get the same row.

    Attributes:
        law: of the last measurement.
        eigen: the eigenpairs of the last measurement, the largest first and the smallest last.

    Raises:
        ValueError: as :class:`samlib.Objective`: for a loss that is random, not finite or no scalar, for data that
            differ from pass to pass, or without examples.
        TypeError: if the optimizer or the data are of another kind.

    >>> model = nn.Linear(2, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    >>> data = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.ones(2, 1)
    >>> row = EdgeMonitor(model, nn.functional.mse_loss, data, optimizer).measure()
    >>> round(row["sharpness"], 2), round(row["edge"], 2), row.law
    (5.3, 38.0, 'gradient descent with momentum 0.9')
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        data: Any,
        optimizer: Optimizer,
        *,
        parameters: Iterable[str] | None = None,
        evaluation: bool = True,
        eigenvalues: int = 1,
        tol: float = 3e-3,
        chunk_size: int | None = None,
        retain_graph: bool | None = None,
        max_basis: int | None = None,
        group: Any = None,
    ) -> None:
        if not isinstance(eigenvalues, int) or eigenvalues < 1:
            raise ValueError(f"eigenvalues must be a whole number, at least 1, got {eigenvalues!r}")
        if not tol > 0:
            raise ValueError(f"tol must be positive, got {tol!r}")
        if max_basis is not None and max_basis < eigenvalues + 3:
            raise ValueError(f"max_basis must be at least eigenvalues + 3 = {eigenvalues + 3}, got {max_basis}")
        edge_law(optimizer)  # refuses what is none
        own = {id(p) for p in model.parameters()}
        if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
            raise ValueError("the optimizer moves none of the model's parameters; pass the one that trains this model")
        self.model, self.optimizer, self.evaluation = _unwrapped(model), optimizer, evaluation
        self.eigenvalues, self.tol, self.max_basis = eigenvalues, tol, max_basis
        self.law = EdgeLaw("", reason="nothing has been measured yet")
        self.eigen: EigenResult | None = None
        self._parameters = [parameters] if isinstance(parameters, str) else parameters and list(parameters)
        self._data, self._chunk, self._retain = _pair(data), chunk_size, retain_graph
        self._make: Callable[..., Objective] = partial(Objective, self.model, loss, *self._data)
        self._processes = None if group is None else Processes(group)
        self._memory: dict[str, Any] = {}
        self._built_for: Any = None
        self._calls = 0
        with undisturbed(self.model, self._data[0], self.evaluation):
            self._build()

    def measure(self) -> Row:
        """Look at the weights as they are now.

        Returns:
            The columns of :meth:`samlib.edge_row.EdgeRow.measure`, without edges that are not known, and
            ``sharpness`` λ_max with ``sharpness_residual``, within which an eigenvalue lies.

        Raises:
            RuntimeError: between ``first_step`` and ``second_step`` of SAM; if another process failed.
            FloatingPointError: if the gradient or the Hessian is not finite, as after a divergence.
            ValueError: as the constructor, if the model has changed.
        """
        if getattr(self.optimizer, "perturbed", False):
            raise RuntimeError(
                "the weights are at SAM's perturbed point: measure before first_step or after second_step"
            )
        with undisturbed(self.model, self._data[0], self.evaluation), isolated(self._objective.layout.device):
            self._build()
            self._calls += 1
            self.eigen = None  # not both at a time
            return self._measure()

    def _build(self) -> None:
        """The objective; a new one where the model has other parameters or, measured as it is, other modes."""
        modes = () if self.evaluation else tuple(m.training for m in self.model.modules())
        named = [(n, id(p), p.requires_grad, p.dtype, p.device) for n, p in self.model.named_parameters()]
        if self._built_for == (modes, named):
            return
        self._memory.clear()
        size = Layout(self.model, self._parameters).size
        if self.eigenvalues > size:
            raise ValueError(
                f"eigenvalues must be at most the {size} parameters that there are, got {self.eigenvalues}"
            )
        self._large = size > LARGE
        memory: dict[str, Any] = {"chunk_size": self._chunk, "retain_graph": self._retain}
        if self._large:
            memory = {"chunk_size": self._chunk or CHUNK, "retain_graph": bool(self._retain)}
        self._objective = self._together(lambda: self._make(parameters=self._parameters, **memory))
        self._whole = self._objective
        if self._parameters and isinstance(self.optimizer, SAM):  # which perturbs the others too
            self._whole = self._together(lambda: self._make(**memory))
        self._share = self._processes.share(self._objective) if self._processes else 1.0
        self._built_for = modes, named

    def _measure(self) -> Row:
        hessian = self._hessian()
        law = self.law = self._read_law()
        descent, grad_norm = hessian.gradient, None
        if isinstance(self.optimizer, SAM):
            descent, grad_norm = self._uphill(hessian)
        rate, rho = _common(self.optimizer, "lr"), math.nan
        if isinstance(self.optimizer, SAM) and law.normalize and not law.reason and not hasattr(law, "every"):
            rho = _common(self.optimizer, "rho")
        row = EdgeRow(
            law,
            rate if 0 < rate < math.inf else math.nan,
            rho,
            self.eigenvalues,
            self.tol,
            lambda: torch.Generator().manual_seed(self._calls),
            self._memory,
            self._solver(),
        )

        def solve(operator: Any) -> tuple[Row, EigenResult]:
            found = row.measure(operator, descent, grad_norm)
            eigen = row.eigen
            assert eigen is not None
            found |= {"sharpness": found["eigenvalue_1"], "sharpness_residual": float(eigen.residuals[0])}
            return Row({n: v for n, v in found.items() if n not in EDGES or not math.isnan(v)}), eigen

        if self._processes and isinstance(hessian, SharedHessian):
            numbers, self.eigen = self._processes.lead(hessian, lambda operator: _to_tell(*solve(operator)))
        else:
            numbers, self.eigen = solve(hessian)
        if row.solve is not both_ends:  # one vector to start from, in place of those that the caller may drop
            self._memory = {
                name: (_blend(vectors, values, self.eigenvalues), values[:1])
                for name, (vectors, values) in self._memory.items()
            }
        numbers.law, numbers.reason = law.name, law.reason
        return numbers

    def _hessian(self) -> Any:
        objective, processes = self._objective, self._processes
        if processes is None:
            return HessianOperator(objective, objective.layout.join())
        w = processes.weights(objective.layout.join())
        return SharedHessian(processes.together(lambda: HessianOperator(objective, w)), self._share, processes)

    def _read_law(self) -> EdgeLaw:
        parameters = list(self._objective.layout.chosen.values())
        optimizer: Any = self.optimizer
        if type(optimizer) is SAM and len(optimizer.param_groups) == 1 and optimizer.param_groups[0]["every"] > 1:
            law = cached_law(optimizer)
        else:
            law = edge_law(optimizer, parameters)
        return law if law.reason else replace(law, reason=self._unseen())

    def _unseen(self) -> str:
        """What the optimizer steps by and measuring does not see, in words; empty if there is nothing."""
        moved = [p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad]
        own = {id(p) for p in self.model.parameters()}
        if foreign := sum(id(p) not in own for p in moved):
            return (
                f"the optimizer also moves {foreign} parameters that are not the model's, of the loss say; put both "
                "into one module"
            )
        if any(p._backward_hooks for p in moved):
            return "parameters carry hooks that change their gradients, which measuring does not see"
        return ""

    def _uphill(self, hessian: Any) -> tuple[Tensor, float]:
        """The gradient that the base will step with, at SAM's perturbed point, and ‖g‖ of all that SAM perturbs."""
        whole, w, gradient = self._whole, hessian.params, hessian.gradient
        if whole is not self._objective:
            w = whole.layout.join()
            gradient = self._gradient(whole, w)
        home = {id(p): group for group in self.optimizer.param_groups for p in group["params"]}
        moved = [(whole.slices[n], home[id(p)]) for n, p in whole.layout.chosen.items() if id(p) in home]
        optimizer, way = self.optimizer, gradient
        assert isinstance(optimizer, SAM)
        if not optimizer.needs_gradient:  # it will move along a direction from before
            ways = (optimizer.state.get(p, {}).get(DIRECTION) for p in whole.layout.chosen.values())
            parts = zip(ways, whole.slices.values(), strict=True)
            way = torch.cat([torch.zeros_like(w[s]) if d is None else d.reshape(-1).to(w) for d, s in parts])
        descent = self._gradient(whole, uphill(w, way, moved))
        length = float(torch.stack([norm(gradient[s]) for s, _ in moved]).norm())
        if whole is not self._objective:
            descent = torch.cat([descent[whole.slices[n]] for n in self._objective.layout.chosen])
        return descent, length

    def _gradient(self, objective: Objective, w: Tensor) -> Tensor:
        processes = self._processes
        if processes is None:
            return objective.gradient(w)
        w = processes.same(w)
        return processes.sum(processes.together(lambda: self._share * objective.gradient(w)))

    def _together(self, function: Callable[[], Objective]) -> Objective:
        return self._processes.together(function) if self._processes else function()

    def _solver(self) -> Solver:
        basis = self.max_basis
        if basis is None and self._large:
            basis = max(FEW, self.eigenvalues + 3)
        if basis is None:
            return both_ends
        return lambda operator, count, start, tol, generator: lanczos_ends(
            operator, count, start, tol, generator, basis=basis
        )


def _unwrapped(model: nn.Module) -> nn.Module:
    """The module inside of those that compile or distribute it."""
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        return _unwrapped(model.module)
    return model


def _pair(data: Any) -> tuple[Any, Any]:
    """Inputs and targets, or batches and None."""
    whole = isinstance(data, tuple) or (
        isinstance(data, list) and any(isinstance(d, Tensor | np.ndarray | Mapping) for d in data)
    )
    if not whole:
        return data, None
    if len(data) != 2 or data[1] is None:
        raise TypeError(
            f"data must be a pair (inputs, targets), or batches in a list or a loader, got a {type(data).__name__} of "
            f"{len(data)}"
        )
    return data[0], data[1]


def _blend(vectors: Tensor, values: Tensor, count: int) -> Tensor:
    """Eigenvectors (P, r) in one, (P, 1): those of the largest values, and less of the others."""
    weights = torch.full_like(values, 0.3)
    weights[values.argsort(descending=True)[:count]] = 1.0
    return (vectors @ weights)[:, None]


def _common(optimizer: Optimizer, name: str) -> float:
    """A setting that all groups share, or NaN."""
    values = {float(group[name]) for group in optimizer.param_groups if name in group}
    return values.pop() if len(values) == 1 else math.nan


def _to_tell(row: Row, eigen: EigenResult) -> tuple[Row, EigenResult]:
    """What other processes need of a measurement, on the CPU."""
    values, vectors, residuals = eigen.values.cpu(), eigen.vectors.cpu(), eigen.residuals.cpu()
    return row, replace(eigen, values=values, vectors=vectors, residuals=residuals, model=LowRank(vectors, values))
