"""Which edge an optimizer has: its own settings are read, and the law that they obey, or why none is known."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from .broadcast import check
from .edges import sam_edge
from .eigen import SymmetricOperator
from .optim import SAM
from .scaled import ScaledOperator
from .stability import Decay, stability_limit

__all__ = ["EdgeLaw", "edge_law"]

Group = dict[str, Any]


@dataclass(frozen=True, eq=False)
class EdgeLaw:
    """The edge of an optimizer, ``law(grad_norm)``: what the largest eigenvalue of ``law.operator(hessian)`` meets.

    Attributes:
        name: the rule, as "SAM with momentum 0.9".
        reason: empty if a law is known, else why not.
        learning_rate: η, or 1 where the learning rates are in ``scale``.
        limit: c of the base, see :mod:`samlib.stability`.
        rho: ρ of SAM's perturbation; 0 without.
        normalize: whether the perturbation is ρ g/‖g‖, or ρ g.
        weight_decay: δ, by which the edge is lower.
        decay: how δ enters.
        scale: diagonal of D, flat in the order of the parameters: the edge is that of D^½ H D^½. None is the Hessian
            itself.
        shift: δ where the edge is that of D^½ (H + δ) D^½.
        sign: −1 for an optimizer that maximizes: the edge is that of −H.
        takes: which norm a call wants: that of the "gradient" at w, or of the "descent" gradient that the base gets.
    """

    name: str
    reason: str = ""
    learning_rate: float = 1.0
    limit: float = 2.0
    rho: float = 0.0
    normalize: bool = True
    weight_decay: float = 0.0
    decay: Decay = "step"
    scale: Tensor | None = None
    shift: float = 0.0
    sign: int = 1
    takes: str = "gradient"

    def __call__(self, grad_norm: float = math.nan) -> float:
        """The edge, or NaN if no law is known.

        Args:
            grad_norm: what the optimizer divides by, to be given as such: ‖g‖ + 1e-5 for :class:`samlib.SAM`, with ‖g‖
                over all parameters of all its groups. Ignored where the edge does not depend on it: without SAM, and
                for unnormalised SAM.
        """
        if self.reason:
            return math.nan
        norm = float(grad_norm) if self.rho and self.normalize else 1.0
        settings: dict[str, Any] = {"limit": self.limit, "weight_decay": self.weight_decay, "decay": self.decay}
        return sam_edge(norm, self.learning_rate, self.rho, **settings)

    def operator(self, hessian: SymmetricOperator) -> SymmetricOperator:
        """H itself, or D^½ (±H + δ) D^½ where the edge is that of this.

        Args:
            hessian: H of the parameters that ``scale`` lists, a symmetric (P, P) tensor or operator.
        """
        scale = self.scale
        if scale is None and self.sign == 1:
            return hessian
        if scale is None:
            scale = torch.ones(hessian.shape[0], dtype=torch.float64)
        return ScaledOperator(hessian, scale, self.shift, self.sign)


def edge_law(optimizer: Optimizer, parameters: Iterable[Tensor] | None = None) -> EdgeLaw:
    """The law that an optimizer obeys with its present settings and state, or none and why.

    Known are ``torch.optim.SGD`` (momentum, dampening, Nesterov, weight decay, maximize), ``Adam`` and ``AdamW`` with
    D = P⁻¹, the preconditioner P = √v̂ + ε of the steps taken so far, and :class:`samlib.SAM` around SGD. For parameter
    groups with different learning rates η the law has D = diag(η), with Adam diag(η) P⁻¹; groups that differ in more
    have none. Read it before a step, and anew for every measurement: schedulers change rates, steps Adam's state.
    Adam's holds once many more than 1/(1 − β₁) steps are taken.

    Args:
        optimizer: of exactly one of these classes; a subclass may step in its own way.
        parameters: what the Hessian is of, in its order; by default the optimizer's parameters that need gradients, in
            the order of its groups. Those that the optimizer does not move have D = 0.

    Returns:
        The law. If none is known, the edge is NaN and ``reason`` says why.

    Raises:
        TypeError: if this is no ``torch.optim.Optimizer``.

    Source: :mod:`samlib.edges`; Cohen et al. (2022), arXiv:2207.14484, for Adam.

    >>> law = edge_law(SGD([torch.zeros(3, requires_grad=True)], lr=0.5, momentum=0.5))
    >>> law.name, law()
    ('gradient descent with momentum 0.5', 6.0)
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"edge_law reads a torch.optim.Optimizer, got {type(optimizer).__name__}")
    base = optimizer.base_optimizer if type(optimizer) is SAM else optimizer
    groups = [g for g in base.param_groups if any(p.requires_grad for p in g["params"])]
    # With ρ = 0 in every group SAM is its base. The base's groups hold ρ too, but its own step knows nothing of it.
    perturbs = type(optimizer) is SAM and any(g.get("rho") for g in groups)
    try:
        if not groups:
            raise ValueError("no parameter of this optimizer needs a gradient")
        law = _law(groups, type(base), perturbs)
        law(1.0)  # refuses what is out of range
        return replace(law, scale=_scale(base, groups, parameters))
    except ValueError as why:
        name = type(base).__name__
        return EdgeLaw(f"SAM around {name}" if perturbs else name, reason=str(why))


