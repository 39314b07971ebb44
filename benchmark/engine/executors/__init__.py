"""Executors: ways to run a list of cells, with the same results. Pick one with ``--executor``."""

from benchmark.engine.events import Events
from benchmark.engine.executors.base import EXECUTORS, Executor

__all__ = ["EXECUTORS", "Events", "Executor"]
