"""Sharpness-aware minimization at the edge of stability: SAM, GD, and exact Hessian eigen-solvers.

The public names below are imported on first use, so that ``import samlib`` costs next to nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOME = {
    "gd_edge": "edges",
    "sam_edge": "edges",
    "growth_factor": "edges",
    "two_cycle_radius": "edges",
    "frobenius_noise_kernel": "edges",
    "Objective": "objective",
    "SAM": "optim",
    "frozen_batch_statistics": "optim",
    "gd_step": "optim",
    "sam_step": "optim",
    "determinant": "cumulants",
    "frobenius": "cumulants",
    "integral": "cumulants",
    "trace": "cumulants",
    "universal_gradient": "cumulants",
    "universal_step": "cumulants",
    "universal_value": "cumulants",
    "UniversalSAM": "universal",
    "EigenResult": "hessian",
    "HessianOperator": "hessian",
    "hutchinson_trace": "hessian",
    "power_iteration": "hessian",
    "spectral_density": "hessian",
    "SpectralSums": "spectrum",
    "curvature_measures": "spectrum",
    "spectral_sums": "spectrum",
    "top_eigenpairs": "hessian",
    "CNN": "models",
    "MLP": "models",
    "Transformer": "models",
    "Dataset": "datasets",
    "load_dataset": "datasets",
    "RunConfig": "experiments",
    "Run": "runs",
    "RunStore": "runs",
    "grid": "experiments",
    "published_runs": "runs",
    "train": "training",
    "train_grid": "training",
}
__all__ = sorted(_HOME)

if TYPE_CHECKING:
    from .cumulants import (
        determinant,
        frobenius,
        integral,
        trace,
        universal_gradient,
        universal_step,
        universal_value,
    )
    from .datasets import Dataset, load_dataset
    from .edges import frobenius_noise_kernel, gd_edge, growth_factor, sam_edge, two_cycle_radius
    from .experiments import RunConfig, grid
    from .hessian import (
        EigenResult,
        HessianOperator,
        hutchinson_trace,
        power_iteration,
        spectral_density,
        top_eigenpairs,
    )
    from .models import CNN, MLP, Transformer
    from .objective import Objective
    from .optim import SAM, frozen_batch_statistics, gd_step, sam_step
    from .runs import Run, RunStore, published_runs
    from .spectrum import SpectralSums, curvature_measures, spectral_sums
    from .training import train, train_grid
    from .universal import UniversalSAM


def __getattr__(name: str):
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module 'samlib' has no attribute {name!r}; it exports {', '.join(__all__)}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
