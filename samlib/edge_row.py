"""The edge of stability at a point as one row: the spectrum's ends, the gradients, and the edges that they set.

The laboratory's runs and :class:`samlib.EdgeMonitor` both measure by this.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .edges import gd_edge, sam_edge
from .eigen import EigenResult, SymmetricOperator, extreme_eigenpairs
from .laws import EdgeLaw
from .optim import EPSILON
from .optim.precision import norm as length

__all__ = ["Curvature", "EdgeRow", "Solver", "both_ends"]

Solver = Callable[[SymmetricOperator, int, Any, float, torch.Generator], EigenResult]
"""Maps (operator, how many of the largest, warm start, tolerance, random numbers) to those pairs and the smallest."""


class Curvature(SymmetricOperator, Protocol):
    """The Hessian at w, with the loss () and its gradient (P,) there."""

    value: Tensor
    gradient: Tensor


def both_ends(
    operator: SymmetricOperator, count: int, start: Any, tol: float, generator: torch.Generator
) -> EigenResult:
    """The ``count`` largest pairs and the smallest one: warm from an earlier result's model, or checked from cold; and
    what may be mixed with the principal one."""
    explore = 6 if start is None else 0
    low = 1 if count < operator.shape[0] else 0  # else it is among them
    return extreme_eigenpairs(operator, count, low, start, tol, generator=generator, explore=explore, separate=True)


@dataclass(eq=False)
class EdgeRow:
    """How a row is measured, and after :meth:`measure` what was found.

    Attributes:
        law: the edge of the optimizer, in its present state.
        learning_rate: η; NaN where there is more than one.
        rho: ρ of the rule SAM; NaN for other rules.
        eigenvalues: how many of the largest.
        tol: bound on residuals, relative to the operator norm.
        generator: gives each solve its source of random directions.
        memory: what one measurement leaves for the next, to start from.
        solve: finds the spectrum's ends.
        eigen: the pairs that were found, largest first, and last the smallest.
        principal: the eigenvector of the eigenvalue that is largest in magnitude, shape (P,).
    """

    law: EdgeLaw
    learning_rate: float
    rho: float
    eigenvalues: int
    tol: float
    generator: Callable[[], torch.Generator]
    memory: dict[str, Any]
    solve: Solver = both_ends
    eigen: EigenResult | None = None
    principal: Tensor | None = None

    def measure(self, hessian: Curvature, descent: Tensor, grad_norm: float | None = None) -> dict[str, float]:
        """The row.

        Columns: ``loss``; ``grad_norm`` ‖∇ℓ(w)‖ and ``sam_grad_norm`` of the gradient that the base steps with;
        ``eigenvalue_1``…``k``; ``smallest_eigenvalue`` and its ``smallest_residual`` (loose, where it is not the
        operator norm); ``operator_norm`` max |λ| with its ``residual``, within which an eigenvalue lies, and
        ``matvecs`` spent; ``gd_edge`` 2/η, ``sam_edge`` of the rule SAM, ``edge`` of the rule in use; ``edge_ratio`` =
        operator_norm / edge; ``grad_alignment`` and ``sam_grad_alignment``, |cos| of each gradient with the principal
        eigenvector, or with the span of all eigenvectors, ``inseparable`` of them, whose values the tolerance cannot
        tell from its; ``gap``, the distance to the next value that was seen. NaN is what is not known.

        Where the edge is one of a preconditioned Hessian, also its ``preconditioned_norm`` with
        ``preconditioned_residual``, which then is what is divided by the edge, and ``preconditioned_alignment`` in its
        geometry.

        Args:
            hessian: of the measured loss at w.
            descent: the gradient that the base steps with, shape (P,); the gradient itself without SAM.
            grad_norm: ‖g‖ of all that SAM perturbs, by default of the Hessian's parameters.

        Raises:
            FloatingPointError: if the Hessian or the gradient is not finite.
        """
        grad, count, law = hessian.gradient, self.eigenvalues, self.law
        eigen = self.eigen = self._solve(hessian, count, "model")
        largest = int(eigen.values.abs().argmax())
        norm, own_norm = float(eigen.values[largest].abs()), float(length(grad))
        if not math.isfinite(own_norm):
            raise FloatingPointError("the gradient is not finite")
        self.principal = eigen.vectors[:, largest]
        span, gap = _inseparable(eigen, largest, self.tol * norm)
        divided_by = (own_norm if grad_norm is None else grad_norm) + EPSILON  # by SAM
        row = {
            "loss": float(hessian.value),
            "grad_norm": own_norm,
            "sam_grad_norm": float(length(descent)),
            **{f"eigenvalue_{i + 1}": float(eigen.values[i]) for i in range(count)},
            "smallest_eigenvalue": float(eigen.values[-1]),
            "smallest_residual": float(eigen.residuals[-1]),
            "operator_norm": norm,
            "residual": float(eigen.residuals[largest]),
            "matvecs": eigen.matvecs,
            "gd_edge": math.nan if math.isnan(self.learning_rate) else gd_edge(self.learning_rate),
            "sam_edge": math.nan if math.isnan(self.rho) else sam_edge(divided_by, self.learning_rate, self.rho),
            "edge": law(float(length(descent)) if law.takes == "descent" else divided_by),
            "grad_alignment": _cosine(grad, span),
            "sam_grad_alignment": _cosine(descent, span),
            "gap": gap,
            "inseparable": span.shape[1],
        }
        acting: Any = law.operator(hessian)
        if acting is not hessian:
            row |= self._preconditioned(acting, grad)
            row["matvecs"] += row.pop("preconditioned_matvecs")
        norm = row.get("preconditioned_norm", norm)
        row["edge_ratio"] = norm / row["edge"] if row["edge"] != 0 else math.inf
        return row

    def _preconditioned(self, acting: Any, gradient: Tensor) -> dict[str, Any]:
        """The norm of D^½ H D^½, and the alignment of the gradient in the coordinates D^-½ w."""
        eigen = self._solve(acting, 1, "preconditioned")
        largest = int(eigen.values.abs().argmax())
        return {
            "preconditioned_norm": float(eigen.values[largest].abs()),
            "preconditioned_residual": float(eigen.residuals[largest]),
            "preconditioned_alignment": _cosine(acting.root * gradient, eigen.vectors[:, largest, None]),
            "preconditioned_matvecs": eigen.matvecs,
        }

    def _solve(self, operator: SymmetricOperator, count: int, name: str) -> EigenResult:
        eigen = self.solve(operator, count, self.memory.get(name), self.tol, self.generator())
        self.memory[name] = tuple(eigen.model)
        return eigen


def _inseparable(eigen: EigenResult, principal: int, distance: float) -> tuple[Tensor, float]:
    """Orthonormal vectors (P, m): the principal one, and those whose values lie so near that it may be mixed with them;
    and the distance to the nearest value of all that the solver has seen."""
    value, vector = eigen.values[principal], eigen.vectors[:, principal]
    apart = (eigen.model.values - value).abs()
    itself = int(apart.argmin())
    apart[itself] = math.inf
    near = [i for i, d in enumerate(apart.tolist()) if d < distance]
    columns = torch.cat([vector[:, None], eigen.model.vectors[:, near]], 1) if near else vector[:, None]
    return (torch.linalg.qr(columns).Q if near else columns), float(apart.min())


def _cosine(vector: Tensor, span: Tensor) -> float:
    """The cosine of the angle between a vector and the span of orthonormal columns."""
    return float(length(span.mT @ vector) / length(vector))
