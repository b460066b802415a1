"""Sharpness-aware minimization at the edge of stability: SAM, GD, and exact Hessian eigen-solvers.

The public names below are imported on first use, so that ``import samlib`` costs next to nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOME = {
    "gd_edge": "edges",
    "sam_edge": "edges",
    "usam_edge": "edges",
    "momentum_edge": "edges",
    "adam_edge": "edges",
    "stale_edge": "edges",
    "sam_negative_range": "edges",
    "held_edge": "edges_cached",
    "previous_gradient_edge": "edges_cached",
    "noise_fraction": "noise",
    "kernel_norm": "noise",
    "kernel_norm_bounds": "noise",
    "sam_factor": "noise",
    "sgd_edge_ratio": "noise",
    "exact_kernel_norm": "mean_square",
    "sgd_sharpness": "mean_square",
    "ntk_blocks": "tangent",
    "ntk_matrix": "tangent",
    "GaussNewtonOperator": "gauss_newton",
    "TangentKernelOperator": "gauss_newton",
    "EdgeLaw": "laws",
    "edge_law": "laws",
    "stability_limit": "stability",
    "effective_curvature": "stability",
    "growth_factor": "stability",
    "spectral_radius": "stability",
    "two_cycle_radius": "stability",
    "EdgeMonitor": "monitor",
    "Objective": "objective",
    "SAM": "optim",
    "frozen_batch_statistics": "optim",
    "gd_step": "optim",
    "sam_step": "optim",
    "EigenResult": "eigen",
    "HessianOperator": "hessian",
    "hutchinson_trace": "spectrum",
    "power_iteration": "eigen",
    "spectral_density": "spectrum",
    "top_eigenpairs": "eigen",
    "determinant": "cumulants",
    "frobenius": "cumulants",
    "integral": "cumulants",
    "trace": "cumulants",
    "universal_gradient": "cumulants",
    "universal_step": "cumulants",
    "universal_value": "cumulants",
    "UniversalSAM": "universal",
    "SpectralSums": "spectrum",
    "curvature_measures": "spectrum",
    "spectral_sums": "spectrum",
    "frobenius_noise_kernel": "edges",
    "CNN": "models",
    "MLP": "models",
    "Transformer": "models",
    "Dataset": "datasets",
    "load_dataset": "datasets",
    "RunConfig": "config",
    "Run": "runs",
    "RunStore": "runs",
    "grid": "config",
    "published_runs": "runs",
    "train": "training",
    "train_grid": "training",
}
__all__ = sorted(_HOME)

if TYPE_CHECKING:
    from .config import RunConfig, grid
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
    from .edges import (
        adam_edge,
        frobenius_noise_kernel,
        gd_edge,
        momentum_edge,
        sam_edge,
        sam_negative_range,
        stale_edge,
        usam_edge,
    )
    from .edges_cached import held_edge, previous_gradient_edge
    from .eigen import EigenResult, power_iteration, top_eigenpairs
    from .gauss_newton import GaussNewtonOperator, TangentKernelOperator
    from .hessian import HessianOperator
    from .laws import EdgeLaw, edge_law
    from .mean_square import exact_kernel_norm, sgd_sharpness
    from .models import CNN, MLP, Transformer
    from .monitor import EdgeMonitor
    from .noise import kernel_norm, kernel_norm_bounds, noise_fraction, sam_factor, sgd_edge_ratio
    from .objective import Objective
    from .optim import SAM, frozen_batch_statistics, gd_step, sam_step
    from .runs import Run, RunStore, published_runs
    from .spectrum import SpectralSums, curvature_measures, hutchinson_trace, spectral_density, spectral_sums
    from .stability import effective_curvature, growth_factor, spectral_radius, stability_limit, two_cycle_radius
    from .tangent import ntk_blocks, ntk_matrix
    from .training import train, train_grid
    from .universal import UniversalSAM


def __getattr__(name: str):
    if name in _HOME:
        try:
            return getattr(import_module(f".{_HOME[name]}", __name__), name)
        except ModuleNotFoundError as error:
            from .extras import EXTRAS, remedy

            if (error.name or "").partition(".")[0] not in EXTRAS:
                raise
            raise ImportError(remedy(error, f"samlib.{name}"), name=error.name) from None
    raise AttributeError(f"module 'samlib' has no attribute {name!r}; it exports {', '.join(__all__)}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
