"""Universal sharpness-aware minimization as a PyTorch optimizer; its theory is in :mod:`samlib.cumulants`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Literal

import torch
from torch import Tensor

from .cumulants import (
    Sharpness,
    check_number,
    determinant,
    frobenius,
    integral,
    sharpness_weights,
    signs,
    trace,
    universal_gradient,
    universal_step,
)
from .optim.safeguards import Accumulation, check_base

__all__ = ["UniversalSAM", "determinant", "frobenius", "integral", "trace", "universal_gradient", "universal_step"]

Directions = Literal["normal"] | tuple[str, float]


class UniversalSAM(torch.optim.Optimizer):
    """Universal sharpness-aware minimization around any PyTorch optimizer.

    Each :meth:`step` hands ∇F to the base optimizer, from :attr:`evaluations` closure calls: 1 + n, or 1 + 2n if
    paired, at n + 3 copies of the parameters. The original weights are copied back, so that they return bit for bit.
    A group with ``strength=0`` is not perturbed; when all are, the closure runs once and the step is the base
    optimizer's own.

    * **State.** Parameter groups (with ``rho`` and ``strength``) and state are the base optimizer's, so schedulers
      work as on any optimizer. ``state_dict`` holds the sampling too: a resumed run repeats its directions bit for
      bit. Functions cannot be saved: for your own, construct the optimizer with it before loading.
    * **Gradient accumulation** belongs inside the closure: every call must see the same examples.
    * **BatchNorm.** Wrap the closure's forward pass in ``frozen_batch_statistics(model, optimizer.perturbed)``.
    * **Precision.** D is a difference of losses over ρ²: in float32 with ρ ≤ 1e-4 rounding swamps it. Weights kept in
      16 bits may not move at all. Gradients may carry a loss scale if the loss that the closure returns does not.

    Args:
        params: parameters or parameter groups; a group may set its own ``strength``.
        base_optimizer: an optimizer class; it receives ``kwargs`` (``lr``, ``momentum``, …).
        sharpness: "trace", "frobenius", "determinant" (β = 0.3) or a function such as ``determinant(beta=1.0)``.
        rho: size ρ > 0 of the perturbation, the same for all perturbed groups.
        strength: λ ≥ 0, the share of the sharpness in the objective.
        samples: n, the number of directions in each step.
        paired: use −x with each direction x.
        directions: "normal", or ("cube", h) for x uniform on [−h, h]^P.
        seed: of the generator of the directions.

    Raises:
        ValueError: if an argument is out of range, or the base optimizer has a setting ``rho`` or ``strength``.

    Source: Tahmasebi et al. (2024), arXiv:2406.03682. Its code uses plain directions; its *trace* is
    ``strength=1, samples=1``, its Frobenius-SAM ``samples=2``.

    >>> w = torch.nn.Parameter(torch.ones(2))
    >>> optimizer = UniversalSAM([w], sharpness="frobenius", samples=2, lr=0.1)
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = w.square().sum() ** 2
    ...     loss.backward()
    ...     return loss
    >>> loss = optimizer.step(closure)
    >>> optimizer.evaluations
    5
    """

    def __init__(
        self,
        params: Any,
        base_optimizer: type[torch.optim.Optimizer] = torch.optim.SGD,
        sharpness: str | Sharpness = "trace",
        rho: float = 0.01,
        strength: float = 1.0,
        samples: int = 1,
        paired: bool = True,
        directions: Directions = "normal",
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        self.perturbed = False
        """True while the closure runs at perturbed weights."""
        self.sharpness, self.paired, self.steps = _named(sharpness), bool(paired), 0
        self.samples = _samples(samples, self.sharpness)
        self.directions = _directions(directions)
        self.generator = torch.Generator("cpu").manual_seed(seed)
        super().__init__(params, {"rho": rho, "strength": strength})
        self.base_optimizer = base_optimizer(self.param_groups, **kwargs)
        check_base(self.base_optimizer)
        if clash := {"rho", "strength"} & self.base_optimizer.defaults.keys():
            raise ValueError(f"{base_optimizer.__name__} has a setting {clash.pop()!r} of its own: use another base")
        self.defaults = {**self.base_optimizer.defaults, "rho": rho, "strength": strength}
        self.param_groups, self.state = self.base_optimizer.param_groups, self.base_optimizer.state

    @property
    def evaluations(self) -> int:
        """Closure calls, that is gradients, in a step."""
        return 1 + self.samples * len(signs(self.paired)) if any(g["strength"] for g in self.param_groups) else 1

    @torch.inference_mode(False)
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step.

        Args:
            closure: zeroes the gradients, computes the loss, calls ``backward`` and returns the loss.

        Returns:
            What the closure returned at the unperturbed weights.

        Raises:
            TypeError: without a closure, or if it does not return the loss.
            RuntimeError: if the closure adds to gradients from before.
            ValueError: if perturbed groups differ in ``rho``.
            FloatingPointError: if a loss change is not finite; the weights are those before the step.
        """
        if closure is None:
            raise TypeError(
                "UniversalSAM.step needs a closure that zeroes the gradients, computes the loss, calls "
                "loss.backward() and returns the loss. Call optimizer.step(closure)."
            )
        evaluate = torch.enable_grad()(closure)
        samples = any(g["strength"] for g in self.param_groups)
        watch = Accumulation(p for g in self.param_groups for p in g["params"]) if samples else None
        try:
            loss = evaluate()
        except BaseException:
            if watch:
                watch.stop()
            raise
        self.steps += 1
        if watch:
            watch.close()
            self._replace_gradients(evaluate, _number(loss))
        self.base_optimizer.step()
        return loss

    def _replace_gradients(self, evaluate: Callable[[], Any], loss: float) -> None:
        """Put ∇F in place of the gradients at w."""
        every = [p for g in self.param_groups for p in g["params"]]
        plain = {p: p.grad.to_dense().clone() for p in every if p.grad is not None}
        groups = [g for g in self.param_groups if g["strength"]]
        if len(radii := {g["rho"] for g in groups}) > 1:
            raise ValueError(f"all groups with a strength must have the same rho, got {sorted(radii)}")
        (rho,) = radii
        moved = {p: g for g in groups for p in g["params"] if p in plain}
        around = self._sample(evaluate, list(moved), rho)
        for p in every:
            p.grad = plain.get(p)
        changes = torch.tensor([value - loss for value, _ in around], dtype=torch.float64, device="cpu") / rho**2
        # A group that maximizes descends −ℓ: its loss changes and gradients have the other sign.
        weights = {sign: sharpness_weights(self.sharpness, sign * changes) for sign in (1, -1)}
        if not bool(changes.isfinite().all() and weights[1].isfinite().all()):
            raise FloatingPointError(
                f"the loss changes of step {self.steps} are not finite, or their weights: D = {changes.tolist()}; "
                "lower the learning rate, the strength or rho"
            )
        for i, (p, group) in enumerate(moved.items()):
            update = plain[p].clone()
            for c, (_, gradients) in zip(weights[-1 if group.get("maximize") else 1].tolist(), around, strict=True):
                update.add_(gradients[i].sub_(plain[p]), alpha=group["strength"] * c)
            p.grad = update

    def _sample(self, evaluate: Callable[[], Any], moved: list[Tensor], rho: float) -> list[tuple[float, list[Tensor]]]:
        """Loss and gradients around w for every direction: the mean of both signs, if paired."""
        originals, share, found = [p.clone() for p in moved], 1 / len(signs(self.paired)), []
        try:
            self.perturbed = True
            for _ in range(self.samples):
                directions = [self._draw(p) for p in moved]
                loss, gradients = 0.0, [torch.zeros_like(p) for p in moved]
                for sign in signs(self.paired):
                    for p, original, x in zip(moved, originals, directions, strict=True):
                        p.copy_(original).add_(x, alpha=sign * rho)
                    torch.clear_autocast_cache()  # it may hold casts of the weights before they moved
                    for p in moved:  # a closure that does not zero would add to it
                        p.grad = None
                    loss += share * _number(evaluate())
                    for p, gradient in zip(moved, gradients, strict=True):
                        if p.grad is not None:
                            gradient.add_(p.grad, alpha=share)
                found.append((loss, gradients))
        finally:
            self.perturbed = False
            for p, original in zip(moved, originals, strict=True):
                p.copy_(original)
            torch.clear_autocast_cache()
        return found

    def _draw(self, like: Tensor) -> Tensor:
        """A random direction. A generator on the CPU seeds one where the parameter is: its state fits any device."""
        seed = int(torch.randint(2**62, (), generator=self.generator, device="cpu"))
        generator = torch.Generator(like.device).manual_seed(seed)
        x = torch.empty_like(like, memory_format=torch.contiguous_format)
        if self.directions == "normal":
            return x.normal_(generator=generator)
        half = float(self.directions[1])
        return x.uniform_(-half, half, generator=generator)

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state, and under "universal" what the sampling needs; see ``torch.optim.Optimizer``."""
        kind = type(self.sharpness) if isinstance(self.sharpness, determinant | integral) else self.sharpness
        own = {name: getattr(self, name) for name in ("samples", "paired", "directions", "steps")}
        own["sharpness"] = getattr(kind, "__name__", type(kind).__name__)
        own["numbers"] = asdict(self.sharpness) if isinstance(self.sharpness, determinant) else {}
        return {**super().state_dict(), "universal": own | {"generator": self.generator.get_state()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore all that :meth:`state_dict` holds; the state of a plain optimizer leaves the sampling as it is.

        Raises:
            ValueError: if the state was saved with another function as sharpness.
        """
        own = dict(state_dict.get("universal", {}))
        if own:
            name, numbers = own.pop("sharpness"), own.pop("numbers")
            if name in _NAMES:
                own["sharpness"] = _NAMES[name](**numbers)
            elif name != self.state_dict()["universal"]["sharpness"]:
                raise ValueError(f"the state was saved with the function {name!r} as sharpness: construct it with that")
        super().load_state_dict(state_dict)
        if own:
            self.generator.set_state(own.pop("generator"))
            self.__dict__.update(own)
        for group in self.param_groups:  # the state of a plain optimizer has neither
            group.setdefault("rho", self.defaults["rho"])
            group.setdefault("strength", self.defaults["strength"])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; it may set its own ``strength``."""
        group = {**self.defaults, **param_group}
        check_number("rho", group["rho"], positive=True)
        check_number("strength", group["strength"])
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        own = ("base_optimizer", "sharpness", "samples", "paired", "directions", "generator", "steps")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}, "perturbed": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.base_optimizer.__setstate__({"state": self.state, "param_groups": self.param_groups})


_NAMES: dict[str, Callable[..., Sharpness]] = {
    "trace": lambda: trace,
    "frobenius": lambda: frobenius,
    "determinant": determinant,
}


def _named(sharpness: str | Sharpness) -> Sharpness:
    if isinstance(sharpness, str) and sharpness in _NAMES:
        return _NAMES[sharpness]()
    if isinstance(sharpness, str) or not callable(sharpness) or isinstance(sharpness, type):
        raise ValueError(
            f"sharpness must be one of {', '.join(_NAMES)} or a function of the loss changes, got {sharpness!r}"
        )
    return sharpness


def _samples(samples: int, sharpness: Sharpness) -> int:
    least = 2 if sharpness is frobenius or isinstance(sharpness, determinant) else 1
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < least:
        why = ", since one loss change has no spread: that would be trace" if least == 2 else ""
        raise ValueError(f"samples must be a whole number, at least {least} for this sharpness{why}; got {samples!r}")
    return samples


def _directions(directions: Directions) -> Directions:
    if directions == "normal":
        return "normal"
    if isinstance(directions, tuple | list) and len(directions) == 2 and directions[0] == "cube":
        check_number("the half-width of the cube", directions[1], positive=True)
        return ("cube", float(directions[1]))
    raise ValueError(f"directions must be 'normal' or ('cube', half-width), got {directions!r}")


def _number(loss: Any) -> float:
    try:
        return float(loss.detach() if isinstance(loss, Tensor) else loss)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"the closure must return the loss as a number, got {type(loss).__name__}") from error
