"""A small suite with everything that a run writes, and what must be the same however it was disturbed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import benchmark
from benchmark.engine.events import Events
from benchmark.engine.runner import Outcome
from benchmark.grid.cells import Cell
from benchmark.grid.expand import expand
from benchmark.grid.suite import load_suite
from benchmark.keep.status import status_of
from benchmark.keep.store import Store
from tests.engine.conftest import ToyModel

SUITE = """
models = ["toy"]
precisions = ["W8A8", "W4A4"]
calibration_items = 8
noise = "none"
[[methods]]
name = "fp32"
[[methods]]
name = "percentile"
[[methods]]
name = "finetune"
steps = 105
"""
"""References, statistics, a fine-tuning that leaves a checkpoint, shared weights: five cells."""


class Pinned(ToyModel):
    """The toy with something to pin."""

    def pins(self) -> dict[str, Any]:
        return {"repo": "toys/toy", "weights": "c" * 64}


def run(suite: Path, results: Path, track: bool = False, events: Events | None = None) -> Iterator[Outcome]:
    """Measure the suite in this process."""
    return benchmark.run(str(suite), results=results, threads=1, track=track, events=events)


def cells_of(suite: Path) -> list[Cell]:
    return expand(load_suite(str(suite)))


def values(suite: Path, results: Path) -> dict[str, Any]:
    """All that decides a cell's numbers, by cell id: result, predictions, weights, quantizers."""
    store, found = Store(results), {}
    for cell in cells_of(suite):
        record = store.load(cell)
        if record is not None:
            body = json.loads(json.dumps(record.to_json()))
            for name in ("finished_at", "duration_s", "provenance", "digest", "cost"):
                body.pop(name, None)
            found[cell.cell_id] = body
    return found


def words(suite: Path, results: Path) -> list[str]:
    """The status of each cell."""
    store = Store(results)
    return [status_of(store, cell).word for cell in cells_of(suite)]


def finished(results: Path) -> dict[str, bytes]:
    """The records that count, by cell id, as they lie on the disk."""
    store = Store(results)
    return {
        record.cell.cell_id: (results / "cells" / f"{record.cell.cell_id}.json").read_bytes()
        for record in store.records()
        if store.load(record.cell) is not None
    }


def age(results: Path) -> int:
    """Make temporary files of killed processes look an hour old; how many there are."""
    parts = list(results.rglob("*.part"))
    for path in parts:
        at = path.stat().st_mtime - 3600
        os.utime(path, (at, at))
    return len(parts)
