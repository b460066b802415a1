"""A loss over data as a function of a flat parameter vector, checked once for being what it is taken for."""

from .objective import Kernel, Loss, Objective, compiled_kernel, pure_loss
from .parameters import Layout, flatten_parameters

__all__ = ["Kernel", "Layout", "Loss", "Objective", "compiled_kernel", "flatten_parameters", "pure_loss"]
