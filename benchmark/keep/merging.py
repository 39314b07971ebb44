"""Taking the cells of one store into another: each once, and none over another's number.

A cell that both have with the same number stays as it is. One with two numbers is a conflict: both are told
and neither is touched. So is a model whose reference weights are others, because its drops are drops from
another place.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from benchmark.keep.atomic import write_atomically
from benchmark.keep.lock import Lock, LockError
from benchmark.keep.publishing import SUBMITTED, extend
from benchmark.keep.record import Record
from benchmark.keep.reference_store import ReferenceStore
from benchmark.keep.store import Store
from quanttune.errors import StoreError


@dataclass(frozen=True)
class Conflict:
    """Two values for one thing.

    Attributes:
        what: The cell, or the model whose weights or data are others.
        ours: The value of the store that takes.
        theirs: That of the store that gives.
        cells: How many cells are left out for it.
    """

    what: str
    ours: str
    theirs: str
    cells: int = 1

    def __str__(self) -> str:
        cells = "1 cell is" if self.cells == 1 else f"{self.cells} cells are"
        return f"{self.what}: {self.ours} here, {self.theirs} there; {cells} left out"


@dataclass
class Difference:
    """What one store has that another has not.

    Attributes:
        new: Records to take, in order of cell id.
        present: Cells that both have with the same number.
        conflicts: Cells and models with two.
        limited: Cells of ``--limit``, which published results do not take.
    """

    new: list[Record] = field(default_factory=list)
    present: int = 0
    conflicts: list[Conflict] = field(default_factory=list)
    limited: int = 0


def difference(source: Store, target: Store) -> Difference:
    """Compare two stores; nothing is written.

    Args:
        source: Which gives. Cells measured against other reference weights than it has now are left out, as
            everywhere.
        target: Which takes.
    """
    found = Difference()
    weights: dict[str, str] = {}
    others: dict[str, list[Record]] = {}
    new: dict[str, tuple[Record, Store]] = {}
    for record, its in source.measurements():
        cell = record.cell
        if its.load(cell) is None:
            continue
        ours = target.measured_like(record)
        known = ours.find_or_none(cell.cell_id)
        if known is None and cell.cell_id in new:
            known, ours = new[cell.cell_id]
        if known is not None:
            conflict = _conflict(known, ours, record, its)
            if conflict is None:
                found.present += 1
            else:
                found.conflicts.append(conflict)
            continue
        if cell.limit is not None and isinstance(target, ReferenceStore):
            found.limited += 1
            continue
        digest = record.reference_digest
        if digest:
            kept = _kept_reference(target, cell.model_identity, digest)
            if weights.setdefault(cell.model_identity, kept or digest) != digest:
                others.setdefault(cell.model_identity, []).append(record)
                continue
        new[cell.cell_id] = record, its
    found.new.extend(record for record, _ in new.values())
    for identity, left in sorted(others.items()):
        what = f"reference weights of {left[0].cell.model}"
        theirs = str(left[0].reference_digest)[:12]
        found.conflicts.append(Conflict(what, weights[identity][:12], theirs, len(left)))
    return found


def _kept_reference(target: Store, model_identity: str, digest: str) -> str | None:
    """The reference weights that a store has of a model; of several published ones the given, if there."""
    if not isinstance(target, ReferenceStore):
        return target.reference_digest(model_identity)
    published = target.references_of(model_identity)
    return digest if digest in published else min(published, default=None)


def require_takeable(source: Store, target: Store) -> None:
    """Refuse cells that the target cannot hold, before any of them is measured again.

    Raises:
        StoreError: If the source has published results, which keep no models, and the target is a store.
    """
    if isinstance(source, ReferenceStore) and not isinstance(target, ReferenceStore):
        raise StoreError(
            f"{source.root} holds published results without all that a store keeps; read them with --results"
        )


def take(
    source: Store,
    target: Store,
    records: Iterable[Record],
    suites: Callable[[Record], list[str]] = lambda _: [SUBMITTED],
) -> Difference:
    """Copy cells with their arrays and quantized models; each is there whole or not at all.

    Args:
        source: Where they are.
        target: Where they go: a store of the user, or published results, which then are written anew.
        records: Of :func:`difference`.
        suites: Under which suites published results keep a cell.

    Returns:
        What was taken as ``new``, and what a process beside this one brought meanwhile, or what the
        folder's lock file refuses.

    Raises:
        StoreError: If they cannot be written, or published results would become too large; what was taken
            until then stays, and the same call goes on from there.
    """
    records = list(records)
    if isinstance(target, ReferenceStore):
        names = {record.cell.cell_id: suites(record) for record in records}
        of = {record.cell.cell_id: source.measured_like(record) for record in records}
        extend(target.root, names, records, lambda cell_id: of[cell_id].items(cell_id))
        return Difference(records)
    require_takeable(source, target)
    taken = Difference()
    target.prepare()
    refused = _pin(source, target, records, taken)
    for record in records:
        cell = record.cell
        if cell.model in refused:
            continue
        with target.cell_lock(cell.cell_id):
            known = target.find_or_none(cell.cell_id)
            if known is not None:
                conflict = _conflict(known, target, record, source)
                taken.present += conflict is None
                taken.conflicts += [] if conflict is None else [conflict]
                continue
            if record.reference_digest and not target.reference_digest(cell.model_identity):
                target.save_reference_digest(cell.model, cell.model_identity, record.reference_digest)
            if record.quantized is not None and record.quantized.weights is not None:
                source.stages.hand_over(record.quantized.weights, target.stages)
            # the record comes last of its files, as when a cell is measured
            for path in source.files_of(record):
                write_atomically(target.root / "cells" / path.name, partial(_copy, path))
            taken.new.append(record)
    _take_failures(source, target)
    return taken


def _conflict(ours: Record, target: Store, theirs: Record, source: Store) -> Conflict | None:
    """The two values of a cell that both stores have; ``None`` if there is but one."""
    name = f"{ours.cell.cell_id[:12]} {ours.cell}"
    told = _told(ours), _told(theirs)
    if ours.result != theirs.result or ours.status != theirs.status:
        if told[0] == told[1]:
            return Conflict(f"{name}, interval or noise of {told[0]}", "one", "another")
        return Conflict(name, *told)
    if ours.weights_digest != theirs.weights_digest:
        first, second = (str(each.weights_digest)[:12] for each in (ours, theirs))
        return Conflict(f"{name}, weights of {told[0]}", first, second)
    if ours.items_sha256 == theirs.items_sha256 or not (ours.items_sha256 and theirs.items_sha256):
        return None
    kept, given = target.items(ours.cell.cell_id), source.items(theirs.cell.cell_id)
    for key in sorted(set(kept) & set(given)):
        if not np.array_equal(kept[key], given[key]):
            return Conflict(f"{name}, {key} of the items of {told[0]}", "one", "another")
    return None


def _told(record: Record) -> str:
    result = record.result
    return record.status if result is None else f"{result.metric} {result.value!r}"


def _pin(source: Store, target: Store, records: Iterable[Record], taken: Difference) -> set[str]:
    """Pin in the target what the source has pinned; the models of which it has pinned something else."""
    refused = set()
    pins, lock = Lock(source.root).read(), Lock(target.root)
    wanted = [record.cell.model for record in records]
    for model in sorted(set(wanted) & set(pins)):
        try:
            lock.check(model, pins[model])
        except LockError as error:
            refused.add(model)
            what = f"pinned data of {model} ({error})"
            taken.conflicts.append(Conflict(what, "one", "another", wanted.count(model)))
    return refused


def _take_failures(source: Store, target: Store) -> None:
    """Why cells failed, where the target knows nothing of them."""
    for cell, failure in source.failures():
        if target.find_or_none(cell.cell_id) is None and target.load_failure(cell.cell_id) is None:
            target.save_failure(cell, failure)


def _copy(path: Path, temporary: Path) -> None:
    shutil.copyfile(path, temporary)
