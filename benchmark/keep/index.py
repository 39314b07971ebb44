"""An index of the records of a large store: what views read of them, without parsing every file again.

Nine tenths of a record is the table of its sites, which no plan, listing or table looks at. ``index.parquet``
holds the rest of each record under the sha256 of its file. Whoever reads many records still reads and hashes
every file; one whose digest the index knows is taken from there, any other is parsed and checked as ever, and
added. So the index can be absent, old or deleted without a difference: nothing is believed of a file that has
changed since.

The rows are sealed by a digest of their own, and a row holds only what a whole, checked record said.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from benchmark.grid.cells import Cell
from benchmark.keep.atomic import write_atomically
from benchmark.keep.record import Kept, Noise, Record, Result
from quanttune.errors import StoreError

if TYPE_CHECKING:
    import pyarrow as pa

FILE = "index.parquet"
VERSION = 1
WORTH_IT = 64
"""New records from which on the index is written: parsing fewer takes a tenth of a second or two."""

_COLUMNS = ("cell_id", "file", "sites", "record")


class LaterSites(Sequence[dict[str, Any]]):
    """The table of sites of a record, read from its file when somebody asks for a row.

    Args:
        count: Number of rows.
        read: Reads them.
    """

    def __init__(self, count: int, read: Callable[[], Sequence[dict[str, Any]]]) -> None:
        self._count = count
        self._read = read
        self._rows: Sequence[dict[str, Any]] | None = None

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, place: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[dict[str, Any]]: ...
    def __getitem__(self, place: int | slice) -> dict[str, Any] | Sequence[dict[str, Any]]:
        if self._rows is None:
            self._rows = self._read()
        return self._rows[place]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)


_Row = tuple[str, int, str]
"""sha256 of the file, number of sites, the record without them as JSON."""


class Index:
    """The index of a results folder, in memory.

    Args:
        folder: The results folder.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self._rows = dict(_read(self._path))
        self._new = 0

    def find(
        self, digest: str, cell_id: str, cell: Cell | None, sites: Callable[[], Sequence[dict[str, Any]]]
    ) -> Record | None:
        """The record of a cell's file.

        Args:
            digest: sha256 of the file's bytes.
            cell_id: The cell's id.
            cell: The cell, where the caller has it.
            sites: Reads the table of its sites.

        Returns:
            ``None`` if the file is not the one that is known.
        """
        row = self._rows.get(cell_id)
        return None if row is None or row[0] != digest else _unpacked(row, cell, sites)

    def add(self, digest: str, record: Record) -> None:
        """Note a record that was parsed and found whole, in place of an earlier one of its cell.

        :meth:`find` then gives it without its sites, of which thousands of records fill the memory.
        """
        self._rows[record.cell.cell_id] = (digest, len(record.sites), _packed(record))
        self._new += 1

    def save(self) -> None:
        """Write the index if that is worth it; a folder that cannot be written does without."""
        if self._new >= WORTH_IT:
            with contextlib.suppress(StoreError):
                _write(self._path, dict(sorted(self._rows.items())))
            self._new = 0


def _packed(record: Record) -> str:
    body = asdict(replace(record, sites=[]))
    return json.dumps(body, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _unpacked(row: _Row, cell: Cell | None, sites: Callable[[], Sequence[dict[str, Any]]]) -> Record:
    _, count, text = row
    body = json.loads(text)
    body["cell"] = Cell(**body["cell"]) if cell is None else cell
    if body["result"] is not None:
        noise = body["result"]["noise"]
        body["result"] = Result(**body["result"] | {"noise": None if noise is None else Noise(**noise)})
    if body["quantized"] is not None:
        body["quantized"] = Kept(**body["quantized"])
    body["sites"] = LaterSites(count, sites)
    return Record(**body)


def _shape() -> str:
    """What decides how a record is packed: an index of another version of the code is none."""
    kinds = (Record, Cell, Result, Noise, Kept)
    return json.dumps([VERSION, *([field.name for field in fields(kind)] for kind in kinds)])


def _seal(rows: Iterable[tuple[str, _Row]]) -> str:
    digest = hashlib.sha256(_shape().encode())
    for cell_id, (file, sites, record) in rows:
        digest.update(f"{cell_id} {file} {sites} {len(record)} {record}\n".encode())
    return digest.hexdigest()


def _write(path: Path, rows: dict[str, _Row]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = [list(rows), *(list(column) for column in zip(*rows.values(), strict=True))]
    table = pa.table(dict(zip(_COLUMNS, columns, strict=True)))
    table = table.replace_schema_metadata({"seal": _seal(rows.items())})
    # the records repeat each other
    write_atomically(path, lambda temporary: pq.write_table(table, temporary, compression="zstd"))


def _read(path: Path) -> list[tuple[str, _Row]]:
    """The rows of an index by cell id; none if it is absent, damaged, or of another version."""
    if not path.is_file():
        return []
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # not `read_table`, which imports pandas
        table: pa.Table = pq.ParquetFile(path).read()
        cell_ids, *others = (table[name].to_pylist() for name in _COLUMNS)
    except (OSError, KeyError, pa.ArrowException):
        return []
    rows = list(zip(cell_ids, zip(*others, strict=True), strict=True))
    seal = (table.schema.metadata or {}).get(b"seal", b"").decode(errors="replace")
    return rows if seal == _seal(rows) else []
