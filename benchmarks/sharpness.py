"""Sharpness along a trajectory at the edge, by samlib and by its peers: products, error and time of each measurement.

    python benchmarks/sharpness.py            # ten minutes, on an otherwise idle machine

Every solver looks at the same points of the same networks, in turns, and may start from what it found at the point
before, where it knows how to. Each has a few settings, from loose to tight. Of those that are right to 1e-3 at nine
points of ten, the one with the fewest products counts; that rule was fixed before the first run. The truth at each
point is ARPACK's, converged to 1e-6.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.sparse.linalg
import torch
from common import NETS, record, trajectory
from torch import Tensor

from samlib import HessianOperator, Objective, power_iteration
from samlib.eigen import extreme_eigenpairs
from samlib.layers import plain

ACCURACY = 1e-3
SHARE = 0.9

# A solver measures λ of an objective at w, from its own state at the point before: (value, products, new state).
Solver = Callable[[Objective, Tensor, Any], tuple[float, int, Any]]


def samlib_solver(objective: Objective, params: Tensor, state: Any, value_tol: float) -> tuple[float, int, Any]:
    operator = HessianOperator(objective, params)
    generator = torch.Generator().manual_seed(0)
    found = extreme_eigenpairs(
        operator, 1, 1, state, tol=3e-3, value_tol=value_tol, generator=generator, explore=0 if state is not None else 6
    )
    return float(found.values.abs().max()), found.matvecs, found.model


def reference(objective: Objective, params: Tensor, state: Any, tol: float) -> tuple[float, int, Any]:
    found = power_iteration(objective.gradient, params, tol=tol, v0=state)
    return float(found.values[0].abs()), found.matvecs, found.vectors[:, 0]


class Curvlinops:
    """curvlinops' Hessian as a SciPy operator that counts its products."""

    def __init__(self, objective: Objective, params: Tensor) -> None:
        from curvlinops import HessianLinearOperator

        torch.nn.utils.vector_to_parameters(params, objective.model.parameters())
        x, y = objective.inputs, objective.targets
        loss: torch.nn.Module = torch.nn.MSELoss()
        model = objective.model
        if not y.is_floating_point():  # tokens: positions become examples
            loss, y = torch.nn.CrossEntropyLoss(), y.flatten()
            model = torch.nn.Sequential(model, torch.nn.Flatten(0, 1))
        self.hessian = HessianLinearOperator(
            model, loss, list(objective.model.parameters()), [(x, y)], check_deterministic=False
        )
        self.matvecs = 0
        self.scipy = scipy.sparse.linalg.LinearOperator(
            (len(params), len(params)), matvec=self.matvec, matmat=self.matmat, dtype=np.float32
        )

    def matvec(self, v: np.ndarray) -> np.ndarray:
        self.matvecs += 1
        return (self.hessian @ torch.as_tensor(v.ravel(), dtype=torch.float32)).detach().numpy()

    def matmat(self, block: np.ndarray) -> np.ndarray:
        return np.stack([self.matvec(column) for column in block.T], 1)


def curvlinops_eigsh(
    objective: Objective, params: Tensor, state: Any, tol: float, ncv: int | None
) -> tuple[float, int, Any]:
    operator = Curvlinops(objective, params)
    values, vectors = scipy.sparse.linalg.eigsh(operator.scipy, 1, which="LM", v0=state, tol=tol, ncv=ncv)
    return float(abs(values[0])), operator.matvecs, vectors[:, 0]


def curvlinops_lobpcg(
    objective: Objective, params: Tensor, state: Any, iterations: int, block: int
) -> tuple[float, int, Any]:
    operator = Curvlinops(objective, params)
    start = np.random.default_rng(0).normal(size=(len(params), block)).astype(np.float32) if state is None else state
    values, vectors = scipy.sparse.linalg.lobpcg(operator.scipy, start, tol=1e-9, maxiter=iterations)
    return float(np.abs(values).max()), operator.matvecs, vectors


def pyhessian(objective: Objective, params: Tensor, state: Any, tol: float) -> tuple[float, int, Any]:
    package = importlib.import_module("pyhessian.hessian")
    torch.nn.utils.vector_to_parameters(params, objective.model.parameters())
    objective.model.zero_grad()
    torch.manual_seed(0)
    spent = 0
    product = package.hessian_vector_product

    def counted(*arguments: Any) -> Any:
        nonlocal spent
        spent += 1
        return product(*arguments)

    package.hessian_vector_product = counted
    try:
        peer = package.hessian(objective.model, objective.loss, data=(objective.inputs, objective.targets), cuda=False)
        values, _ = peer.eigenvalues(maxIter=100, tol=tol)
    finally:
        package.hessian_vector_product = product
    return abs(values[0]), spent, None


