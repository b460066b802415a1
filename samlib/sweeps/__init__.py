"""Sweeps: one notebook executed with papermill over a grid of parameters, on this machine or on a Ray cluster."""

from .planning import Sweep, SweepError, load, plan, read_config
from .points import Point, Status

__all__ = ["Point", "Status", "Sweep", "SweepError", "load", "plan", "read_config"]
