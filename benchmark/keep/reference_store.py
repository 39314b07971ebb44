"""Results that come with the code: the records of kept suites in two Parquet files, to be read like a store.

Layout of the folder, ``results/reference`` in a checkout::

    manifest.json             schema, suites, and the sha256 of the files
    records-<digest>.parquet  a row a measured cell: its id, the suites that have it, its record as JSON
    items-<digest>.parquet    a row for every array of every one, packed into the narrowest type that holds it

The manifest names both files, and is written when they are there: a folder is as before or as after.

Suites that were measured on different machines have different reference weights, and so different numbers of
a cell that they share. Each keeps its own: the id of such a row is the cell's, ``@`` and the beginning of the
record's digest. A suite is seen with one set of weights for each model, its own or, where it was not
published, the main job's; a cell that was measured on others is missing then. Where no suite is asked for,
the main job's number stands for a cell, and where that has none the first suite's by name.

A record is checked against its own digest, the files against the manifest's. What is left out of the items
are quantities that only further metrics need: their values stand in the record, and the record's digest of
all items tells whether a new measurement gives the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from copy import copy
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmark.grid.suite import DEFAULT_SUITE
from benchmark.keep.folder import same_components, same_place
from benchmark.keep.record import Record
from benchmark.keep.reference_files import files_of
from benchmark.keep.stages import Stages
from benchmark.keep.store import Store
from quanttune.digests import json_digest, sha256_file
from quanttune.errors import StoreError
from quanttune.files import read_json

if TYPE_CHECKING:
    from benchmark.grid.cells import Cell
    from quanttune.quantization import Quantized

MANIFEST, RECORDS, ITEMS = "manifest.json", "records", "items"
SCHEMA = 2
"""2 since a cell may have been measured on several reference weights."""
PUBLISHED = ("ids", "targets", "scores", "predictions")
"""The arrays of a cell that are published."""
ALIAS = "reference"
_CHECKOUT = Path(__file__).parents[2] / "results" / ALIAS


def reference_folder() -> Path | None:
    """The folder that came with this checkout; ``None`` where the package is installed without one."""
    return _CHECKOUT if (_CHECKOUT / MANIFEST).is_file() else None


def folder_of(results: Path) -> Path:
    """The folder that is meant: ``reference`` is the one that came with the code, unless one has that name.

    Raises:
        StoreError: If none came with it.
    """
    if results != Path(ALIAS) or results.exists():
        return results
    found = reference_folder()
    if found is None:
        raise StoreError(
            "no results came with this installation; they are in the repository, in results/reference"
        )
    return found


def open_store(results: Path) -> Store:
    """A results folder: the user's own, or a published one, which can only be read.

    Args:
        results: As :func:`folder_of` takes it.

    Raises:
        StoreError: If it is no results folder, or was written by a newer version.
    """
    folder = folder_of(results)
    return ReferenceStore(folder) if is_published(folder) else Store(folder)


def is_published(results: Path) -> bool:
    """Whether a results folder, as :func:`folder_of` takes it, holds published results."""
    return (folder_of(results) / MANIFEST).is_file()


def measuring_option(store: Store) -> str:
    """Options with which a command measures what this one lacks, `` --results DIR --include FILE`` or fewer.

    Published results are only read: what is measured goes to the user's own folder.
    """
    return same_components() if isinstance(store, ReferenceStore) else same_place(store.root)


def refuse_published(store: Store, what: str) -> None:
    """Refuse published results for what would write into them.

    Raises:
        StoreError: If ``store`` holds such.
    """
    if isinstance(store, ReferenceStore):
        raise StoreError(
            f"{store.root} holds published results and cannot be {what}; choose another --results"
        )


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
        if not isinstance(manifest, dict):
            raise StoreError(f"{path} is damaged or was edited; get the folder again")
        body = {name: value for name, value in manifest.items() if name != "digest"}
        schema = body.get("schema")
        if isinstance(schema, int) and schema > SCHEMA:
            raise StoreError(
                f"{path} has schema {schema}, this version reads up to {SCHEMA}; upgrade quanttune-bench"
            )
        named, suites = body.get("files"), body.get("suites")
        sealed = manifest.get("digest") == json_digest(body)
        if not sealed or not isinstance(named, dict) or not isinstance(suites, dict):
            raise StoreError(f"{path} is damaged or was edited; get the folder again")
        paths = {kind: self.root / _named(kind, named, path) for kind in (RECORDS, ITEMS)}
        for file in paths.values():
            if not file.is_file():
                raise StoreError(f"{file} is absent; get the folder again")
            if sha256_file(file) != named[file.name]:
                raise StoreError(f"{file} is not the file that was published; get it again")
        self.suites: Mapping[str, int] = suites
        records, items = ((paths[kind], named[paths[kind].name]) for kind in (RECORDS, ITEMS))
        self.files = files_of(records, items)
        self._suite: str | None = None

    @property
    def views(self) -> Path:
        """Tables and figures go beside the folder, where its own are."""
        return self.root.parent

    @property
    def stages(self) -> Stages:
        """What a figure measures is kept beside the folder."""
        return Stages(self.views / "stages")

    def of_suite(self, name: str) -> ReferenceStore:
        """The same results as a suite sees them: its own measurement of every cell, one reference a model.

        Args:
            name: A suite's name; one that is not published sees the main job's references.
        """
        view = copy(self)
        for made in ("_rows", "_references_of_suite"):
            view.__dict__.pop(made, None)
        view._suite = name
        return view

    def _ranked(self) -> list[str]:
        """The rows, those that come first for a suite first."""
        measured = self.files.measured

        def rank(row: str) -> tuple[bool, bool, list[str], str]:
            suites = measured[row][0]
            return self._suite not in suites, DEFAULT_SUITE not in suites, suites, row

        return sorted(measured, key=rank)

    @cached_property
    def _references_of_suite(self) -> dict[str, str]:
        """Digest of the reference's weights that a suite sees of a model, by the model's identity."""
        found: dict[str, str] = {}
        for row in self._ranked():
            identity, digest = self.files.references[row]
            if digest:
                found.setdefault(identity, digest)
        return found

    @cached_property
    def _rows(self) -> dict[str, str]:
        """Id of the row that counts, by cell id."""
        found: dict[str, str] = {}
        for row in self._ranked():
            if self._suite is not None:
                identity, digest = self.files.references[row]
                if digest and digest != self._references_of_suite[identity]:
                    continue
            found.setdefault(cell_of(row), row)
        return found

    def references_of(self, model_identity: str) -> set[str]:
        """Digests of all reference weights on which cells of a model were measured."""
        found = self.files.references.values()
        return {digest for identity, digest in found if identity == model_identity and digest}

    def suites_of(self, cell_id: str) -> list[str]:
        """Names of the suites that have the measurement of a cell that counts here."""
        return self.files.measured[self._rows[cell_id]][0]

    def elsewhere(self, cell_id: str) -> list[str]:
        """Names of the suites whose number of a cell is another, because their weights are."""
        own = self._rows[cell_id]
        return sorted(
            name
            for row, (suites, _) in self.files.measured.items()
            if cell_of(row) == cell_id and row != own
            for name in suites
        )

    def measurements(self) -> Iterator[tuple[Record, Store]]:
        """Every record, and the view where it stands for its cell."""
        for row, (suites, _) in sorted(self.files.measured.items()):
            view = self.of_suite(suites[0])
            yield view.find(cell_of(row)), view

    def measured_like(self, record: Record) -> ReferenceStore:
        """The view where a record stands; else where its cell has the same reference weights; else this."""
        cell_id = record.cell.cell_id
        if cell_id not in self._rows:
            return self
        views = [self, *(self.of_suite(name) for name in self.elsewhere(cell_id))]
        found = [(view, view.find(cell_id)) for view in views]
        same = [view for view, other in found if other == record]
        alike = [view for view, other in found if other.reference_digest == record.reference_digest]
        return next(iter([*same, *alike]), self)

    def _read(self, cell_id: str, cell: Cell | None = None) -> Record | None:
        row = self._rows.get(cell_id)
        if row is None:
            return None
        text = self.files.measured[row][1]
        record = Record.from_json(json.loads(text), str(self.files.records))
        return record if record is not None and record.cell.cell_id == cell_id else None

    def digest_of(self, cell_id: str) -> str:
        """Digest of a cell's record; empty if there is none."""
        row = self._rows.get(cell_id)
        return "" if row is None else sha256(self.files.measured[row][1].encode()).hexdigest()

    def _ids(self) -> list[str]:
        return sorted(self._rows)

    def items(self, cell_id: str) -> dict[str, np.ndarray]:
        """The published arrays of a cell: those of :data:`PUBLISHED` that it has.

        Raises:
            StoreError: If the cell has none.
        """
        row = self._rows.get(cell_id)
        if row not in self.files.arrays:
            raise StoreError(f"cell {cell_id[:12]} has no published per-item predictions")
        return dict(self.files.arrays[row])

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
        refuse_published(self, "measured into")

    def require_writable(self) -> None:
        """What is drawn goes beside the folder, not into it."""


def _named(kind: str, named: Mapping[str, str], manifest: Path) -> str:
    """The name of the file of a kind, ``records-<digest>.parquet``."""
    for name in named:
        if name.startswith(kind) and name.endswith(".parquet") and Path(name).name == name:
            return name
    raise StoreError(f"{manifest} names no file of {kind}; get the folder again")


def cell_of(row: str) -> str:
    """The cell of a row, by the row's id."""
    return row.partition("@")[0]
