"""Stores of any number of cells without measuring one: what listings, tables and reports are timed on.

Cells are those of a real suite of tiny models, its seeds as many as it takes; every record has the size of
one of suite ``laptop``: a table of sites of 45 kB, 2000 items. Numbers are drawn; models, sites, records,
digests and files are real.

From the command line, for a look at what a large store is like::

    python -m benchmark.performance.synthetic_store FOLDER --cells 10000
    python -m benchmark table --suite FOLDER/synthetic.toml --results FOLDER
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from benchmark.engine.environment import prepare_torch
from benchmark.grid.cells import Cell
from benchmark.grid.expand import expand
from benchmark.grid.suite import Suite, load_suite
from benchmark.keep.record import DONE, Noise, Record, Result
from benchmark.keep.store import Store
from benchmark.subject.tasks.task import get_task
from quanttune.seeds import numpy_generator

if TYPE_CHECKING:
    from numpy.random import Generator

SUITE = "synthetic"
ITEMS = 2000
_SITES_SIZE = 45_000  # characters of the table of sites of a record
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


@dataclass(frozen=True)
class _Model:
    """What the records of a model have in common."""

    reference_digest: str
    sites: list[dict[str, Any]]

    @classmethod
    def opened(cls, name: str, store: Store) -> _Model:
        """The model with its reference made in the store, as a run does."""
        from benchmark.engine.session import Session

        session = Session(name, store.stages, prepare_torch(1, "cpu"), lambda *_: None)
        digest = session.reference_digest
        store.save_reference_digest(name, session.model_identity, digest)
        rows = session.sites.profile("full").to_rows()
        return cls(digest, [_site(dict(row), _SITES_SIZE // len(rows)) for row in rows])


def _site(row: dict[str, Any], size: int) -> dict[str, Any]:
    """A row of the table of sites; a tiny model has few, so each is as long as it takes."""
    row |= {"low": -2.5, "high": 2.5, "quantizer": "UniformQuantizer(per tensor, codes -127..127)"}
    missing = size - len(json.dumps(row))
    return row | {"quantizer": row["quantizer"] + " " * max(0, missing)}


def _fill(store: Store, cells: Iterable[Cell]) -> None:
    from safetensors.numpy import save

    folder = store.root / "cells"
    folder.mkdir(exist_ok=True)
    models: dict[str, _Model] = {}
    for cell in cells:
        path = folder / f"{cell.cell_id}.json"
        if path.exists():
            continue
        if cell.model not in models:
            models[cell.model] = _Model.opened(cell.model, store)
        generator = numpy_generator(cell.seed, "synthetic store", cell.cell_id)
        arrays = save(_items(generator, cell))
        # Not through `Store.save`, which waits for the disk twice a cell: nobody mourns a lost record here.
        path.with_suffix(".safetensors").write_bytes(arrays)
        record = _record(cell, generator, models[cell.model], sha256(arrays).hexdigest())
        # without line breaks, which take json most of its time; the sites are longer for it
        text = json.dumps(record.to_json(), sort_keys=True)
        path.write_text(text + "\n", encoding="utf-8")


def _items(generator: Generator, cell: Cell) -> dict[str, np.ndarray]:
    ids = np.array(get_task(cell.task).split_ids("test", ITEMS))
    predictions, targets = generator.integers(0, 10, (2, len(ids)))
    scores = (predictions == targets).astype(np.float64)
    return {"ids": ids, "scores": scores, "predictions": predictions, "targets": targets}


def _record(cell: Cell, generator: Generator, model: _Model, items_sha256: str) -> Record:
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
        reference_digest=model.reference_digest,
        weights_digest=model.reference_digest,
        sites=[] if cell.is_reference else model.sites,
        provenance={"device": "cpu", "threads": 1, "cpu": "none: synthetic", "versions": {}},
        cost={} if cell.is_reference else {"training_s": 0.0, "calibration_s": 1.0, "peak_mb": 100.0},
    )


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--cells", default=10_000, show_default=True, type=click.IntRange(1), help="About how many.")
def main(folder: Path, cells: int) -> None:
    """Make a results folder FOLDER of so many cells whose numbers are drawn."""
    suite = synthetic_store(folder, cells)
    click.echo(f"{len(expand(suite))} cells: --suite {suite.origin} --results {folder}")


if __name__ == "__main__":
    main()
