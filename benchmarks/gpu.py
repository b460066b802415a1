"""What a gradient, a SAM step, a Hessian–vector product and a measurement cost on a GPU, beside the least they could.

    python benchmarks/gpu.py                  # the paper's sizes on a GPU, into results/gpu.json: some minutes
    python benchmarks/gpu.py --device cpu     # a trial at the quick sizes; nothing is written

The floor of a call is the time that its arithmetic would take at the device's measured rate of matrix products, or its
memory traffic at the measured rate of copies, whichever is longer. The traffic is that of the operations as written:
each reads its arguments and writes its results once. A compiled program fuses operations and may come out below.
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
from collections.abc import Callable
from typing import Any

import joblib
import torch
from common import NETS, RESULTS, record, side_by_side, stack_speedup
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from samlib import HessianOperator, Objective, RunConfig
from samlib.experiments.task import Task, exact_on_cuda
from samlib.layers import plain
from samlib.objective import compiled_kernel, pure_loss
from samlib.observables import measure
from samlib.optim import sam_step

REPEATS = 7


class ByteCounter(TorchDispatchMode):
    """Counts the bytes of the arguments and results of every operation that is not a mere view."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
            self.total += sum(t.numel() * t.element_size() for t in tensors)
        return result


def rates(device: str, size: int) -> tuple[float, float]:
    """Floating-point operations per second of a float32 matrix product, and bytes per second of a copy."""
    a = torch.randn(size, size, device=device)
    long = torch.empty(64 * 2**20 if device == "cuda" else 2**22, device=device)
    other = torch.empty_like(long)
    seconds = side_by_side({"product": lambda: a @ a, "copy": lambda: other.copy_(long)}, REPEATS)
    return 2 * size**3 / seconds["product"], 2 * long.numel() * long.element_size() / seconds["copy"]


def floor(call: Callable[[], Any], flops_per_second: float, bytes_per_second: float) -> dict[str, float]:
    with FlopCounterMode(display=False) as flops, ByteCounter() as traffic:
        call()
    arithmetic, memory = flops.get_total_flops() / flops_per_second, traffic.total / bytes_per_second
    return {"flops": float(flops.get_total_flops()), "bytes": float(traffic.total), "seconds": max(arithmetic, memory)}