def _law(groups: list[Group], kind: type[Optimizer], perturbs: bool) -> EdgeLaw:
    """The law of the settings alone, without the scale."""
    if kind not in (SGD, Adam, AdamW):
        raise ValueError(
            f"no law is known for {kind.__name__}: they are for SGD, Adam, AdamW and samlib.SAM around SGD"
        )
    rho, normalize = _perturbation(groups, kind) if perturbs else (0.0, True)
    rates = {_number(g["lr"]) for g in groups}
    for rate in rates:
        check("learning_rate", rate)
    if perturbs and len(rates) > 1:
        raise ValueError("parameter groups differ in lr: with SAM no law is known then, without SAM there is one")
    delta = _same(groups, "weight_decay")
    check("weight_decay", delta)
    decoupled = kind is not SGD and delta != 0 and bool(_same(groups, "decoupled_weight_decay", False))
    if decoupled and len(rates) > 1:
        raise ValueError("parameter groups differ in lr: with decoupled weight decay no law is known then")
    # L2 decay is added to H before D is applied.
    shifts = not decoupled and (kind is not SGD or len(rates) > 1)
    limit, words = _momentum(groups) if kind is SGD else _average(groups)
    words += [f"{'decoupled ' * (decoupled and kind is Adam)}weight decay {delta:g}"] * (delta != 0)
    words += ["rates by group"] * (len(rates) > 1)
    rule = ("SAM" if normalize else "unnormalised SAM") if perturbs else "gradient descent"
    return EdgeLaw(
        " with ".join(filter(None, (rule if kind is SGD else kind.__name__, " and ".join(words)))),
        learning_rate=rates.pop() if len(rates) == 1 else 1.0,
        limit=limit,
        rho=rho,
        normalize=normalize,
        weight_decay=0.0 if shifts else delta,
        decay="decoupled" if decoupled else "step",
        shift=delta if shifts else 0.0,
        sign=-1 if _same(groups, "maximize", False) else 1,
    )


def _perturbation(groups: list[Group], kind: type[Optimizer]) -> tuple[float, bool]:
    """SAM's ρ, and whether it divides by ‖g‖."""
    if kind is not SGD:
        own = "edge_law(optimizer.base_optimizer) reads the base alone"
        raise ValueError(f"no law is known for SAM around {kind.__name__}; {own}")
    if any(g.get("adaptive", False) for g in groups):
        raise ValueError(
            "adaptive SAM scales its perturbation by T², which mixes the eigendirections: no law along one"
        )
    if any(g.get("every", 1) != 1 for g in groups):
        raise ValueError("SAM with a cached direction (every > 1) has edges of its own, which edge_law does not read")
    return _same(groups, "rho"), bool(_same(groups, "normalize", True))


def _momentum(groups: list[Group]) -> tuple[float, list[str]]:
    """SGD's c, and what there is to say of its momentum."""
    momentum = _same(groups, "momentum")
    if momentum == 0:  # SGD then ignores the other two
        return 2.0, []
    dampening, nesterov = _same(groups, "dampening"), bool(_same(groups, "nesterov", False))
    words = [f"{'Nesterov ' * nesterov}momentum {momentum:g}"] + [f"dampening {dampening:g}"] * (dampening != 0)
    return stability_limit(momentum, dampening=dampening, nesterov=nesterov), words


def _average(groups: list[Group]) -> tuple[float, list[str]]:
    """Adam's c: with a frozen preconditioner it is a heavy ball with dampening β₁."""
    beta = _same([{"beta1": g["betas"][0]} for g in groups], "beta1")
    return stability_limit(beta, dampening=beta), []


def _scale(base: Optimizer, groups: list[Group], parameters: Iterable[Tensor] | None) -> Tensor | None:
    """The diagonal of D, or None where it is 1 throughout."""
    home = {id(p): g for g in groups for p in g["params"] if p.requires_grad}
    moved = [p for g in groups for p in g["params"] if id(p) in home]
    adam = type(base) is not SGD
    if adam and not any(_steps(base, p) for p in moved):
        raise ValueError("Adam has not stepped yet: its preconditioner is that of the steps before")
    listed = moved if parameters is None else list(parameters)
    differ = len({_number(g["lr"]) for g in groups}) > 1
    if not adam and not differ and all(id(p) in home for p in listed):
        return None

    def diagonal(p: Tensor) -> Tensor:
        like = p.detach().to(listed[0].device, torch.promote_types(p.dtype, torch.float32)).reshape(-1)
        # Without a state Adam has never seen a gradient of this parameter, and has not moved it.
        if id(p) not in home or (adam and not _steps(base, p)):
            return torch.zeros_like(like)
        rate = _number(home[id(p)]["lr"]) if differ else 1.0
        return torch.full_like(like, rate) / (_preconditioner(base, home[id(p)], p).to(like) if adam else 1.0)

    scale = torch.cat([diagonal(p) for p in listed])
    if not bool(scale.isfinite().all()):
        raise ValueError("Adam's preconditioner √v̂ + ε is zero or not finite in some coordinate")
    return scale


def _steps(base: Optimizer, parameter: Tensor) -> float:
    """How often Adam has moved a parameter."""
    state = base.state.get(parameter, {})
    return _number(state["step"]) if "exp_avg_sq" in state else 0


def _preconditioner(base: Optimizer, group: Group, parameter: Tensor) -> Tensor:
    """√v̂ + ε, flat."""
    state = base.state[parameter]
    second = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"].detach().reshape(-1)
    correction = 1 - _number(group["betas"][1]) ** _number(state["step"])
    return (second.to(torch.promote_types(second.dtype, torch.float32)) / correction).sqrt() + _number(group["eps"])


def _same(groups: list[Group], key: str, default: Any = 0.0) -> Any:
    """The one value of a setting; a law holds for all groups or for none."""
    values = {_number(g.get(key, default)) for g in groups}
    if len(values) > 1:
        listed = ", ".join(f"{v:g}" for v in sorted(values))
        raise ValueError(f"parameter groups differ in {key} ({listed}): a law is known only for different lr")
    return values.pop()


def _number(value: Any) -> float:
    return float(value.detach() if isinstance(value, Tensor) else value)
