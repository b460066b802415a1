"""Three losses on which the sharpness measures pull in directions known by hand: theory, and the rules that follow it.

* **hyperbola** ½(xy − 1)²: minima xy = 1, one curvature x² + y², so all measures agree; det H does not act at all.
* **valley** ½(e^{2u} a² + e^{−u} b²): minima a = b = 0, two curvatures, and a resting place in u for each measure.
* **scale-invariant** (2a² + b²)/(2|w|²): sharpness falls as |w| grows, with nothing gained.

Everything works on any number of copies at once, parameters (…, P), and repeats by seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ..cumulants import Sharpness, combined_gradient, determinant, determinant_share, frobenius, integral, signs, trace
from ..optim import EPSILON

__all__ = [
    "Rule",
    "flow",
    "hyperbola",
    "hyperbola_flow",
    "hyperbola_table",
    "invariance_table",
    "resting_place",
    "resting_table",
    "scale_flow",
    "scale_invariant",
    "scale_table",
    "simulate",
    "valley",
]

ValueAndGradient = Callable[[Tensor], tuple[Tensor, Tensor]]


def hyperbola(w: Tensor) -> tuple[Tensor, Tensor]:
    """½(xy − 1)² and its gradient; tr H = x² + y² everywhere."""
    residual = w[..., 0] * w[..., 1] - 1
    return residual.square() / 2, residual[..., None] * w.flip(-1)


def valley(w: Tensor) -> tuple[Tensor, Tensor]:
    """½(e^{2u} a² + e^{−u} b²) and its gradient, for w = (a, b, u)."""
    a, b, u = w.unbind(-1)
    first, second = torch.exp(2 * u), torch.exp(-u)
    slope = first * a.square() - second * b.square() / 2
    return (first * a.square() + second * b.square()) / 2, torch.stack([first * a, second * b, slope], -1)


def scale_invariant(w: Tensor) -> tuple[Tensor, Tensor]:
    """(2a² + b²)/(2|w|²) and its gradient, for w = (a, b, c)."""
    curvature = torch.tensor([2.0, 1.0, 0.0], dtype=w.dtype)
    square = w.square().sum(-1)
    value = (curvature * w.square()).sum(-1) / (2 * square)
    return value, (curvature - 2 * value[..., None]) * w / square[..., None]


@dataclass(frozen=True)
class Rule:
    """A way to step: ``sharpness`` and its settings, or "gd" or "sam" (with ``rho`` its radius)."""

    name: str
    sharpness: Sharpness | None = None
    strength: float = 0.0
    samples: int = 1
    paired: bool = True
    rho: float = 0.05
    learning_rate: float = 0.1
    half_width: float | None = None  # of a cube of directions; normal ones without
    slow: int = 1  # how many times as many steps as the others

    @property
    def pull(self) -> float:
        """λ ρ², the factor of the sharpness in the objective."""
        return self.strength * self.rho**2


def simulate(
    value_and_gradient: ValueAndGradient, start: Tensor, rule: Rule, steps: Sequence[int], seed: int = 0
) -> Tensor:
    """The copies (C, P) after each of some rising numbers of steps, shape (len(steps), C, P); NaN once diverged."""
    generator, w, taken, found = torch.Generator().manual_seed(seed), start, 0, []
    for goal in steps:
        for _ in range(goal - taken):
            w = _step(value_and_gradient, w, rule, generator)
        found.append(w)
        taken = goal
    return torch.stack(found)


def _step(value_and_gradient: ValueAndGradient, w: Tensor, rule: Rule, generator: torch.Generator) -> Tensor:
    loss, gradient = value_and_gradient(w)
    if rule.name == "sam":  # as samlib.sam_step, with a norm for each copy
        gradient = value_and_gradient(w + rule.rho * gradient / (gradient.norm(dim=-1, keepdim=True) + EPSILON))[1]
    if rule.sharpness is not None:
        x = torch.empty(rule.samples, *w.shape, dtype=w.dtype)
        if rule.half_width:
            x.uniform_(-rule.half_width, rule.half_width, generator=generator)
        else:
            x.normal_(generator=generator)
        around = value_and_gradient(torch.stack([w + sign * rule.rho * x for sign in signs(rule.paired)]))
        gradient = combined_gradient(loss, gradient, *around, rule.rho, rule.strength, rule.sharpness)
    return w - rule.learning_rate * gradient


def flow(velocity: Callable[[float], float], start: float, times: Sequence[float], pieces: int = 400) -> list[float]:
    """y(t) with y' = velocity(y), y(0) = start, at some rising times (Runge–Kutta of fourth order)."""
    y, before, found = start, 0.0, []
    for time in times:
        h = (time - before) / pieces
        for _ in range(pieces):
            k1 = velocity(y)
            k2 = velocity(y + h / 2 * k1)
            k3 = velocity(y + h / 2 * k2)
            k4 = velocity(y + h * k3)
            y += h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        found.append(y)
        before = time
    return found


