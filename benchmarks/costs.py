"""What training and measuring cost, in gradients: products, SAM steps, measurements, grids, memory, imports, scaling.

    python benchmarks/costs.py                          # ten minutes, on an otherwise idle machine
    python benchmarks/costs.py --only measuring_share   # one part; the others stay as they were recorded

Ratios compare calls that took turns in this run. The limits beside them were set before the first run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import joblib
import numpy as np
import torch
from common import NETS, RESULTS, record, side_by_side, stack_speedup, trajectory
from torch import Tensor

from samlib import SAM, HessianOperator, RunConfig
from samlib.experiments.task import Task
from samlib.optim import sam_perturb, sam_step
from samlib.training import commit
from samlib.trajectory import Trajectory

LIMITS = {
    "product_in_gradients": 2.0,
    "sam_step_in_gradients": 2.05,
    "share_of_matmul_rate": 0.7,
    "measuring_share": {"SAM": 0.36, "GD": 0.58},
    "product_memory_gib": 3.0,
    "import_seconds": 0.3,
    "help_seconds": 0.5,
}


def network(name: str) -> dict[str, Any]:
    """A product, its setup and SAM steps by several tools, in gradients."""
    experiment, [(step, params)] = trajectory(name, 1)
    config, objective = experiment.config, experiment.objective(step)
    operator = HessianOperator(objective, params)
    vector = torch.randn(len(params), generator=torch.Generator().manual_seed(0))
    settings = {"lr": config.learning_rate, "rho": config.rho}

    def loop_steps() -> dict[str, Callable[[], Any]]:
        """A module trained by people's own loops: two backward passes by hand, our optimizer, a peer's."""
        from pytorch_optimizer import SAM as PeerSAM

        model = experiment.model
        torch.nn.utils.vector_to_parameters(params, model.parameters())
        weights = list(model.parameters())
        ours = SAM(weights, torch.optim.SGD, **settings)
        peer = PeerSAM(weights, torch.optim.SGD, **settings)

        def backward() -> Tensor:
            model.zero_grad()
            for x, y in zip(
                objective.inputs.split(objective.chunk_size), objective.targets.split(objective.chunk_size), strict=True
            ):
                loss = objective.loss(model(x), y) * (len(x) / len(objective.inputs))
                loss.backward()
            return loss.detach()

        @torch.no_grad()
        def by_hand() -> None:
            with torch.enable_grad():
                backward()
            scale = config.rho / (torch.nn.utils.get_total_norm([p.grad for p in weights if p.grad is not None]) + 1e-5)
            saved = [p.clone() for p in weights]
            for p in weights:
                p.add_(p.grad * scale)  # type: ignore[operator]
            with torch.enable_grad():
                backward()
            for p, original in zip(weights, saved, strict=True):
                p.copy_(original).sub_(config.learning_rate * p.grad)  # type: ignore[operator]

        def peer_step() -> None:
            backward()
            peer.step(lambda: backward())

        return {
            "module gradient": backward,
            "two backward passes by hand": by_hand,
            "samlib.SAM": lambda: ours.step(backward),
            "pytorch_optimizer": peer_step,
        }

    calls: dict[str, Callable[[], Any]] = {
        "gradient": lambda: objective.gradient(params),
        "product": lambda: operator @ vector,
        "setup": lambda: HessianOperator(objective, params),
        "sam_step": lambda: sam_step(objective.gradient, params, config.learning_rate, config.rho),
        "update": lambda: params - config.learning_rate * sam_perturb(params, vector, config.rho),
        **loop_steps(),
    }
    seconds = side_by_side(calls)
    one, module = seconds["gradient"], seconds["module gradient"]
    return {
        "gradient_seconds": one,
        "product_in_gradients": seconds["product"] / one,
        "setup_in_gradients": seconds["setup"] / one,
        "sam_step_in_gradients": (seconds["sam_step"] - seconds["update"]) / one,
        "optimizers_in_module_gradients": {
            name: seconds[name] / module for name in ("two backward passes by hand", "samlib.SAM", "pytorch_optimizer")
        },
    }


def matmul_rate(size: int = 1536) -> float:
    """Floating-point operations per second of a float32 matrix product with all threads; the best of ten."""
    a = torch.randn(size, size)
    best = math.inf
    for _ in range(10):
        started = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def products_of_a_gradient(config: RunConfig, inputs: int, examples: int) -> float:
    """Operations in the matrix products of one gradient of the MLP: the first layer's input needs no derivative."""
    sizes = [inputs] + [config.width] * (config.depth - 1) + [10]
    layers = [2 * examples * a * b for a, b in itertools.pairwise(sizes)]
    return float(3 * sum(layers) - layers[0])


