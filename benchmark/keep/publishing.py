"""Writing a folder of published results, which :mod:`.reference_store` reads."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmark.grid.cells import Cell
from benchmark.grid.suite import DEFAULT_SUITE
from benchmark.keep.atomic import file_lock, write_atomically, write_text_atomically
from benchmark.keep.record import Record
from benchmark.keep.reference_store import (
    ITEMS,
    MANIFEST,
    PUBLISHED,
    RECORDS,
    SCHEMA,
    ReferenceStore,
    cell_of,
)
from quanttune.digests import json_digest, sha256_file
from quanttune.errors import StoreError

if TYPE_CHECKING:
    import pyarrow as pa

SUBMITTED = "submitted"
"""Under which published results keep cells that are of no suite."""

LARGEST = 6 * 2**20
"""Bytes that the files of a folder may have together."""
_OURS = re.compile(rf"({RECORDS}|{ITEMS})(-[0-9a-f]{{16}})?\.parquet")
_PAGE = 1 << 24  # bytes: what repeats in other records is found within a page


@dataclass(frozen=True)
class Publication:
    """What was written.

    Attributes:
        cells: Measured cells in the files; one counts twice that two suites have on different weights.
        suites: Number of cells by suite.
        size: Bytes of all files.
    """

    cells: int
    suites: Mapping[str, int]
    size: int


def publish(
    folder: Path,
    records: Mapping[str, Iterable[Record]],
    items: Callable[[str, str], Mapping[str, np.ndarray]],
    *,
    largest: int = LARGEST,
) -> Publication:
    """Write suites to a folder of published results; the other suites that it has stay.

    Args:
        folder: Where; made if need be.
        records: The finished records of each suite, by its name.
        items: The arrays of a cell, by the suite's name and the cell's id.
        largest: Bytes that the files may have together.

    Raises:
        StoreError: If the files would be larger, or cannot be written, or the folder or a suite's name is one
            that must not be written; nothing is changed then.
    """
    if SUBMITTED in records:
        raise StoreError(f"{SUBMITTED!r} is the name of what was merged; give the suite another name")
    if any((folder / name).exists() for name in ("store.json", "cells")):
        raise StoreError(f"{folder} is a results folder of its own; publish to another one")
    with _alone(folder):
        kept = _published(folder) if (folder / MANIFEST).is_file() else []
        for each in kept:
            each.suites -= set(records)
        kept = [each for each in kept if each.suites]
        for suite, found in records.items():
            for record in found:
                _add(kept, record, {suite}, partial(items, suite))
        return _write(folder, kept, largest)


def _alone(folder: Path) -> AbstractContextManager[None]:
    """Hold the folder against other processes that write it."""
    place = folder.absolute()
    return file_lock(place.parent / f".{place.name}.lock")


@dataclass
class _Measured:
    """One measurement of a cell: the suites that show it, its record as JSON, and its arrays."""

    cell_id: str
    suites: set[str]
    text: str
    arrays: Mapping[str, np.ndarray]

    @property
    def rank(self) -> tuple[bool, list[str], str]:
        """Which of several measurements of a cell comes first: that of the main job."""
        return DEFAULT_SUITE not in self.suites, sorted(self.suites), self.text


def _published(folder: Path) -> list[_Measured]:
    files = ReferenceStore(folder).files
    return [
        _Measured(cell_of(row), set(suites), text, files.arrays.get(row, {}))
        for row, (suites, text) in files.measured.items()
    ]


def _add(
    kept: list[_Measured],
    record: Record,
    suites: Iterable[str],
    items: Callable[[str], Mapping[str, np.ndarray]],
) -> None:
    """Give a record to suites: the measurement that has its result, or one more of the cell."""
    cell_id = record.cell.cell_id
    for each in kept:
        if each.cell_id == cell_id and _same_result(each.text, record):
            # The text stays as it is: tables of the suites that have it tell its times.
            each.suites |= set(suites)
            return
    text = json.dumps(record.to_json(), sort_keys=True, allow_nan=False)
    kept.append(_Measured(cell_id, set(suites), text, items(cell_id) if record.items_sha256 else {}))


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
    with _alone(folder):
        kept = _published(folder)
        for record in records:
            _add(kept, record, suites[record.cell.cell_id], items)
        return _write(folder, kept, largest)


def _write(folder: Path, kept: Iterable[_Measured], largest: int) -> Publication:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows: dict[str, _Measured] = {}
    for each in sorted(kept, key=lambda each: each.rank):
        rows[each.cell_id if each.cell_id not in rows else row_of(each.cell_id, each.text)] = each
    # Records that resemble each other stand side by side, which makes the file a third smaller.
    rows = dict(sorted(rows.items(), key=lambda row: (*_likeness(row[1].text), row[0])))
    tables = {
        RECORDS: pa.table(
            {
                "cell_id": list(rows),
                "suites": [sorted(each.suites) for each in rows.values()],
                "record": [each.text for each in rows.values()],
            }
        ),
        ITEMS: _item_table({row: each.arrays for row, each in rows.items()}),
    }
    written: dict[str, pa.BufferOutputStream] = {}
    for name, table in tables.items():
        stream = written[name] = pa.BufferOutputStream()
        options = {"compression": "zstd", "compression_level": 19, "data_page_size": _PAGE}
        pq.write_table(
            table, stream, use_dictionary=["name", "dtype", "packed"], store_schema=False, **options
        )
    filled = {kind: stream.getvalue().to_pybytes() for kind, stream in written.items()}
    contents = {
        f"{kind}-{sha256(content).hexdigest()[:16]}.parquet": content for kind, content in filled.items()
    }
    size = sum(len(content) for content in contents.values())
    if size > largest:
        raise StoreError(
            f"the published results would have {size / 2**20:.1f} MiB, more than {largest / 2**20:.1f}; "
            "publish fewer suites"
        )
    counts = Counter(name for each in rows.values() for name in each.suites)
    for name, content in contents.items():
        write_atomically(folder / name, partial(_fill, content))
    files = {name: sha256_file(folder / name) for name in contents}
    suites = dict(sorted(counts.items()))
    body = {"schema": SCHEMA, "suites": suites, "files": files}
    text = json.dumps(body | {"digest": json_digest(body)}, indent=1, sort_keys=True) + "\n"
    # The manifest goes last: until then it names the files of before, which are still there.
    write_text_atomically(folder / MANIFEST, text)
    for path in sorted(folder.glob("*.parquet")):
        # what else lies there is not ours
        if _OURS.fullmatch(path.name) and path.name not in files:
            path.unlink(missing_ok=True)
    return Publication(len(rows), suites, size + len(text))


def row_of(cell_id: str, text: str) -> str:
    """Id of a further row of a cell, see :mod:`.reference_store`.

    Args:
        cell_id: The cell's.
        text: The record as JSON.
    """
    return f"{cell_id}@{sha256(text.encode()).hexdigest()[:12]}"


def _likeness(text: str) -> tuple[str, ...]:
    cell = Cell.from_identity(json.loads(text)["cell"])
    return cell.model, cell.profile, cell.precision, cell.method


def _item_table(arrays: Mapping[str, Mapping[str, np.ndarray]]) -> pa.Table:
    import pyarrow as pa

    lines, seen = [], set()
    for row, named in arrays.items():
        for name in PUBLISHED:
            if name not in named:
                continue
            array = np.ascontiguousarray(named[name])
            packed = _packed(array)
            digest = json_digest([str(array.dtype), list(array.shape), packed.tobytes().hex()])
            lines.append(
                {
                    "cell_id": row,
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
    return pa.Table.from_pylist(lines, schema=pa.schema(kinds))


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
