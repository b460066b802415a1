"""SAM and its kin: the updates as pure functions, and as a PyTorch optimizer around any other."""

from .batchnorm import frozen_batch_statistics
from .directions import uphill
from .sam import DIRECTION, SAM
from .steps import EPSILON, asam_perturb, gd_step, graphsam_step, sam_perturb, sam_step, usam_step

__all__ = [
    "DIRECTION",
    "EPSILON",
    "SAM",
    "asam_perturb",
    "frozen_batch_statistics",
    "gd_step",
    "graphsam_step",
    "sam_perturb",
    "sam_step",
    "uphill",
    "usam_step",
]
