"""Results that come with the code: the records of kept suites in two Parquet files, to be read like a store.

Layout of the folder, ``results/reference`` in a checkout::

    manifest.json    schema, suites, and the sha256 of the files
    records.parquet  a row a cell: its id, the suites that have it, its record as JSON
    items.parquet    a row for every array of every cell, packed into the narrowest type that holds it

A record is checked against its own digest, the files against the manifest's. What is left out of the items
are quantities that only further metrics need: their values stand in the record, and the record's digest of
all items tells whether a new measurement gives the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmark.keep.record import Record
from benchmark.keep.stages import Stages
from benchmark.keep.store import Store
from quanttune.digests import json_digest, sha256_file
from quanttune.errors import StoreError
from quanttune.files import read_json

if TYPE_CHECKING:
    import pyarrow as pa

    from benchmark.grid.cells import Cell
    from quanttune.quantization import Quantized

MANIFEST, RECORDS, ITEMS = "manifest.json", "records.parquet", "items.parquet"
SCHEMA = 1
PUBLISHED = ("ids", "targets", "scores", "predictions")
"""The arrays of a cell that are published."""
ALIAS = "reference"
_CHECKOUT = Path(__file__).parents[2] / "results" / ALIAS


def reference_folder() -> Path | None:
    """The folder that came with this checkout; ``None`` where the package is installed without one."""
    return _CHECKOUT if (_CHECKOUT / MANIFEST).is_file() else None


def open_store(results: Path) -> Store:
    """A results folder: the user's own, or a published one, which can only be read.

    Args:
        results: The folder; ``reference`` is the one that came with the code, unless a folder has that name.

    Raises:
        StoreError: If it is no results folder, or was written by a newer version.
    """
    if results == Path(ALIAS) and not results.exists():
        found = reference_folder()
        if found is None:
            raise StoreError(
                "no results came with this installation; they are in the repository, in results/reference"
            )
        results = found
    return ReferenceStore(results) if (results / MANIFEST).is_file() else Store(results)


class ReferenceStore(Store):
    """Published results: everything a view reads of a store, and nothing that could be written.

    Args:
        root: The folder of the files.

    Raises:
        StoreError: If a file is absent or is not the one that was published, or a newer version wrote it.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        path = self.root / MANIFEST
        try:
            manifest = read_json(path)
        except (OSError, ValueError) as error:
            raise StoreError(f"cannot read {path}: {error}; get the folder again") from error
        body = {name: value for name, value in manifest.items() if name != "digest"}
        schema = body.get("schema")
        if isinstance(schema, int) and schema > SCHEMA:
            raise StoreError(
                f"{path} has schema {schema}, this version reads up to {SCHEMA}; upgrade quanttune-bench"
            )
        if manifest.get("digest") != json_digest(body):
            raise StoreError(f"{path} is damaged or was edited; get the folder again")
        for name, digest in sorted(body["files"].items()):
            if name not in (RECORDS, ITEMS) or not (self.root / name).is_file():
                raise StoreError(f"{self.root / name} is absent; get the folder again")
            if sha256_file(self.root / name) != digest:
                raise StoreError(f"{self.root / name} is not the file that was published; get it again")
        self.suites: Mapping[str, int] = body["suites"]

    @property
    def views(self) -> Path:
        """Tables and figures go beside the folder, where its own are."""
        return self.root.parent

    @property
    def stages(self) -> Stages:
        """What a figure measures is kept beside the folder."""
        return Stages(self.views / "stages")

    @cached_property
    def texts(self) -> dict[str, str]:
        """The record of every cell as JSON, by cell id."""
        table = _read(self.root / RECORDS)
        return dict(zip(table["cell_id"].to_pylist(), table["record"].to_pylist(), strict=True))

    @cached_property
    def suites_of(self) -> dict[str, list[str]]:
        """Names of the suites that have a cell, by cell id."""
        table = _read(self.root / RECORDS)
        return dict(zip(table["cell_id"].to_pylist(), table["suites"].to_pylist(), strict=True))

    @cached_property
    def arrays(self) -> dict[str, dict[str, np.ndarray]]:
        """The published arrays of every cell that has any, by cell id and name."""
        kept: dict[str, np.ndarray] = {}
        found: dict[str, dict[str, np.ndarray]] = {}
        for row in _read(self.root / ITEMS).to_pylist():
            if row["data"] is not None:
                packed = np.frombuffer(row["data"], dtype=row["packed"])
                kept[row["digest"]] = packed.astype(row["dtype"]).reshape(row["shape"])
            found.setdefault(row["cell_id"], {})[row["name"]] = kept[row["digest"]]
        return found

    def _read(self, cell_id: str, cell: Cell | None = None) -> Record | None:
        text = self.texts.get(cell_id)
        record = None if text is None else Record.from_json(json.loads(text), str(self.root / RECORDS))
        return record if record is not None and record.cell.cell_id == cell_id else None

    def digest_of(self, cell_id: str) -> str:
        """Digest of a cell's record; empty if there is none."""
        text = self.texts.get(cell_id)
        return "" if text is None else sha256(text.encode()).hexdigest()

    def _ids(self) -> list[str]:
        return sorted(self.texts)

    def items(self, cell_id: str) -> dict[str, np.ndarray]:
        """The published arrays of a cell: those of :data:`PUBLISHED` that it has.

        Raises:
            StoreError: If the cell has none.
        """
        if cell_id not in self.arrays:
            raise StoreError(f"cell {cell_id[:12]} has no published per-item predictions")
        return dict(self.arrays[cell_id])

    def quantized(self, record: Record) -> Quantized:
        """Quantized models are not published: a run makes them again.

        Raises:
            StoreError: Always.
        """
        raise StoreError("quantized models are not among the published results")

    def load_failure(self, cell_id: str) -> dict[str, Any] | None:
        """No failure is published."""
        return None

    def reference_digest(self, model_identity: str) -> str | None:
        """Every record is held against the reference that it names itself."""
        return None

    def was_interrupted(self, cell_id: str) -> bool:
        """Nothing is measured here."""
        return False

    def prepare(self) -> None:
        """Refuse to measure into published results.

        Raises:
            StoreError: Always.
        """
        raise StoreError(
            f"{self.root} holds published results and cannot be measured into; choose another --results"
        )

    def require_writable(self) -> None:
        """What is drawn goes beside the folder, not into it."""


def _read(path: Path) -> pa.Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise StoreError(f"cannot read {path}: {error}; get the folder again") from error