def network(config: RunConfig, speed: tuple[float, float]) -> dict[str, Any]:
    """Every call in each of its forms: seconds, and in floors."""
    experiment = Task(config)
    objective, params = experiment.objective(0), experiment.initial_parameters()
    x, y = objective.inputs, objective.targets
    vector = torch.randn(len(params), generator=torch.Generator().manual_seed(0)).to(params)
    operator = HessianOperator(objective, params)
    gradient = torch.func.grad(pure_loss(experiment.model, experiment.loss))

    def product(w: Tensor, v: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return torch.func.jvp(lambda u: gradient(u, x, y), (w,), (v,))[1]

    modes = {"compiled": "default", **({"CUDA graph": "reduce-overhead"} if config.device == "cuda" else {})}
    gradients: dict[str, Callable[[Tensor], Tensor]] = {"eager": objective.gradient}
    products: dict[str, Callable[[], Tensor]] = {"eager": lambda: operator @ vector}
    for name, mode in modes.items():
        kernel = compiled_kernel(experiment.model, experiment.loss, cuda_graph=name == "CUDA graph")
        more = {"chunk_size": objective.chunk_size, "kernel": kernel}
        gradients[name] = Objective(experiment.model, experiment.loss, x, y, **more).gradient
        compiled = torch.compile(product, dynamic=False, mode=mode)
        products[name] = lambda compiled=compiled: compiled(params, vector, x, y)  # type: ignore[misc]

    memory: dict[str, Any] = {}
    measure(experiment, params, 0, memory)
    after = sam_step(objective.gradient, params, config.learning_rate, config.rho)
    row = measure(experiment, after, 1, dict(memory))
    calls: dict[str, dict[str, Callable[[], Any]]] = {
        "gradient": {name: lambda g=g: g(params) for name, g in gradients.items()},
        "sam_step": {
            name: lambda g=g: sam_step(g, params, config.learning_rate, config.rho) for name, g in gradients.items()
        },
        "setup": {"eager": lambda: HessianOperator(objective, params)},
        "product": products | peers(experiment, objective, params, vector),
        "measurement": {"eager": lambda: measure(experiment, after, 1, dict(memory))},
    }
    result: dict[str, Any] = {"parameters": len(params), "matvecs": row["matvecs"]}
    for what, forms in calls.items():
        seconds = side_by_side(forms, REPEATS)
        least = floor(forms["eager"], *speed)
        in_floors = {name: value / least["seconds"] for name, value in seconds.items()}
        result[what] = {"seconds": seconds, "floor": least, "in_floors": in_floors}
        print(config.experiment, what, {name: f"{value:.3g}" for name, value in in_floors.items()}, flush=True)
    return result


def peers(experiment: Task, objective: Objective, params: Tensor, vector: Tensor) -> dict[str, Callable[[], Any]]:
    """A product by other tools, those that are there; both rebuild or keep graphs in their own way."""
    model = plain(type(experiment)(experiment.config, experiment.dataset).model)
    torch.nn.utils.vector_to_parameters(params, model.parameters())
    weights = list(model.parameters())
    pieces = [p.view_as(w) for p, w in zip(vector.split([w.numel() for w in weights]), weights, strict=True)]
    x, y = objective.inputs, objective.targets
    found: dict[str, Callable[[], Any]] = {}
    try:
        package = importlib.import_module("pyhessian.utils")
        loss = experiment.loss(model(x), y)
        grads = torch.autograd.grad(loss, weights, create_graph=True)
        found["PyHessian"] = lambda: package.hessian_vector_product(grads, weights, pieces)
    except ImportError:
        pass
    try:
        curvlinops = importlib.import_module("curvlinops")
        if y.is_floating_point():
            hessian = curvlinops.HessianLinearOperator(
                model, torch.nn.MSELoss(), weights, [(x, y)], check_deterministic=False
            )
            found["curvlinops"] = lambda: hessian @ vector
    except ImportError:
        pass
    return found


def grids(device: str, runs: int, steps: int) -> dict[str, Any]:
    """How much faster a grid is as one stack, and as processes that share the device, than run after run."""

    def train(config: RunConfig) -> tuple[float, float]:
        """When training began, with the data at hand, and when it ended."""
        experiment = Task(config)
        params = sam_step(experiment.objective(0).gradient, experiment.initial_parameters(), 0.0, config.rho)
        params.sum().item()
        began = time.time()
        for step in range(steps):
            params = sam_step(experiment.objective(step).gradient, params, config.learning_rate, config.rho)
        params.sum().item()
        return began, time.time()

    result = {}
    for name, (config, _, _) in NETS.items():
        for profile in ("quick", "reduced") if device == "cuda" else ("quick",):
            point = {"learning_rate": config.learning_rate, "rho": config.rho, "device": device, "profile": profile}
            point["data"] = "real" if device == "cuda" else "auto"
            small = RunConfig(experiment=name, **point)
            in_turn = sum(end - begin for begin, end in (train(small) for _ in range(4)))
            with joblib.Parallel(4) as parallel:
                for _ in range(2):  # the first time starts the processes
                    begins, ends = zip(*parallel(joblib.delayed(train)(small) for _ in range(4)), strict=True)
            stacked = stack_speedup(Task(small), runs, 3)
            together = max(ends) - min(begins)
            result[f"{name} {profile}"] = {"stack_speedup": stacked, "four_processes_speedup": in_turn / together}
            print(f"{name} {profile}", result[f"{name} {profile}"], flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=list(NETS), help="others stay as recorded")
    parser.add_argument("--no-grids", action="store_true", help="leave out the grids")
    options = parser.parse_args()
    gpu = options.device == "cuda"
    if gpu and not torch.cuda.is_available():
        parser.error("PyTorch sees no CUDA device here; a trial without one: --device cpu")
    if gpu:
        exact_on_cuda()  # before the first matrix product
    speed = rates(options.device, 8192 if gpu else 1024)
    path = RESULTS / "gpu.json"
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if gpu and path.exists() else {"nets": {}}
    result.pop("machine", None)
    result |= {"matmul_flops_per_second": speed[0], "copy_bytes_per_second": speed[1]}
    for name in options.nets:
        usual, _, _ = NETS[name]
        point = {"learning_rate": usual.learning_rate, "rho": usual.rho, "device": options.device}
        point |= {"profile": "paper", "data": "real"} if gpu else {"profile": "quick"}
        result["nets"][name] = network(RunConfig(experiment=name, **point), speed)
        if gpu:
            record("gpu", result)  # at once: the next one may take longer than there is time
    if not options.no_grids:
        result["grids"] = grids(options.device, runs=12 if gpu else 3, steps=200 if gpu else 10)
        if gpu:
            record("gpu", result)


if __name__ == "__main__":
    main()
