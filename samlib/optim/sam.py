"""SAM as a PyTorch optimizer: normalised or not, adaptive, with a cached perturbation; around any base optimizer."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .directions import averaged, tempered
from .precision import add_scaled, total_norm, wide
from .safeguards import OWN, Accumulation, check_base, check_group, rounded_away, share_groups, without_own
from .steps import EPSILON

__all__ = ["DIRECTION", "SAM"]

DIRECTION = "cached_direction"  # its name in the state of a parameter

Closure = Callable[[], Any]


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimization around any PyTorch optimizer.

    Each :meth:`step` evaluates the closure at w and at w + e, restores w bit for bit, and hands the second gradient to
    the base optimizer. With g the gradient at w and norms over all parameters of all groups, e is

    * ρ g/(‖g‖ + 1e-5): SAM, the default;
    * ρ g with ``normalize=False``: unnormalised SAM;
    * ρ T²g/(‖T g‖ + 1e-5), T = |w| + 0.01, with ``adaptive=True``: ASAM;
    * ρ d/(‖d‖ + 1e-5) with ``every=k``: GraphSAM. d is g in steps 0, k, 2k, …; after each step it becomes
      β d/‖d‖ + (1 − β) u/‖u‖, u the gradient at w + e (without norms if not ``normalize``; d stays where u is zero).
      T steps cost T + ⌈T/k⌉ evaluations, and those without one at w return the loss at w + e.

    A step in which no ρ is positive is the base optimizer's own, for one evaluation. After a step ``p.grad`` is the
    gradient that the base optimizer stepped with. Parameter groups and state are the base optimizer's, so schedulers
    work on ``SAM``, and ``state_dict`` holds everything (d as ``"cached_direction"``). What else a training loop needs:

    * **Gradient accumulation.** Inside the closure: zero the gradients, then call ``backward`` on every micro-batch.
      Gradients from before the step are noticed and refused, since they cannot be taken again at w + e.
    * **BatchNorm.** ``with frozen_batch_statistics(model, optimizer.repeated): loss = …`` in the closure moves the
      running statistics once a step, at w where the closure is evaluated there.
    * **bfloat16.** Keep the parameters in float32, and the forward pass in ``torch.autocast("cuda", torch.bfloat16)``.
      (In bfloat16 parameters a small perturbation is lost to rounding, of which SAM warns.)
    * **float16.** The closure calls ``scaler.scale(loss).backward()`` and nothing else of the scaler's. Then
      ``optimizer.step(closure, scaler=scaler)`` and ``scaler.update()``: both gradients are taken with the scale
      undone, and a step that overflows is skipped. (To divide each ``p.grad`` by ``scaler.get_scale()`` in the closure
      does the first without the second. ``scaler.step(optimizer)`` cannot evaluate a closure.)
    * **Clipping.** ``clip_grad_norm_`` in the closure after ``backward`` clips both gradients, which changes SAM's e
      hardly and unnormalised e much. To clip the step's alone, also with a scaler: in a function that takes anything
      and returns nothing, given to ``optimizer.base_optimizer.register_step_pre_hook``.
    * **Several processes.** Under ``DistributedDataParallel`` as it is, every rank perturbs by the averaged gradient.
      With ``with nullcontext() if optimizer.perturbed else model.no_sync():`` around the closure's forward and backward
      pass, and ρ > 0, each perturbs by its own, as Foret et al. did. The weights stay equal either way.
    * **Two calls.** Without closures: ``backward``, ``first_step(zero_grad=True)``, ``backward``, ``second_step(…)``.

    Args:
        params: parameters or parameter groups; a group may set its own ``rho``, ``normalize``, ``adaptive``, ``beta``.
        base_optimizer: an optimizer class; it receives ``kwargs`` (``lr``, ``momentum``, …). A setting of the name of
            one of SAM's, as Adadelta's ``rho``, comes by ``functools.partial(torch.optim.Adadelta, rho=0.95)``.
        rho: radius ρ ≥ 0 of the perturbation, in parameter units.
        normalize: divide by the norm.
        adaptive: scale the perturbation by T.
        every: the period k ≥ 1 of gradients at w, in steps; one for all groups.
        beta: β in [0, 1], what a cached direction keeps in a step; at 1 it is held.

    Raises:
        ValueError: for a value out of range, or a base optimizer that evaluates closures itself (LBFGS).

    Source: Foret et al. (2021), arXiv:2010.01412; Kwon et al. (2021), arXiv:2102.11600 (adaptive); Wang et al. (2024),
    arXiv:2406.13137 (cached).

    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1)
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = model(torch.ones(4, 2)).square().mean()
    ...     loss.backward()
    ...     return loss
    >>> loss = optimizer.step(closure)
    >>> optimizer.evaluations
    2
    """

    def __init__(
        self,
        params: Any,
        base_optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
        rho: float = 0.05,
        *,
        normalize: bool = True,
        adaptive: bool = False,
        every: int = 1,
        beta: float = 0.99,
        **kwargs: Any,
    ) -> None:
        if isinstance(base_optimizer, torch.optim.Optimizer):
            raise TypeError(
                "base_optimizer must be a class, such as torch.optim.SGD; its options follow (lr=…). Got an "
                f"instance of {type(base_optimizer).__name__}"
            )
        own = dict(zip(OWN, (rho, normalize, adaptive, every, beta, 0), strict=True))
        super().__init__(params, own)
        mine = self.param_groups
        self.base_optimizer = base_optimizer([without_own(group) for group in mine], **kwargs)
        check_base(self.base_optimizer)
        self.defaults = {**self.base_optimizer.defaults, **own}
        self._share()
        for shared, group in zip(self.param_groups, mine, strict=True):
            shared.update({name: group[name] for name in OWN})
        self.evaluations = 0
        """How often the last step evaluated the closure; during a step, the one in progress included."""
        self._saved: list[tuple[Tensor, Tensor]] = []  # moved parameters and their values before
        self._held: dict[Tensor, Tensor] | None = None  # within a step: the direction to keep; None between steps
        self._watch: Accumulation | None = None  # within a step
        self._perturbations = 0
        self._told = False  # of a perturbation lost to rounding

    @property
    def perturbed(self) -> bool:
        """True while the weights are at w + e."""
        return bool(self._saved)

    @property
    def repeated(self) -> bool:
        """True while the loss is evaluated for the second time in a step."""
        return self._held is not None and self.evaluations > 1

    @property
    def needs_gradient(self) -> bool:
        """True where the next step takes the gradient at w: always, except between two true gradients of ``every``."""
        return any(g["age"] == 0 for g in self.param_groups) or not any(
            g["rho"] and DIRECTION in self.state.get(p, {}) for p, g in self._parameters()
        )

    @torch.inference_mode(False)
    @torch.no_grad()
    def step(self, closure: Closure | None = None, scaler: torch.amp.GradScaler | None = None) -> Any:
        """One SAM step.

        Args:
            closure: zeroes the gradients, computes the loss, calls ``backward`` and returns the loss.
            scaler: the ``torch.amp.GradScaler`` that scales the closure's loss, if one does; call its ``update`` after.

        Returns:
            What the closure returned at w; where it is not evaluated there (``every``), at w + e.

        Raises:
            TypeError: without a closure: SAM needs the gradient at two points.
            RuntimeError: if the closure adds to gradients from before, or between :meth:`first_step` and
                :meth:`second_step`.
        """
        if closure is None:
            raise TypeError(
                "SAM.step needs a closure that zeroes the gradients, computes the loss, calls loss.backward() and "
                "returns the loss: SAM evaluates the gradient at two points. Call optimizer.step(closure), or "
                "first_step and second_step."
            )
        self._begin()
        at_w = self.needs_gradient
        with self._restoring():
            self._watch = Accumulation(p for p, _ in self._parameters())
            loss = self._evaluate(closure) if at_w else None
            if self._perturb(at_w, scaler):
                uphill = self._evaluate(closure)
                loss = loss if at_w else uphill
            self._watch.close()
        self._finish(scaler)
        return loss

    @torch.inference_mode(False)
    @torch.no_grad()
    def first_step(self, zero_grad: bool = False, scaler: torch.amp.GradScaler | None = None) -> None:
        """Move the weights to w + e by the gradients that are there; none need be where not :attr:`needs_gradient`.

        Args:
            zero_grad: drop the gradients afterwards; if false, do so yourself.
            scaler: as for :meth:`step`, in both calls.
        """
        self._begin()
        at_w = self.needs_gradient
        with self._restoring():
            self._perturb(at_w, scaler)
        self.evaluations = 1 + at_w  # the one to come included
        if zero_grad:
            self.zero_grad()
        self._watch = Accumulation(p for p, _ in self._parameters())

    @torch.inference_mode(False)
    @torch.no_grad()
    def second_step(self, zero_grad: bool = False, scaler: torch.amp.GradScaler | None = None) -> None:
        """Put the weights back to w and step with the gradient at w + e.

        Args:
            zero_grad: drop the gradients afterwards.
            scaler: as for :meth:`step`, in both calls.

        Raises:
            RuntimeError: without :meth:`first_step`, or if the gradient at w was not zeroed in between.
        """
        if self._held is None:
            raise RuntimeError("second_step was called without first_step: call first_step, then backward, then this")
        if self._watch:
            with self._restoring():
                self._watch.close()
        self._finish(scaler)
        self._opt_called = True  # what learning-rate schedulers look for
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def restore(self) -> None:
        """Put the weights back to w and give the step up, after an exception between the two calls say."""
        self._put_back()
        if self._watch:
            self._watch.stop()
        self._held = self._watch = None

    @contextmanager
    def _restoring(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.restore()
            raise

    def _begin(self) -> None:
        if self._held is not None:
            raise RuntimeError(
                "the weights are still perturbed: first_step was called without second_step. Call second_step after "
                "the second backward pass, or restore() to give that step up."
            )
        self.evaluations = 0

    def _evaluate(self, closure: Closure) -> Any:
        if self.evaluations:  # the first gradient has been used; a closure that does not zero would add to it
            for p, _ in self._parameters():
                p.grad = None
        self.evaluations += 1
        with torch.enable_grad():
            return closure()

    def _perturb(self, at_w: bool, scaler: torch.amp.GradScaler | None) -> bool:
        """Move to w + e, where there is a way to go; hold the direction if it is to be cached."""
        self._held = {}
        if not any(group["rho"] for _, group, _ in self._ways(at_w)):
            return False
        if scaler and at_w:
            scaler.unscale_(self)
        ways = list(self._ways(at_w))
        length = total_norm(tempered(p, group, d) for p, group, d in ways)
        if scaler and not length.isfinite():
            return False  # the scaler will skip this step
        if self.param_groups[0]["every"] > 1:
            self._held = {p: wide(d).to(p.dtype, copy=True) if at_w else d for p, _, d in ways}
        self._perturbations += 1
        look = not self._told and self._perturbations.bit_count() == 1  # now and then: it costs passes
        moves = []
        for p, group, d in ways:
            if group["rho"]:
                # "Uphill" is towards a worse loss: the other way for a group that maximizes.
                rho = -group["rho"] if group.get("maximize") else group["rho"]
                scale = rho / (length + EPSILON) if group["normalize"] else rho
                way = tempered(p, group, d, 2)
                self._saved.append((p, p.clone()))
                add_scaled(p, way, scale)
                if look:
                    moves.append((*self._saved[-1], total_norm([way]) * abs(scale)))
        torch.clear_autocast_cache()  # it holds the weights as they were
        if message := rounded_away(moves):
            self._told = True
            warnings.warn(message, stacklevel=4)
        return True

    def _finish(self, scaler: torch.amp.GradScaler | None) -> None:
        """Back to w; the base optimizer's step; then the state, which a base optimizer initialises only where empty."""
        self._put_back()
        held, self._held, self._watch = self._held or {}, None, None
        if scaler:
            scaler.unscale_(self.base_optimizer)
        descent = {p: p.grad for p, _ in self._parameters() if p.grad is not None}
        directions = averaged(held, descent, self._parameters()) if held else {}
        skipped = scaler and held and not total_norm(descent.values()).isfinite()
        if scaler:
            scaler.step(self.base_optimizer)
        else:
            self.base_optimizer.step()
        if skipped:
            return
        for p, direction in directions.items():
            if p in descent or self.state.get(p):
                self.state[p][DIRECTION] = direction
        for group in self.param_groups:
            group["age"] = (group["age"] + 1) % group["every"] if held else 0

    def _put_back(self) -> None:
        for p, original in self._saved:
            p.copy_(original)
        self._saved = []
        torch.clear_autocast_cache()

    def _parameters(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        return ((p, group) for group in self.param_groups for p in group["params"])

    def _ways(self, at_w: bool) -> Iterator[tuple[Tensor, dict[str, Any], Tensor]]:
        """Each parameter that has one, its group, and the gradient or the cached direction."""
        for p, group in self._parameters():
            way = p.grad if at_w else self.state.get(p, {}).get(DIRECTION)
            if way is not None:
                yield p, group, way

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore parameter groups and the base optimizer's state; see ``torch.optim.Optimizer``.

        States of plain optimizers and of other SAMs load too. The state is copied, not shared.
        """
        state_dict = state_dict.copy()
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        self.base_optimizer.load_state_dict(copy.deepcopy(state_dict))
        self._share()
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; it may set its own ``rho``, ``normalize``, ``adaptive`` and ``beta``."""
        group = {name: self.defaults[name] for name in OWN} | param_group
        check_group(group, self.param_groups)
        if "base_optimizer" not in self.__dict__:  # torch's constructor comes here too
            super().add_param_group(group)
            return
        self.base_optimizer.add_param_group(without_own(group))
        self._share()
        self.param_groups[-1].update({name: group[name] for name in OWN})
        for group in self.param_groups:
            group["age"] = 0  # the newcomer has no direction yet

    def _share(self) -> None:
        self.param_groups, self.state = share_groups(self.base_optimizer, self.defaults), self.base_optimizer.state

    def __getstate__(self) -> dict[str, Any]:
        mine = ("base_optimizer", "evaluations", "_saved", "_held", "_perturbations", "_told")
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in mine}, "_watch": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()
