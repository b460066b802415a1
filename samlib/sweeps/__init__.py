"""Sweeps: one notebook executed with papermill over a grid of parameters, on this machine or on a Ray cluster."""

from .configuration import SweepError, read_config
from .planning import Sweep, load, plan
from .points import Point, Status

__all__ = ["Point", "Status", "Sweep", "SweepError", "load", "plan", "read_config"]
