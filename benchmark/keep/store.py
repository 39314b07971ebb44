"""The store: one JSON file per cell, content-addressed, whole or absent; per-item predictions beside it.

Layout of a results folder::

    store.json                      schema of the folder
    cells/<cell id>.json            a finished cell
    cells/<cell id>.safetensors     its per-item scores, predictions and what further metrics need
    cells/<cell id>.quantized.safetensors  its quantized model, see :mod:`benchmark.keep.quantized`
    failures/<cell id>.json         why a cell failed last; never read as a result
    references/<identity>.json      digest of the reference weights a model has at present
    locks/<cell id>.lock            a cell under way, or interrupted
    index.parquet                   what views read of many records, see :mod:`benchmark.keep.index`
    stages/<name>/<key>.safetensors expensive intermediate results, see :mod:`benchmark.keep.stages`
    tables/, mlflow.db, mlartifacts/  views, made again by `table` and `sync`
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmark.grid.cells import Cell
from benchmark.keep.atomic import (
    file_lock,
    is_free,
    require_writable,
    write_atomically,
    write_text_atomically,
)
from benchmark.keep.folder import same_place
from benchmark.keep.index import Index
from benchmark.keep.quantized import keep_quantized, read_quantized
from benchmark.keep.reading import content_of, is_intact, json_of, parsed_record
from benchmark.keep.record import SCHEMA, Record, refuse_newer
from benchmark.keep.stages import Stages
from quanttune.digests import sha256_file
from quanttune.errors import StoreError
from quanttune.files import parse_json, remove_abandoned

if TYPE_CHECKING:
    import numpy as np

    from quanttune.quantization import Quantized

_DIGEST = re.compile(r"[0-9a-f]{64}")
_WRITTEN = ("cells", "failures", "references", "locks", "stages")
_SWEPT = (".", "cells", "failures", "references", "tables", "figures", "report")
_QUANTIZED = ".quantized.safetensors"
_ENDINGS = (".safetensors", _QUANTIZED, ".json")
_PREFIX = re.compile(r"[0-9a-f]{1,64}")


class Store:
    """A results folder.

    Args:
        root: The folder; made on first write.

    Raises:
        StoreError: If the folder was written by a newer version or is not a folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        if self.root.exists() and not self.root.is_dir():
            raise StoreError(f"{root} is a file, not a results folder; choose another --results")
        marker = json_of(self.root / "store.json")
        if isinstance(marker, dict):
            refuse_newer(marker.get("schema"), str(self.root / "store.json"))
        self._index: Index | None = None
        self._digests: dict[str, str] = {}
        self._references: dict[str, str | None] = {}

    @contextlib.contextmanager
    def indexed(self) -> Iterator[None]:
        """Read many records: each file is hashed as ever, and parsed only where the index does not know it.

        Whoever measures meanwhile is seen or not; a model's present reference is looked up once.
        """
        if self._index is not None:
            yield
            return
        self._index = Index(self.root)
        try:
            yield
            self._index.save()
        finally:
            self._index, self._references = None, {}

    def prepare(self) -> None:
        """Make the folder and its marker, so that a full or read-only disk is noticed before the work.

        Temporary files of processes that were killed go.

        Raises:
            StoreError: If nothing can be written there.
        """
        self.require_writable()
        for folder in (*(self.root / name for name in _SWEPT), *(self.root / "stages").glob("*/")):
            remove_abandoned(folder)
        if json_of(self.root / "store.json") is None:
            write_text_atomically(self.root / "store.json", json.dumps({"schema": SCHEMA}) + "\n")

    def require_writable(self) -> None:
        """Refuse a folder that cannot be written, before any work.

        Raises:
            StoreError: Naming it.
        """
        for folder in (self.root, *(self.root / name for name in _WRITTEN)):
            if folder == self.root or folder.exists():
                require_writable(folder)

    def load(self, cell: Cell) -> Record | None:
        """The finished record of a cell.

        Returns:
            ``None`` if there is none, it was truncated or edited, its predictions are damaged, or it was
            measured against other reference weights than the model has now.
        """
        record = self._read(cell.cell_id, cell)
        if record is None:
            return None
        present = self.reference_digest(cell.model_identity)
        if record.reference_digest and present and record.reference_digest != present:
            return None
        return record

    def save(
        self,
        record: Record,
        items: Mapping[str, np.ndarray] | None = None,
        quantized: Quantized | None = None,
    ) -> Record:
        """Keep a finished cell with its per-item arrays and its quantized model, and forget a failure of it.

        Weights that no stage has yet become one.

        Returns:
            The record as kept, with the digests of both.

        Raises:
            StoreError: If the disk is full or cannot be written; then nothing half-written is left.
        """
        cell_id = record.cell.cell_id
        if items:
            from safetensors.numpy import save_file

            path = self._file("cells", cell_id, ".safetensors")
            write_atomically(path, lambda temporary: save_file(dict(items), temporary))
            record = replace(record, items_sha256=sha256_file(path))
        if quantized is not None:
            path = self._file("cells", record.cell.cell_id, _QUANTIZED)
            kept = keep_quantized(path, quantized, record.weights_digest or "", self.stages)
            record = replace(record, quantized=kept)
        text = json.dumps(record.to_json(), indent=1, sort_keys=True, allow_nan=False) + "\n"
        write_text_atomically(self._file("cells", cell_id, ".json"), text)
        self._file("failures", cell_id, ".json").unlink(missing_ok=True)
        return record

    def quantized(self, record: Record) -> Quantized:
        """The quantized model of a cell whose record names one.

        Raises:
            StoreError: If it was not kept, or a file is absent or damaged.
            AssetError: If it does not hold what it promises.
        """
        cell_id = record.cell.cell_id
        if record.quantized is None:
            raise StoreError(f"cell {cell_id[:12]} has no quantized model")
        kept = record.quantized
        return read_quantized(
            self._file("cells", cell_id, _QUANTIZED), kept.sha256, self.stages, kept.weights
        )

    def of_suite(self, name: str) -> Store:
        """Where the numbers of a suite are read: here; published results may have several of one cell."""
        return self

    def measurements(self) -> Iterator[tuple[Record, Store]]:
        """Every record, and where it stands for its cell; published results may have several of one."""
        for record in self.records():
            yield record, self

    @property
    def views(self) -> Path:
        """The folder of tables, figures and reports."""
        return self.root

    @property
    def stages(self) -> Stages:
        """The folder's stages."""
        return Stages(self.root / "stages")

    def measured_like(self, record: Record) -> Store:
        """Where a record of this store stands with its arrays: here."""
        return self

    def items(self, cell_id: str) -> dict[str, np.ndarray]:
        """The per-item arrays of a finished cell: ``ids``, ``scores`` and, for classifiers, ``predictions``.

        Cells measured since there are several metrics also hold the quantities these are made from, by name.

        Raises:
            StoreError: If the cell has none.
        """
        from safetensors.numpy import load_file

        path = self._file("cells", cell_id, ".safetensors")
        if not path.exists():
            raise StoreError(f"cell {cell_id[:12]} has no per-item predictions; run it again")
        return dict(load_file(path))

    def digest_of(self, cell_id: str) -> str:
        """Digest of the record that was read last of a cell; empty if none was."""
        return self._digests.get(cell_id, "")

    def files_of(self, record: Record) -> list[Path]:
        """The files of a finished cell that are there: its record, arrays and quantized model."""
        paths = [self.path_of(record.cell.cell_id, ending) for ending in _ENDINGS]
        return [path for path in paths if path.is_file() and not path.is_symlink()]

    def path_of(self, cell_id: str, ending: str = ".json") -> Path:
        """Where a file of a cell is, or would be.

        Raises:
            StoreError: If it is no cell's id.
        """
        return self._file("cells", cell_id, ending)

    def save_failure(self, cell: Cell, failure: Mapping[str, Any]) -> None:
        """Keep why a cell failed."""
        body = {"schema": SCHEMA, "cell_id": cell.cell_id, "cell": cell.identity(), **failure}
        text = json.dumps(body, indent=1, sort_keys=True) + "\n"
        write_text_atomically(self._file("failures", cell.cell_id, ".json"), text)

    def load_failure(self, cell_id: str) -> dict[str, Any] | None:
        """Why a cell failed last: ``error``, ``traceback``, ``failed_at``; ``None`` if it did not."""
        failure = json_of(self._file("failures", cell_id, ".json"))
        return failure if isinstance(failure, dict) and "error" in failure else None

    def failures(self) -> Iterator[tuple[Cell, dict[str, Any]]]:
        """Every cell that failed, with why, in order of cell id; damaged files are passed over."""
        for path in sorted((self.root / "failures").glob("*.json")):
            failure = self.load_failure(path.stem) if _DIGEST.fullmatch(path.stem) else None
            try:
                cell = None if failure is None else Cell.from_identity(failure["cell"])
            except (AttributeError, KeyError, TypeError, ValueError):
                continue
            if cell is not None and failure is not None and cell.cell_id == path.stem:
                yield cell, failure

    def find_or_none(self, cell_id: str) -> Record | None:
        """The intact record with this id, whatever reference it was measured against."""
        return self._read(cell_id)

    def records(self) -> Iterator[Record]:
        """Every intact record, in order of cell id."""
        for cell_id in self._ids():
            record = self._read(cell_id)
            if record is not None:
                yield record

    def find(self, prefix: str) -> Record:
        """The one record whose cell id starts with ``prefix``.

        Raises:
            StoreError: If there is none, or more than one.
        """
        listed = f"see `list cells{same_place(self.root)}`"
        if not _PREFIX.fullmatch(prefix):
            raise StoreError(f"{prefix!r} is not the start of a cell id; ids are hexadecimal, {listed}")
        matches = [cell_id for cell_id in self._ids() if cell_id.startswith(prefix)]
        if len(matches) > 1:
            raise StoreError(
                f"{prefix!r} starts {len(matches)} cell ids; give more digits, e.g. {matches[0][:16]}"
            )
        record = self._read(matches[0]) if matches else None
        if record is None:
            raise StoreError(f"no finished cell starts with {prefix!r} in {self.root}; {listed}")
        return record

    def reference_digest(self, model_identity: str) -> str | None:
        """Digest of the reference weights a model has at present, ``None`` if they were not made yet."""
        if model_identity in self._references:
            return self._references[model_identity]
        found = json_of(self._file("references", model_identity, ".json"))
        digest = found.get("digest") if isinstance(found, dict) else None
        digest = digest if isinstance(digest, str) else None
        if self._index is not None:
            self._references[model_identity] = digest
        return digest

    def save_reference_digest(self, model: str, model_identity: str, digest: str) -> None:
        """Keep the digest of a model's reference weights, so that results against others count as missing."""
        if self.reference_digest(model_identity) != digest:
            text = json.dumps({"schema": SCHEMA, "model": model, "digest": digest}) + "\n"
            write_text_atomically(self._file("references", model_identity, ".json"), text)

    @contextlib.contextmanager
    def cell_lock(self, cell_id: str) -> Iterator[None]:
        """Hold a cell, so that no two processes measure it at once; freed by the system if the holder dies.

        The lock's file goes when the cell is finished; one that stays behind tells of an interrupted cell.
        """
        path = self._file("locks", cell_id, ".lock")
        with file_lock(path):
            yield
            path.unlink(missing_ok=True)

    def was_interrupted(self, cell_id: str) -> bool:
        """Whether a process began the cell and ended before the cell did."""
        path = self._file("locks", cell_id, ".lock")
        # one that is held is being measured right now
        return path.exists() and is_free(path)

    def _ids(self) -> list[str]:
        """Ids of the cells that have a record, intact or not, sorted."""
        names = (path.stem for path in (self.root / "cells").glob("*.json"))
        return sorted(filter(_DIGEST.fullmatch, names))

    def _file(self, folder: str, digest: str, ending: str) -> Path:
        if not _DIGEST.fullmatch(digest):  # what comes from outside must not become a path
            raise StoreError(f"{digest!r} is not a sha256 digest")
        return self.root / folder / f"{digest}{ending}"

    def _read(self, cell_id: str, cell: Cell | None = None) -> Record | None:
        """The intact record of an id; ``cell`` is the cell of that id, where the caller has it."""
        path = self._file("cells", cell_id, ".json")
        content = content_of(path)
        if content is None:
            return None
        digest = sha256(content).hexdigest()
        index = self._index
        record = None if index is None else self._known(index, digest, cell_id, cell)
        if record is None:
            record = parsed_record(content, path, cell_id)
            if record is None:
                return None
            if index is not None:
                index.add(digest, record)
                record = self._known(index, digest, cell_id, cell) or record
        self._digests[cell_id] = digest
        items = record.items_sha256
        whole = items is None or is_intact(self._file("cells", cell_id, ".safetensors"), items)
        return record if whole else None

    def _known(self, index: Index, digest: str, cell_id: str, cell: Cell | None) -> Record | None:
        return index.find(digest, cell_id, cell, lambda: self._sites(cell_id, digest))

    def _sites(self, cell_id: str, digest: str) -> Sequence[dict[str, Any]]:
        """The table of sites of a record whose file had this digest."""
        path = self._file("cells", cell_id, ".json")
        content = content_of(path)
        if content is None or sha256(content).hexdigest() != digest:
            raise StoreError(f"{path} was changed while it was read; give the command again")
        # The record was found whole when it was indexed.
        sites: list[dict[str, Any]] = parse_json(content)["sites"]
        return sites
