"""The two updates of the paper as pure functions, and SAM as a PyTorch optimizer for other people's models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["EPSILON", "SAM", "frozen_batch_statistics", "gd_step", "sam_perturb", "sam_step"]

EPSILON = 1e-5  # added to ‖g‖ in SAM's normaliser, as in the reference code

Gradient = Callable[[Tensor], Tensor]


def gd_step(gradient: Gradient, params: Tensor, learning_rate: float) -> Tensor:
    """w − η ∇ℓ(w).

    Args:
        gradient: maps parameters (P,) to the gradient (P,).
        params: w, shape (P,).
        learning_rate: step size η.
    """
    return params - learning_rate * gradient(params)


def sam_step(gradient: Gradient, params: Tensor, learning_rate: float, rho: float) -> Tensor:
    """w − η ∇ℓ(w + ρ ∇ℓ(w)/‖∇ℓ(w)‖); for ρ = 0 exactly :func:`gd_step`, at the price of one gradient.

    Args:
        gradient: maps parameters (P,) to the gradient (P,).
        params: w, shape (P,).
        learning_rate: step size η.
        rho: radius ρ of the perturbation, in parameter units.

    Source: Foret et al. (2021), arXiv:2010.01412, equation 4; Long & Bartlett (2024), section 1.
    """
    if rho == 0:
        return gd_step(gradient, params, learning_rate)
    uphill = sam_perturb(params, gradient(params), rho)
    return params - learning_rate * gradient(uphill)


def sam_perturb(params: Tensor, grad: Tensor, rho: float) -> Tensor:
    """w + ρ g/(‖g‖ + 1e-5), the point at which SAM takes its gradient."""
    return params + (rho / (grad.norm() + EPSILON)) * grad


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimization around any PyTorch optimizer.

    Each :meth:`step` evaluates the closure twice: at w, and at w + ρ g/(‖g‖ + 1e-5), with ‖g‖ taken over all
    parameters of all groups. The second gradient is handed to the base optimizer. The original weights are kept as
    a copy and copied back, so that they return bit for bit. A group with ``rho=0`` is not perturbed; when all are,
    the closure runs once and the step is the base optimizer's own.

    * **State.** Parameter groups and state are the base optimizer's, so learning-rate schedulers work on ``SAM``
      as on any optimizer and ``state_dict`` / ``load_state_dict`` carry momentum and the like.
    * **Gradient accumulation.** Do it inside the closure: zero the gradients, then call ``backward`` on every
      micro-batch. Both evaluations must see the same micro-batches, or ascent and descent belong to different losses.
    * **BatchNorm.** The closure runs twice, so running statistics are updated twice, the second time at the
      perturbed weights. Wrap the closure's forward pass in :func:`frozen_batch_statistics` while
      :attr:`perturbed` is true to update them only at w.
    * **Mixed precision.** A loss scale cancels in the perturbation but not in the step. Use bfloat16 without a
      ``GradScaler``, or unscale inside the closure.

    Args:
        params: parameters or parameter groups; a group may set its own ``rho``.
        base_optimizer: an optimizer class; it receives ``kwargs`` (``lr``, ``momentum``, …).
        rho: radius ρ ≥ 0 of the perturbation, in parameter units.

    Raises:
        ValueError: if ``rho`` is negative or not finite.

    Source: Foret et al. (2021), arXiv:2010.01412.

    >>> model = nn.Linear(2, 1)
    >>> optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1)
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = model(torch.ones(4, 2)).square().mean()
    ...     loss.backward()
    ...     return loss
    >>> loss = optimizer.step(closure)
    """

    def __init__(
        self,
        params: Any,
        base_optimizer: type[torch.optim.Optimizer] = torch.optim.SGD,
        rho: float = 0.05,
        **kwargs: Any,
    ) -> None:
        super().__init__(params, {"rho": _valid_rho(rho)})
        self.base_optimizer = base_optimizer(self.param_groups, **kwargs)
        self.defaults = {**self.base_optimizer.defaults, "rho": rho}
        self.perturbed = False
        """True while the closure runs at the perturbed weights."""
        self._share()

    def _share(self) -> None:
        self.param_groups = self.base_optimizer.param_groups
        self.state = self.base_optimizer.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One SAM step.

        Args:
            closure: zeroes the gradients, computes the loss, calls ``backward`` and returns the loss.

        Returns:
            What the closure returned at the unperturbed weights.

        Raises:
            TypeError: without a closure: SAM needs the gradient at two points.
        """
        if closure is None:
            raise TypeError(
                "SAM.step needs a closure that zeroes the gradients, computes the loss, calls loss.backward() and "
                "returns the loss: SAM evaluates the gradient at two points. Call optimizer.step(closure)."
            )
        evaluate = torch.enable_grad()(closure)
        loss = evaluate()
        # "Uphill" is towards a worse loss: the other way for a group that maximizes.
        moved = [
            (p, -g["rho"] if g.get("maximize") else g["rho"])
            for g in self.param_groups
            for p in g["params"]
            if g["rho"] and p.grad is not None
        ]
        if moved:
            grads = [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]
            scale = 1 / (nn.utils.get_total_norm(grads) + EPSILON)
            saved = [p.clone() for p, _ in moved]
            try:
                for p, rho in moved:
                    assert p.grad is not None
                    p.add_(p.grad * (rho * scale.to(p.device)))
                self.perturbed = True
                evaluate()
            finally:
                self.perturbed = False
                for (p, _), original in zip(moved, saved, strict=True):
                    p.copy_(original)
        self.base_optimizer.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore parameter groups and the base optimizer's state; see ``torch.optim.Optimizer``."""
        self.base_optimizer.load_state_dict(state_dict)
        for group in self.base_optimizer.param_groups:  # the state of a plain optimizer has no rho
            group.setdefault("rho", self.defaults["rho"])
        self._share()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; it may set its own ``rho``."""
        _valid_rho(param_group.get("rho", self.defaults["rho"]))
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "base_optimizer": self.base_optimizer, "perturbed": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()


@contextmanager
def frozen_batch_statistics(model: nn.Module, frozen: bool = True) -> Iterator[None]:
    """Keep BatchNorm's running statistics as they are inside the block; batch statistics still normalise.

    In a SAM closure: ``with frozen_batch_statistics(model, optimizer.perturbed): loss = ...``
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    norms = [m for m in norms if m.training and m.track_running_stats]
    saved = [(m, m.running_mean, m.running_var, m.num_batches_tracked) for m in norms]
    try:
        if frozen:
            for m in norms:
                m.track_running_stats, m.running_mean, m.running_var = False, None, None
        yield
    finally:
        if frozen:
            for m, mean, var, count in saved:
                m.track_running_stats, m.running_mean, m.running_var, m.num_batches_tracked = True, mean, var, count


def _valid_rho(rho: float) -> float:
    if not 0 <= rho < float("inf"):
        raise ValueError(f"rho must be a non-negative finite number, got {rho!r}")
    return rho
