"""What the two files of published results hold, read when it is asked for: see ``reference_store``."""

from __future__ import annotations

import json
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from quanttune.errors import StoreError

if TYPE_CHECKING:
    import pyarrow as pa


@lru_cache(maxsize=1)
def files_of(records: tuple[Path, str], items: tuple[Path, str]) -> Files:
    """The files at two paths; those that were read last are not read again.

    Args:
        records: The file of records and the digest that it was found to have.
        items: The file of arrays and its digest.
    """
    return Files(records[0], items[0])


class Files:
    """The records and the arrays of published results.

    Args:
        records: The file of records.
        items: The file of arrays.
    """

    def __init__(self, records: Path, items: Path) -> None:
        self.records = records
        self.items = items

    @cached_property
    def measured(self) -> dict[str, tuple[list[str], str]]:
        """The suites that have it, and the record as JSON, by id of the row."""
        table = _read(self.records)
        columns = (table[name].to_pylist() for name in ("cell_id", "suites", "record"))
        return {row: (suites, text) for row, suites, text in zip(*columns, strict=True)}

    @cached_property
    def references(self) -> dict[str, tuple[str, str | None]]:
        """The identity of the model and the digest of its reference's weights, by id of the row."""
        records = {row: json.loads(text) for row, (_, text) in self.measured.items()}
        return {
            row: (str(record["cell"]["model_identity"]), record.get("reference_digest"))
            for row, record in records.items()
        }

    @cached_property
    def arrays(self) -> dict[str, dict[str, np.ndarray]]:
        """The published arrays of every measured cell that has any, by id of the row and name."""
        kept: dict[str, np.ndarray] = {}
        found: dict[str, dict[str, np.ndarray]] = {}
        for row in _read(self.items).to_pylist():
            if row["data"] is not None:
                packed = np.frombuffer(row["data"], dtype=row["packed"])
                kept[row["digest"]] = packed.astype(row["dtype"]).reshape(row["shape"])
            found.setdefault(row["cell_id"], {})[row["name"]] = kept[row["digest"]]
        return found


def _read(path: Path) -> pa.Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise StoreError(f"cannot read {path}: {error}; get the folder again") from error