def solvers() -> dict[str, dict[str, Solver]]:
    """Each solver's settings, from loose to tight."""

    def ladder(solver: Callable[..., Any], **axes: Any) -> dict[str, Solver]:
        (name, values), *more = axes.items()
        if not more:
            return {f"{name}={value}": functools.partial(solver, **{name: value}) for value in values}
        return {
            f"{name}={value}, {label}": functools.partial(inner, **{name: value})
            for value in values
            for label, inner in ladder(solver, **dict(more)).items()
        }

    return {
        "samlib": ladder(samlib_solver, value_tol=(1e-2, 3e-3, 1e-3, 3e-4, 0.0)),
        "curvlinops + SciPy eigsh": ladder(curvlinops_eigsh, ncv=(6, 10, None), tol=(1e-1, 1e-3)),
        "curvlinops + SciPy LOBPCG": ladder(curvlinops_lobpcg, block=(1, 3), iterations=(5, 10, 20)),
        "PyHessian": ladder(pyhessian, tol=(1e-2, 1e-3, 1e-4, 1e-5)),
        "reference (finite differences)": ladder(reference, tol=(1e-2, 1e-3, 1e-4, 1e-5)),
    }


def truth(objective: Objective, params: Tensor) -> float:
    operator = Curvlinops(objective, params)
    return float(abs(scipy.sparse.linalg.eigsh(operator.scipy, 1, which="LM", tol=1e-6)[0][0]))


def compare(name: str, count: int) -> dict[str, Any]:
    experiment, points = trajectory(name, count)
    plain_model = plain(experiment_model(experiment))
    settings = {(s, label): call for s, ladder in solvers().items() for label, call in ladder.items()}
    rows: dict[tuple[str, str], list[tuple[float, int, float]]] = {key: [] for key in settings}
    states: dict[tuple[str, str], Any] = dict.fromkeys(settings)
    for step, params in points:
        ours = experiment.objective(step)
        theirs = Objective(plain_model, ours.loss, ours.inputs, ours.targets)
        exact = truth(theirs, params)
        for key, call in settings.items():
            objective = theirs if key[0].startswith("curvlinops") else ours
            started = time.perf_counter()
            value, matvecs, states[key] = call(objective, params, states[key])
            rows[key].append((abs(value - exact) / exact, matvecs, time.perf_counter() - started))
        print(name, step, f"λ {exact:.5g}", flush=True)
    tables: dict[str, Any] = {}
    for (solver, label), measured in rows.items():
        errors, matvecs, seconds = zip(*measured[1:], strict=True)  # at the first point nobody has a start
        tables.setdefault(solver, {})[label] = {
            "matvecs": statistics.median(matvecs),
            "seconds": statistics.median(seconds),
            "median_error": statistics.median(errors),
            "share_within": float(np.mean(np.array(errors) <= ACCURACY)),
        }
    best: dict[str, Any] = {}
    for solver, table in tables.items():
        right = {label: row for label, row in table.items() if row["share_within"] >= SHARE}
        pool = right or {max(table, key=lambda k: (table[k]["share_within"], -table[k]["median_error"])): {}}
        label = min(pool, key=lambda k: table[k]["matvecs"])
        best[solver] = {"setting": label, "accurate": bool(right), **table[label]}
    peers = [row for solver, row in best.items() if solver != "samlib" and row["accurate"]]
    ratios = {
        f"{what}_ratio": min(row[what] for row in peers) / best["samlib"][what]
        for what in ("matvecs", "seconds")
        if peers
    }
    return {"parameters": len(points[0][1]), "points": count, "best": best, **ratios, "settings": tables}


def experiment_model(experiment: Any) -> torch.nn.Module:
    """A second copy of the network, for :func:`samlib.layers.plain` to change."""
    return type(experiment)(experiment.config, experiment.dataset).model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=8, help="points of each trajectory (default 8)")
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=list(NETS))
    parser.add_argument("--dry", action="store_true", help="do not write the result")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    result = {name: compare(name, options.points) for name in options.nets}
    if options.dry:
        print(result)
    else:
        record("sharpness", {"accuracy": ACCURACY, "share": SHARE, "nets": result})


if __name__ == "__main__":
    main()
