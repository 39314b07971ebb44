"""The lines of Python that give the quantized model of a cell back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from benchmark.engine.reopen import measure_again
from benchmark.grid.cells import Cell
from benchmark.keep.record import Record
from benchmark.keep.reference_store import ReferenceStore, measuring_option
from benchmark.keep.store import Store


def reopening(record: Record, results: Path, store: Store) -> list[str]:
    """The lines of Python that give a cell's quantized model back, or why there is none.

    Args:
        record: Of the cell.
        results: The store's folder as it was given.
        store: The store; published results keep no quantized models.
    """
    if not record.cell.is_reference and (record.quantized is None or isinstance(store, ReferenceStore)):
        if record.reason is not None:
            return ["# skipped, so there is no quantized model"]
        again = measure_again(record.cell, measuring_option(store)).strip("`")
        return ["# no quantized model is kept of this cell; to have one, measure it again:", f"# {again}"]
    files = [file["name"] for file in record.provenance.get("includes", ())]
    return python_lines(record.cell, results, files)


def python_lines(cell: Cell, results: Path, files: Sequence[str] = ()) -> list[str]:
    """The lines for a cell whose quantized model is kept, or for a reference.

    Args:
        cell: Which one.
        results: The store's folder.
        files: Names of the user's files that it was measured with: they may hold its model or a quantizer.
    """
    included = [f"benchmark.include({json.dumps(name)})" for name in files]
    if cell.is_reference:
        call = _call("reference", cell.model, results)
        return ["# the FP32 model itself:", "import benchmark", *included, f"model = {call}"]
    return [
        "# the quantized model:",
        "import benchmark",
        *included,
        f"quantized = {_call('load', cell.cell_id[:12], results)}",
        f"model = quantized.apply({_call('reference', cell.model, results)})",
    ]


def _call(function: str, argument: str, results: Path) -> str:
    where = "" if results == Path("results") else f", results={json.dumps(str(results))}"
    return f"benchmark.{function}({json.dumps(argument)}{where})"