def grids(steps: int = 150) -> dict[str, Any]:
    """Two SAM runs side by side, a thread each, as a grid is trained: how much of the matmul rate they reach."""

    def train(config: RunConfig) -> None:
        torch.set_num_threads(1)
        experiment = Task(config)
        objective, params = experiment.objective(0), experiment.initial_parameters()
        for _ in range(steps):
            params = sam_step(objective.gradient, params, config.learning_rate, config.rho)

    cores = joblib.cpu_count(only_physical_cores=False)
    result: dict[str, Any] = {}
    for name, more in (("mnist quick", {}), ("digits", {"data": "standin", "examples": None, "width": 100})):
        config = RunConfig(experiment="mnist", device="cpu", learning_rate=0.3, rho=0.1, **more)
        data = config.load_dataset()
        one = products_of_a_gradient(config, data.train_inputs[0].numel(), len(data.train_inputs))
        with joblib.Parallel(cores) as parallel:
            parallel(joblib.delayed(train)(config) for _ in range(cores))  # warms the processes up
            started = time.perf_counter()
            parallel(joblib.delayed(train)(config) for _ in range(cores))
            seconds = time.perf_counter() - started
        result[name] = {"share_of_matmul_rate": 2 * steps * cores * one / seconds / matmul_rate()}
        result[name]["stack_speedup"] = stack_speedup(Task(config, data), 12)
    return result


def measuring(rho: float, learning_rate: float) -> float:
    """What the measurements add to the time of the steps, MNIST quick, measured every 25 steps; median of five runs."""
    return statistics.median(_measuring(rho, learning_rate) for _ in range(5))


def _measuring(rho: float, learning_rate: float) -> float:
    config = RunConfig(experiment="mnist", device="cpu", learning_rate=learning_rate, rho=rho)
    trajectory = Trajectory("", Task(config))
    spent: dict[bool, list[float]] = {True: [], False: []}
    for step in range(301):
        measured = step % 25 == 0
        started = time.perf_counter()
        trajectory.advance({"every": 0.0} if measured else {})
        spent[measured].append(time.perf_counter() - started)
    plain = statistics.mean(spent[False])
    return sum(seconds - plain for seconds in spent[True][1:]) / (300 * plain)


def product_memory(examples: int) -> dict[str, Any]:
    """Peak memory of a process that takes one product of the full MNIST objective at width 1,000."""
    config = RunConfig(experiment="mnist", profile="paper", device="cpu", learning_rate=0.1, rho=0.1, examples=examples)
    experiment = Task(config)
    params = experiment.initial_parameters()
    HessianOperator(experiment.objective(0), params) @ params
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"examples": len(experiment.dataset.train_inputs), "product_memory_gib": peak}


def memory() -> dict[str, Any]:
    """The same in a process of its own, for all 60,000 examples."""
    alone = subprocess.run(
        [sys.executable, __file__, "--memory", "60000"], capture_output=True, encoding="utf-8", check=True
    )
    return json.loads(alone.stdout)


def start_up() -> dict[str, float]:
    def seconds(*command: str) -> float:
        taken = []
        for _ in range(7):
            started = time.perf_counter()
            subprocess.run([sys.executable, *command], check=True, capture_output=True)
            taken.append(time.perf_counter() - started)
        return statistics.median(taken)

    plain, ours = seconds("-c", "import torch"), seconds("-c", "import torch, samlib")
    used = seconds("-c", "import torch, samlib; samlib.train, samlib.SAM")
    return {
        "import_seconds": ours - plain,
        "training_seconds": used - plain,
        "help_seconds": seconds("-m", "samlib", "--help"),
    }


def scaling() -> dict[str, Any]:
    """Seconds of a step and of a product against examples and width, and the exponents that fit them."""
    result: dict[str, Any] = {}
    for axis, values in (("examples", (1000, 4000, 16000, 60000)), ("width", (100, 250, 500, 1000, 2000))):
        rows = []
        for value in values:
            more = {"examples": value} if axis == "examples" else {"examples": 1000, "width": value}
            config = RunConfig(experiment="mnist", device="cpu", learning_rate=0.1, rho=0.1, **more)
            experiment = Task(config)
            objective, params = experiment.objective(0), experiment.initial_parameters()
            operator = HessianOperator(objective, params)
            calls = {
                "step": lambda: sam_step(objective.gradient, params, 0.1, 0.1),  # noqa: B023 – called at once
                "product": lambda: operator @ params,  # noqa: B023
            }
            rows.append({axis: len(experiment.dataset.train_inputs) if axis == "examples" else value})
            rows[-1] |= side_by_side(calls, repeats=3)
        logs = {key: np.log([row[key] for row in rows]) for key in rows[0]}
        fits = {key: float(np.polyfit(logs[axis], logs[key], 1)[0]) for key in ("step", "product")}
        result[axis] = {"rows": rows, "exponents": fits}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", type=int, help="only the memory of a product with this many examples")
    parts: dict[str, Callable[[], Any]] = {
        "nets": lambda: {name: network(name) for name in NETS},
        "grids": grids,
        "measuring_share": lambda: {"SAM": measuring(0.1, 0.3), "GD": measuring(0.0, 1.0)},
        "memory": memory,
        "start_up": start_up,
        "scaling": scaling,
    }
    parser.add_argument("--only", choices=parts, help="measure one part again")
    options = parser.parse_args()
    if options.memory:
        print(json.dumps(product_memory(options.memory)))
        return
    chosen = [options.only] if options.only else list(parts)
    recorded = json.loads((RESULTS / "costs.json").read_text(encoding="utf-8")) if options.only else {}
    recorded.pop("machine", None)
    # Parts measured apart say at which commit.
    apart = {**recorded.get("commits", {}), **dict.fromkeys(chosen, commit())}
    record("costs", {**recorded, "limits": LIMITS, "commits": apart, **{name: parts[name]() for name in chosen}})


if __name__ == "__main__":
    main()
