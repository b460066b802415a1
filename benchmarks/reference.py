"""What a step of the MLP costs against one that JAX compiles, as the paper's own code does it.

    pip install jax
    python benchmarks/reference.py

The same network, data and (η, ρ) on both sides, in float32, on one core. Ours is the laboratory's whole step, as it
comes and with ``compiled``; JAX's is the bare update of a pytree of weights, compiled as one program.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import torch
from common import record, side_by_side

from samlib import RunConfig
from samlib.experiments.task import Task
from samlib.optim import EPSILON
from samlib.trajectory import Trajectory

RATE, RHO = 0.1, 0.1
STEPS = {200: 10, 1000: 2}  # timed at a time, by width

Params = list[tuple[jax.Array, jax.Array]]


def loss(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
    for weight, bias in params[:-1]:
        x = jax.nn.relu(x @ weight + bias)
    weight, bias = params[-1]
    return ((x @ weight + bias - y) ** 2).mean()


def step_of_jax(rho: float) -> Callable[..., Params]:
    """SAM's step, or that of gradient descent for ρ = 0, as one compiled program."""

    @jax.jit
    def step(params: Params, x: jax.Array, y: jax.Array) -> Params:
        gradient = jax.grad(loss)
        g = gradient(params, x, y)
        if rho:
            norm = jnp.sqrt(sum(jnp.vdot(part, part) for part in jax.tree.leaves(g)))
            g = gradient(jax.tree.map(lambda w, part: w + rho / (norm + EPSILON) * part, params, g), x, y)
        return jax.tree.map(lambda w, part: w - RATE * part, params, g)

    return step


def measure(width: int, rho: float) -> dict[str, Any]:
    count = STEPS[width]
    config = RunConfig(experiment="mnist", device="cpu", width=width, learning_rate=RATE, rho=rho)
    ours = {
        name: Trajectory("", Task(config.model_copy(update={"compiled": compiled})))
        for name, compiled in (("eager", False), ("compiled", True))
    }
    task = ours["eager"].task
    objective, modules = task.objective(0), [m for m in task.model if isinstance(m, torch.nn.Linear)]
    x, y = (jnp.asarray(part.flatten(1).numpy()) for part in (objective.inputs, objective.targets))
    weights = [(jnp.asarray(m.weight.detach().T.numpy()), jnp.asarray(m.bias.detach().numpy())) for m in modules]
    step = step_of_jax(rho)

    def theirs() -> Params:
        params = weights
        for _ in range(count):
            params = step(params, x, y)
        return jax.block_until_ready(params)

    def steps(trajectory: Trajectory) -> None:
        for _ in range(count):
            trajectory.advance({})

    # Do both sides do the same? The loss after as many steps tells.
    steps(ours["eager"])
    with torch.no_grad():
        here, there = float(objective.value(ours["eager"].params)), float(loss(theirs(), x, y))
    if abs(here - there) > 1e-4 * there:
        raise RuntimeError(f"after {count} steps the loss is {here} here and {there} with JAX")

    calls = {"jax": theirs, **{name: lambda one=one: steps(one) for name, one in ours.items()}}
    seconds = side_by_side(calls, repeats=9)
    return {
        "milliseconds": {name: 1e3 * value / count for name, value in seconds.items()},
        "ratio": {name: seconds[name] / seconds["jax"] for name in ours},
    }


def main() -> None:
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # before JAX counts the cores, at its first array
    torch.set_num_threads(1)
    nets = {
        f"width {width}, {rule}": measure(width, rho) for width in STEPS for rule, rho in (("SAM", RHO), ("GD", 0.0))
    }
    record("reference", {"jax": jax.__version__, "examples": 1000, "nets": nets})


if __name__ == "__main__":
    main()
