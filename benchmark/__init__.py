"""The benchmark suite: cells, store, executors and the views made of them.

From the shell, ``python -m benchmark``. From Python::

    import benchmark

    for outcome in benchmark.run("smoke", methods="minmax"):
        print(outcome.status, outcome.cell, outcome.value)
    frame = benchmark.table("smoke", allow_partial=True)
    quantized = benchmark.load("4b2d")
    model = quantized.apply(benchmark.reference("tiny_vit"))

Importing this package is quick: what a call needs is imported by the call.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmark.api import load, reference, run, table
    from benchmark.components import include
    from benchmark.engine.events import Events
    from benchmark.engine.runner import Outcome

_HOMES = {
    "Events": "benchmark.engine.events",
    "Outcome": "benchmark.engine.runner",
    "include": "benchmark.components",
    "load": "benchmark.api",
    "reference": "benchmark.api",
    "run": "benchmark.api",
    "table": "benchmark.api",
}

__all__ = ["Events", "Outcome", "include", "load", "reference", "run", "table"]


def __getattr__(name: str) -> Any:
    """Import on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
