"""Writing a folder of published results, which :mod:`.reference_store` reads."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmark.grid.cells import Cell
from benchmark.keep.atomic import write_atomically, write_text_atomically
from benchmark.keep.record import Record
from benchmark.keep.reference_store import (
    ITEMS,
    MANIFEST,
    PUBLISHED,
    RECORDS,
    SCHEMA,
    ReferenceStore,
)
from quanttune.digests import json_digest, sha256_file
from quanttune.errors import StoreError

if TYPE_CHECKING:
    import pyarrow as pa

LARGEST = 6 * 2**20
"""Bytes that the files of a folder may have together."""
_PAGE = 1 << 24  # bytes: what repeats in other records is found within a page


@dataclass(frozen=True)
class Publication:
    """What was written.

    Attributes:
        cells: Cells in the files.
        suites: Number of cells by suite.
        size: Bytes of all files.
    """

    cells: int
    suites: Mapping[str, int]
    size: int


def publish(
    folder: Path,
    records: Mapping[str, Iterable[Record]],
    items: Callable[[str], Mapping[str, np.ndarray]],
    *,
    largest: int = LARGEST,
) -> Publication:
    """Write suites to a folder of published results; the other suites that it has stay.

    Args:
        folder: Where; made if need be.
        records: The finished records of each suite, by its name.
        items: The arrays of a cell, by its id.
        largest: Bytes that the files may have together.

    Raises:
        StoreError: If the files would be larger, or cannot be written; nothing is changed then.
    """
    texts: dict[str, str] = {}
    suites: dict[str, list[str]] = {}
    arrays: dict[str, Mapping[str, np.ndarray]] = {}
    if (folder / MANIFEST).is_file():
        old = ReferenceStore(folder)
        for cell_id, names in old.suites_of.items():
            left = [name for name in names if name not in records]
            if left:
                suites[cell_id], texts[cell_id] = left, old.texts[cell_id]
                arrays[cell_id] = old.arrays.get(cell_id, {})
    for suite, found in records.items():
        for record in found:
            cell_id = record.cell.cell_id
            suites[cell_id] = sorted({*suites.get(cell_id, ()), suite})
            if cell_id in texts and _same_result(texts[cell_id], record):
                # Tables of the suites that stay tell its times.
                continue
            texts[cell_id] = json.dumps(record.to_json(), sort_keys=True, allow_nan=False)
            arrays[cell_id] = items(cell_id) if record.items_sha256 else {}
    return _write(folder, texts, suites, arrays, largest)


def _same_result(text: str, record: Record) -> bool:
    kept = Record.from_json(json.loads(text), "the published record")
    return kept is not None and (kept.result, kept.items_sha256) == (record.result, record.items_sha256)


def extend(
    folder: Path,
    suites: Mapping[str, list[str]],
    records: Iterable[Record],
    items: Callable[[str], Mapping[str, np.ndarray]],
    *,
    largest: int = LARGEST,
) -> Publication:
    """Add cells to a folder of published results; all that it has stays.

    Args:
        folder: The folder.
        suites: Names of the suites that a new cell is of, by its id.
        records: The new cells.
        items: The arrays of a cell, by its id.
        largest: Bytes that the files may have together.

    Raises:
        StoreError: If the files would be larger, or cannot be written; nothing is changed then.
    """
    old = ReferenceStore(folder)
    texts, names = dict(old.texts), dict(old.suites_of)
    arrays: dict[str, Mapping[str, np.ndarray]] = {cell_id: old.arrays.get(cell_id, {}) for cell_id in texts}
    for record in records:
        cell_id = record.cell.cell_id
        names[cell_id] = sorted({*names.get(cell_id, ()), *suites[cell_id]})
        texts[cell_id] = json.dumps(record.to_json(), sort_keys=True, allow_nan=False)
        arrays[cell_id] = items(cell_id) if record.items_sha256 else {}
    return _write(folder, texts, names, arrays, largest)


def _write(
    folder: Path,
    texts: Mapping[str, str],
    suites: Mapping[str, list[str]],
    arrays: Mapping[str, Mapping[str, np.ndarray]],
    largest: int,
) -> Publication:
    import pyarrow as pa
    import pyarrow.parquet as pq

    # Records that resemble each other stand side by side, which makes the file a third smaller.
    order = sorted(texts, key=lambda cell_id: (*_likeness(texts[cell_id]), cell_id))
    tables = {
        RECORDS: pa.table(
            {
                "cell_id": order,
                "suites": [suites[cell_id] for cell_id in order],
                "record": [texts[cell_id] for cell_id in order],
            }
        ),
        ITEMS: _item_table(order, arrays),
    }
    written: dict[str, pa.BufferOutputStream] = {}
    for name, table in tables.items():
        stream = written[name] = pa.BufferOutputStream()
        options = {"compression": "zstd", "compression_level": 19, "data_page_size": _PAGE}
        pq.write_table(
            table, stream, use_dictionary=["name", "dtype", "packed"], store_schema=False, **options
        )
    contents = {name: stream.getvalue().to_pybytes() for name, stream in written.items()}
    size = sum(len(content) for content in contents.values())
    if size > largest:
        raise StoreError(
            f"the published results would have {size / 2**20:.1f} MiB, more than {largest / 2**20:.1f}; "
            "publish fewer suites"
        )
    names = sorted({name for found in suites.values() for name in found})
    counts = {name: sum(name in found for found in suites.values()) for name in names}
    for name, content in contents.items():
        write_atomically(folder / name, partial(_fill, content))
    files = {name: sha256_file(folder / name) for name in contents}
    body = {"schema": SCHEMA, "suites": counts, "files": files}
    text = json.dumps(body | {"digest": json_digest(body)}, indent=1, sort_keys=True) + "\n"
    # The manifest goes last: files that it does not name are refused.
    write_text_atomically(folder / MANIFEST, text)
    return Publication(len(order), counts, size + len(text))


def _likeness(text: str) -> tuple[str, ...]:
    cell = Cell.from_identity(json.loads(text)["cell"])
    return cell.model, cell.profile, cell.precision, cell.method


def _item_table(order: Iterable[str], arrays: Mapping[str, Mapping[str, np.ndarray]]) -> pa.Table:
    import pyarrow as pa

    rows, seen = [], set()
    for cell_id in order:
        for name in PUBLISHED:
            if name not in arrays[cell_id]:
                continue
            array = np.ascontiguousarray(arrays[cell_id][name])
            packed = _packed(array)
            digest = json_digest([str(array.dtype), list(array.shape), packed.tobytes().hex()])
            rows.append(
                {
                    "cell_id": cell_id,
                    "name": name,
                    "digest": digest[:32],
                    "dtype": array.dtype.str,
                    "packed": packed.dtype.str,
                    "shape": list(array.shape),
                    # Items and targets are those of the task: kept once.
                    "data": None if digest in seen else packed.tobytes(),
                }
            )
            seen.add(digest)
    kinds = {
        "cell_id": pa.string(),
        "name": pa.string(),
        "digest": pa.string(),
        "dtype": pa.string(),
        "packed": pa.string(),
        "shape": pa.list_(pa.int64()),
        "data": pa.binary(),
    }
    return pa.Table.from_pylist(rows, schema=pa.schema(kinds))


def _packed(array: np.ndarray) -> np.ndarray:
    """The array in the narrowest type that holds every value of it."""
    for kind in ("u1", "<i2", "<i4", "<f4"):
        with np.errstate(all="ignore"):
            narrow = array.astype(kind)
        if narrow.dtype.itemsize < array.dtype.itemsize and np.array_equal(narrow.astype(array.dtype), array):
            return narrow
    return array


def _fill(content: bytes, path: Path) -> None:
    path.write_bytes(content)