def hyperbola_flow(sharpness: Sharpness, pull: float, start: float, times: Sequence[float]) -> list[float]:
    """tr H = s along the minima under dw/dt = −λρ² ∇_T S: s' = −4 λρ² (dS/ds)(s − 4/s).

    Args:
        sharpness: :func:`trace`, :func:`frobenius` or a :class:`determinant`. As s is the only curvature, S is s/2,
            s²/4 or log(1 + βs)/(2β).
        pull: λρ².
        start: s at time 0, at least 2.
        times: η × steps.
    """

    def slope(s: float) -> float:
        if isinstance(sharpness, determinant):
            return 1 / (2 * (1 + sharpness.beta * s))
        return 0.5 if sharpness is trace else s / 2

    return flow(lambda s: -4 * pull * slope(s) * (s - 4 / s), start, times)


def scale_flow(sharpness: Sharpness, pull: float, times: Sequence[float]) -> list[float]:
    """|w| = c from 1 under dc/dt = −λρ² dS/dc, where the curvatures are 2/c² and 1/c²; arguments as above."""

    def slope(c: float) -> float:
        if isinstance(sharpness, determinant):
            beta = sharpness.beta
            return -2 / (c * (c**2 + 2 * beta)) - 1 / (c * (c**2 + beta))
        return -3 / c**3 if sharpness is trace else -5 / c**5

    return flow(lambda c: -pull * slope(c), 1.0, times)


def resting_place(measure: str, beta: float = 1.0) -> float:
    """Where on the valley's floor a measure of diag(e^{2u}, e^{−u}) is least: its u.

    Args:
        measure: "sharpness" (λ_max), "frobenius_norm", "trace" or "log_determinant".
        beta: β of log det(I + βH): z = e^u solves 2z³ + βz² = 1.
    """
    if measure == "log_determinant":
        roots = np.roots([2, beta, 0, -1])
        return math.log(roots[(roots.imag == 0) & (roots.real > 0)].real[0])
    return {"sharpness": 0.0, "frobenius_norm": -math.log(2) / 6, "trace": -math.log(2) / 3}[measure]


_ONE = determinant(1.0)
_PUBLISHED = integral(lambda m: m**-2, lambda d: torch.exp(-d / 2))  # the reference code's determinant, for one sample

HYPERBOLA_RULES = (
    Rule("gd"),
    Rule("sam"),
    Rule("trace", trace, 4, 4),
    Rule("frobenius", frobenius, 1, 4),
    Rule("frobenius", frobenius, 0.2, 16, paired=False, slow=5),
    Rule("determinant", _ONE, 8, 16, slow=2),
)
"""Rules that follow the tangential flow, or have none."""

HYPERBOLA_FAILURES = (
    Rule("frobenius", frobenius, 1, 4, paired=False),
    Rule("determinant", _ONE, 4, 16, paired=False),
    Rule("published determinant", _PUBLISHED, 1, 1, paired=False, rho=1.0),
    Rule("published determinant", _PUBLISHED, 1, 1, paired=False, rho=1.0, half_width=0.01),
)
"""Past the edge ηl(1 + λl) = 2; an ascent, since λβl/(1 + βl) > 1; as published; and as published, with its cube."""


def hyperbola_table(seed: int = 0, copies: int = 32, steps: Sequence[int] = (300, 600, 1500)) -> pd.DataFrame:
    """tr H from (2.5, 0.41) on, over the copies that did not diverge, beside the tangential flow where it applies."""
    start = torch.tensor([2.5, 0.41], dtype=torch.float64).expand(copies, 2)
    settled = float(simulate(hyperbola, start[:1], HYPERBOLA_RULES[0], [500]).square().sum())
    rows = []
    for rule in HYPERBOLA_RULES + HYPERBOLA_FAILURES:
        path = simulate(hyperbola, start, rule, [n * rule.slow for n in steps], seed)
        theory = [math.nan] * len(steps)
        if rule.sharpness and rule in HYPERBOLA_RULES:
            times = [rule.learning_rate * n * rule.slow for n in steps]
            theory = hyperbola_flow(rule.sharpness, rule.pull, settled, times)
        for n, w, expected in zip(steps, path, theory, strict=True):
            values = {"trace": w.square().sum(-1), "loss": hyperbola(w)[0]}
            rows.append(_row(rule, values) | {"steps": n * rule.slow, "flow": expected})
    return pd.DataFrame(rows)


