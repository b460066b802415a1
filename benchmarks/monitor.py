"""What a measurement of a ResNet-18 costs: peak memory beyond a training step's, and time in training steps.

20 batches of 128 images of 32 × 32, 11.7 million parameters, beside PyHessian where it is installed. Each case
runs in a process of its own, whose peak of resident memory counts. The result goes to results/monitor.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from samlib import EdgeMonitor
from samlib.datasets.images import from_torchvision

BATCHES, BATCH, VECTORS = 20, 128, 12

CASES = ("start", "step", "monitor", "pyhessian")


def peak() -> int:
    """Most memory that this process has held so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def case(name: str, batches: int) -> dict[str, Any]:
    """Peak memory and seconds of one training step, or of a measurement after it."""
    torch.manual_seed(0)
    model = from_torchvision("models").resnet18()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = [(torch.randn(BATCH, 3, 32, 32), torch.randint(0, 1000, (BATCH,))) for _ in range(batches)]
    size = sum(p.numel() for p in model.parameters())
    found: dict[str, Any] = {"parameters": size}
    if name != "start":
        for inputs, targets in loader[:2]:
            started = time.perf_counter()
            optimizer.zero_grad()
            cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            found["step_seconds"] = time.perf_counter() - started
    optimizer.zero_grad()
    if name == "monitor":
        monitor = EdgeMonitor(model, cross_entropy, loader, optimizer)
        for temperature in ("cold", "warm"):
            started = time.perf_counter()
            row = monitor.measure()
            found[f"{temperature}_seconds"] = time.perf_counter() - started
            found[f"{temperature}_matvecs"] = row["matvecs"]
        found |= {"sharpness": row["sharpness"], "residual": row["sharpness_residual"]}
    elif name == "pyhessian":
        from pyhessian import hessian

        model.eval()
        started = time.perf_counter()
        values, _ = hessian(model, cross_entropy, dataloader=loader, cuda=False).eigenvalues(top_n=1)
        found |= {"cold_seconds": time.perf_counter() - started, "sharpness": float(values[0])}
    return {**found, "peak": peak()}


def alone(name: str, batches: int) -> dict[str, Any] | None:
    """A case in a process of its own; None where it cannot run."""
    command = [sys.executable, __file__, "--case", name, "--batches", str(batches)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        print(f"{name}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return None
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=CASES)
    parser.add_argument("--batches", type=int, default=BATCHES)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(case(options.case, options.batches)))
        return
    from common import record

    found = {name: alone(name, options.batches) for name in CASES}
    start, step, measured = found["start"], found["step"], found["monitor"]
    if start is None or step is None or measured is None:
        raise SystemExit("the benchmark needs torchvision, see above")
    vector = 4 * measured["parameters"]
    result: dict[str, Any] = {
        "parameters": measured["parameters"],
        "batches": options.batches,
        "vectors_beyond_a_step": (measured["peak"] - step["peak"]) / vector,
        "vectors_of_a_step": (step["peak"] - start["peak"]) / vector,
        "limit": VECTORS,
    }
    for name in ("monitor", "pyhessian"):
        if one := found[name]:
            per_step = one["step_seconds"]
            result[name] = {k: v for k, v in one.items() if k in ("sharpness", "residual") or k.endswith("matvecs")}
            result[name] |= {
                k.replace("seconds", "in_training_steps"): v / per_step
                for k, v in one.items()
                if k in ("cold_seconds", "warm_seconds")
            }
    record("monitor", result)


if __name__ == "__main__":
    main()
