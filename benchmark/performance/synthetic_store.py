"""Stores of any number of cells without measuring one: what listings, tables and reports are timed on.

Cells are those of a real suite of tiny models, its seeds as many as it takes; every record has the size of
one of suite ``laptop``: 160 sites, 2000 items. Numbers are drawn; records, digests and files are real.

From the command line, for a look at what a large store is like::

    python -m benchmark.performance.synthetic_store FOLDER --cells 10000
    python -m benchmark table --suite FOLDER/synthetic.toml --results FOLDER
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from benchmark.grid.cells import Cell
from benchmark.grid.expand import expand
from benchmark.grid.suite import Suite, load_suite
from benchmark.keep.record import DONE, Noise, Record, Result
from benchmark.keep.store import Store
from quanttune.seeds import numpy_generator

if TYPE_CHECKING:
    from numpy.random import Generator

SUITE = "synthetic"
SITES, ITEMS = 160, 2000
_MODELS = ("tiny_vit", "tiny_bert")
_METHODS = ("minmax", "percentile", "mse", "omse", "ema", "entropy", "fq_vit", "smoothquant")
_PRECISIONS = ("W8A8", "W7A7", "W6A6", "W4A8")
_EACH = len(_MODELS) * len(_METHODS) * len(_PRECISIONS)
_FINISHED = "2026-01-01T00:00:00+00:00"


def synthetic_store(folder: Path, cells: int) -> Suite:
    """Make a results folder with about so many finished cells, and its suite as ``synthetic.toml`` in it.

    Args:
        folder: Made if need be; cells that it has already stay.
        cells: How many at least; whole seeds are made, and one reference a model.

    Returns:
        The suite, which ``--suite FOLDER/synthetic.toml`` names.
    """
    store = Store(folder)
    store.prepare()
    path = store.root / f"{SUITE}.toml"
    path.write_text(_suite(max(1, round(cells / _EACH))), encoding="utf-8")
    suite = load_suite(str(path))
    _fill(store, expand(suite))
    return suite


def _suite(seeds: int) -> str:
    methods = "".join(f'\n[[methods]]\nname = "{name}"\n' for name in ("fp32", *_METHODS))
    return (
        'description = "synthetic: its numbers are drawn, not measured"\n'
        f"models = {json.dumps(_MODELS)}\nprecisions = {json.dumps(_PRECISIONS)}\n"
        f"seeds = {json.dumps(list(range(seeds)))}\ncalibration_items = 16\n{methods}"
    )


def _fill(store: Store, cells: Iterable[Cell]) -> None:
    from safetensors.numpy import save

    folder = store.root / "cells"
    folder.mkdir(exist_ok=True)
    for cell in cells:
        path = folder / f"{cell.cell_id}.json"
        if path.exists():
            continue
        generator = numpy_generator(cell.seed, "synthetic store", cell.cell_id)
        arrays = save(_items(generator))
        # Not through `Store.save`, which waits for the disk twice a cell: nobody mourns a lost record here.
        path.with_suffix(".safetensors").write_bytes(arrays)
        text = json.dumps(
            _record(cell, generator, sha256(arrays).hexdigest()).to_json(), indent=1, sort_keys=True
        )
        path.write_text(text + "\n", encoding="utf-8")


def _items(generator: Generator) -> dict[str, np.ndarray]:
    predictions = generator.integers(0, 10, ITEMS)
    targets = generator.integers(0, 10, ITEMS)
    scores = (predictions == targets).astype(np.float64)
    return {"ids": np.arange(ITEMS), "scores": scores, "predictions": predictions, "targets": targets}


def _record(cell: Cell, generator: Generator, items_sha256: str) -> Record:
    value, fp32 = float(generator.uniform(60, 90)), 90.0
    drop = 0.0 if cell.is_reference else fp32 - value
    noise = None if cell.is_reference else Noise(5, 1e-6, 200, value, 0.3, 0.1, 2.0)
    result = Result("accuracy", True, fp32 - drop, fp32, None, drop, drop - 1, drop + 1, ITEMS, noise)
    return Record(
        cell,
        DONE,
        _FINISHED,
        float(generator.uniform(1, 30)),
        result=result,
        metrics={"accuracy": {"value": result.value, "fp32": fp32, "fp32_own": None}},
        items_sha256=items_sha256,
        details={"evaluation_batch": 50},
        sites=[] if cell.is_reference else [_site(number, generator) for number in range(SITES)],
        provenance={"device": "cpu", "threads": 1, "cpu": "none: synthetic", "versions": {}},
        cost={} if cell.is_reference else {"training_s": 0.0, "calibration_s": 1.0, "peak_mb": 100.0},
    )


def _site(number: int, generator: Generator) -> dict[str, Any]:
    high = float(generator.uniform(1, 10))
    return {
        "high": high,
        "id": f"blocks.{number // 16}.layer{number % 16}/linear.input",
        "kind": "linear input",
        "low": -high,
        "parameter": None,
        "quantizer": f"UniformQuantizer(per tensor, codes -127..127, scale max {high / 127:.4g})",
        "shape": [2, 50, 384],
        "source": None,
    }


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--cells", default=10_000, show_default=True, type=click.IntRange(1), help="About how many.")
def main(folder: Path, cells: int) -> None:
    """Make a results folder FOLDER of so many cells whose numbers are drawn."""
    suite = synthetic_store(folder, cells)
    click.echo(f"{len(expand(suite))} cells: --suite {suite.origin} --results {folder}")


if __name__ == "__main__":
    main()
