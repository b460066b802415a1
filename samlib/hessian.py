"""Exact Hessian–vector products."""

from __future__ import annotations

import torch
from torch import Tensor

from .objective import Objective

__all__ = ["HessianOperator"]


class HessianOperator:
    """The Hessian of an objective at fixed parameters, as exact products with vectors (reverse over reverse).

    Args:
        objective: the function.
        params: where to take the Hessian, shape (P,).

    Attributes:
        value, gradient: ℓ(w) and ∇ℓ(w), which come free with the graph, shapes () and (P,).
        matvecs: products computed so far.

    Source: Pearlmutter (1994), *Fast exact multiplication by the Hessian*.
    """

    def __init__(self, objective: Objective, params: Tensor) -> None:
        self.objective = objective
        self.matvecs = 0
        self.shape = (objective.size, objective.size)
        self.dtype, self.device = params.dtype, params.device
        self.params = params.detach().clone()
        self._params = self.params.clone().requires_grad_()
        self._gradients: list[Tensor] = []
        if objective.retain_graph:
            losses = []
            for loss in objective.chunk_losses(self._params):
                losses.append(loss.detach())
                self._gradients.append(self._differentiate(loss))
            self.value = torch.stack(losses).sum()
            self.gradient = torch.stack([g.detach() for g in self._gradients]).sum(0)
        else:
            self.value, self.gradient = objective.value_and_gradient(params)

    def _differentiate(self, loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, self._params, create_graph=True)[0]

    @torch.enable_grad()
    def matvec(self, vector: Tensor) -> Tensor:
        """H v for v of shape (P,)."""
        self.matvecs += 1
        product: Tensor | None = None
        gradients = self._gradients or (self._differentiate(loss) for loss in self.objective.chunk_losses(self._params))
        for gradient in gradients:
            # A loss that is linear in w has a gradient without a graph, and no Hessian.
            if gradient.requires_grad:
                keep = self.objective.retain_graph
                term = torch.autograd.grad(gradient, self._params, vector, retain_graph=keep, allow_unused=True)[0]
                if term is not None:
                    product = term if product is None else product + term
        return torch.zeros_like(vector) if product is None else product

    __matmul__ = matvec
