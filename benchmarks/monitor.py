"""What a measurement of a ResNet-18 costs: peak memory beyond a training step's, and time in training steps.

Batches of 128 images of 32 × 32, 11.7 million parameters. Memory over 20 batches: each case runs in a process of its
own, whose peak of resident memory counts, and the solver stops early, since a further product keeps nothing more. Time
in processor time, on fewer batches, beside PyHessian where it is installed. The result goes to results/monitor.json.
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

BATCHES, TIMED, BATCH, VECTORS = 20, 2, 128, 12

CASES = {"start": BATCHES, "step": BATCHES, "memory": BATCHES, "monitor": TIMED, "pyhessian": TIMED}


def peak() -> int:
    """Most memory that this process has held so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def case(name: str) -> dict[str, Any]:
    """Peak memory and seconds of one training step, or of a measurement after it."""
    torch.manual_seed(0)
    model = from_torchvision("models").resnet18()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = [(torch.randn(BATCH, 3, 32, 32), torch.randint(0, 1000, (BATCH,))) for _ in range(CASES[name])]
    size = sum(p.numel() for p in model.parameters())
    found: dict[str, Any] = {"parameters": size}
    if name != "start":
        for inputs, targets in loader[:2]:
            started = time.process_time()
            optimizer.zero_grad()
            cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            found["step_seconds"] = time.process_time() - started
    optimizer.zero_grad()
    if name == "memory":
        EdgeMonitor(model, cross_entropy, loader, optimizer, tol=0.5).measure()
    elif name == "monitor":
        monitor = EdgeMonitor(model, cross_entropy, loader, optimizer)
        for temperature in ("cold", "warm"):
            started = time.process_time()
            row = monitor.measure()
            found[f"{temperature}_seconds"] = time.process_time() - started
            found[f"{temperature}_matvecs"] = row["matvecs"]
        found |= {"sharpness": row["sharpness"], "residual": row["sharpness_residual"]}
    elif name == "pyhessian":
        from pyhessian import hessian

        model.eval()
        started = time.process_time()
        values, _ = hessian(model, cross_entropy, dataloader=loader, cuda=False).eigenvalues(top_n=1)
        found |= {"cold_seconds": time.process_time() - started, "sharpness": float(values[0])}
    return {**found, "peak": peak()}


def alone(name: str) -> dict[str, Any] | None:
    """A case in a process of its own; None where it cannot run."""
    command = [sys.executable, __file__, "--case", name]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        print(f"{name}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return None
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=CASES)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(case(options.case)))
        return
    from common import record

    found = {name: alone(name) for name in CASES}
    start, step, memory = found["start"], found["step"], found["memory"]
    if start is None or step is None or memory is None:
        raise SystemExit("the benchmark needs torchvision, see above")
    vector = 4 * memory["parameters"]
    result: dict[str, Any] = {
        "parameters": memory["parameters"],
        "batches": {"memory": BATCHES, "time": TIMED},
        "vectors_beyond_a_step": (memory["peak"] - step["peak"]) / vector,
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