RESTING_RULES = (
    ("sharpness", Rule("sam", rho=0.1, learning_rate=0.2)),
    *(
        (measure, Rule(name, sharpness, strength, samples, paired, 0.1, 0.2, slow=slow))
        for measure, name, sharpness, strength, samples, paired, slow in (
            ("frobenius_norm", "frobenius", frobenius, 1, 8, True, 1),
            ("frobenius_norm", "frobenius", frobenius, 1, 2, True, 1),
            ("frobenius_norm", "frobenius", frobenius, 0.2, 16, False, 3),
            ("trace", "trace", trace, 2, 4, True, 1),
            ("trace", "trace", trace, 2, 4, False, 1),
            ("log_determinant", "determinant", _ONE, 6, 16, True, 1),
            ("log_determinant", "determinant", _ONE, 6, 2, True, 1),
            ("log_determinant", "determinant", _ONE, 6, 1, True, 1),
            ("log_determinant", "determinant", _ONE, 1, 16, False, 5),
            ("log_determinant", "determinant", determinant(10.0), 6, 32, True, 1),
        )
    ),
)


def resting_table(
    seed: int = 0, copies: int = 8, steps: int = 1500, rules: Sequence[tuple[str, Rule]] = RESTING_RULES
) -> pd.DataFrame:
    """u in the valley from 0.6 and from −0.9: the mean over the second half of the run, beside :func:`resting_place`.

    With two samples and fewer the determinant leans to the trace; with one it is the trace. ``share`` is that of the
    samples that count there, :func:`determinant_share`; ``wander`` the deviation along the path.
    """
    noise = torch.randn(2 * copies, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    starts = torch.tensor([0.6, -0.9], dtype=torch.float64).repeat_interleave(copies)
    start = torch.cat([0.05 * noise, starts[:, None]], 1)
    rows = []
    for measure, rule in rules:
        total = steps * rule.slow
        path = simulate(valley, start, rule, range(total // 2, total, max(1, total // 300)), seed)[..., 2]
        beta = rule.sharpness.beta if isinstance(rule.sharpness, determinant) else 1.0
        place = resting_place(measure, beta)
        share = determinant_share(torch.tensor([math.exp(2 * place), math.exp(-place)]), beta)
        for u, part in zip((0.6, -0.9), path.split(copies, 1), strict=True):
            row = _row(rule, {"u": part.mean(0)}) | {"start": u, "steps": total, "measure": measure, "beta": beta}
            rows.append(row | {"wander": float(part.std(0).mean()), "theory": place, "share": share})
    return pd.DataFrame(rows)


SCALE_RULES = (
    Rule("gd"),
    Rule("sam", rho=0.1),
    Rule("trace", trace, 1, 4, rho=0.1),
    Rule("frobenius", frobenius, 1, 8, rho=0.1),
    Rule("determinant", _ONE, 1, 16, rho=0.1),
)


def scale_table(seed: int = 0, copies: int = 16, steps: int = 3000) -> pd.DataFrame:
    """|w| and |w|² tr H of the scale-invariant loss: sharpness falls and the scaled one stays 3."""
    start = torch.tensor([0.02, 0.02, 1.0], dtype=torch.float64).expand(copies, 3)
    rows = []
    for rule in SCALE_RULES:
        w = simulate(scale_invariant, start, rule, [steps], seed)[0]
        square = w.square().sum(-1)
        scaled = 3 - 6 * scale_invariant(w)[0]  # |w|² tr H, by hand
        expected = (
            scale_flow(rule.sharpness, rule.pull, [rule.learning_rate * steps])[0] if rule.sharpness else math.nan
        )
        values = {"norm": square.sqrt(), "trace": scaled / square, "scaled_trace": scaled}
        rows.append(_row(rule, values) | {"steps": steps, "flow": expected})
    return pd.DataFrame(rows)


def invariance_table(x: float = 0.8, y: float = 1.0, factors: Sequence[float] = (1, 2, 5)) -> pd.DataFrame:
    """Measures of the hyperbola at (cx, y/c), where the loss is the same: det H does not change, all others do."""
    rows = []
    for c in factors:
        a, b, off = (y / c) ** 2, (c * x) ** 2, 2 * x * y - 1
        logs = math.log((1 + a) * (1 + b) - off**2)
        rows.append({"factor": c, "determinant": a * b - off**2, "trace": a + b, "log_determinant": logs})
    return pd.DataFrame(rows)


def _row(rule: Rule, values: dict[str, Tensor]) -> dict[str, Any]:
    """What a table says of a rule: its settings, and mean and deviation over the copies that are still finite."""
    finite = torch.stack(list(values.values())).isfinite().all(0)
    row: dict[str, Any] = {key: getattr(rule, key) for key in ("name", "strength", "samples", "paired", "rho")}
    row |= {"learning_rate": rule.learning_rate, "half_width": rule.half_width, "diverged": int((~finite).sum())}
    for key, value in values.items():
        deviation = math.nan if not finite.any() else float(value[finite].std(correction=0))
        row |= {key: float(value[finite].mean()), f"{key}_sd": deviation}
    return row
