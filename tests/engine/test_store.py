"""What is in the store is whole, ours and of this version, or it is not there."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmark.grid.cells import Cell
from benchmark.keep.atomic import write_text_atomically
from benchmark.keep.record import SCHEMA, Record, Result, plain
from benchmark.keep.store import Store
from quanttune.errors import StoreError


def record_of(cell: Cell, **changes: Any) -> Record:
    result = Result("accuracy", True, 70.0, 75.0, None, 5.0, 2.0, 8.0, 40)
    fields: dict[str, Any] = {"status": "done", "finished_at": "2026-01-01T00:00:00+00:00", "duration_s": 1.5}
    return Record(cell, **fields | {"result": result, "reference_digest": "a" * 64} | changes)


ITEMS = {"ids": np.arange(3), "scores": np.array([1.0, 0.0, 1.0])}


@pytest.fixture
def saved(store: Store, cells: list[Cell]) -> Path:
    store.save(record_of(cells[0]), ITEMS)
    return store.root / "cells" / f"{cells[0].cell_id}.json"


def test_a_record_comes_back_as_it_was(store: Store, cells: list[Cell], saved: Path) -> None:
    record = store.load(cells[0])
    assert record is not None
    assert record == record_of(cells[0], items_sha256=record.items_sha256)
    assert np.array_equal(store.items(cells[0].cell_id)["scores"], ITEMS["scores"])
    assert store.find(cells[0].cell_id[:8]) == record
    assert list(store.records()) == [record]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(data=st.data())
def test_any_truncation_or_edit_counts_as_missing(
    store: Store, cells: list[Cell], saved: Path, data: st.DataObject
) -> None:
    whole = saved.read_bytes()
    try:
        if data.draw(st.booleans(), label="truncate"):
            saved.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 2), label="length")])
        else:
            at = data.draw(st.integers(0, len(whole) - 1), label="at")
            byte = data.draw(st.integers(0, 255), label="byte")
            changed = whole[:at] + bytes([byte]) + whole[at + 1 :]
            try:
                same = json.loads(changed) == json.loads(whole)
            except ValueError:
                same = False
            if same or b'"schema": 2' not in changed:  # white space, or the version of another test
                return
            saved.write_bytes(changed)
        assert store.load(cells[0]) is None
    finally:
        saved.write_bytes(whole)
    assert store.load(cells[0]) is not None


def test_an_edited_number_counts_as_missing(store: Store, cells: list[Cell], saved: Path) -> None:
    saved.write_text(saved.read_text().replace("70.0", "90.0"))
    assert store.load(cells[0]) is None


def test_damaged_or_lost_items_make_a_cell_missing(store: Store, cells: list[Cell], saved: Path) -> None:
    items = saved.with_suffix(".safetensors")
    whole = items.read_bytes()
    items.write_bytes(whole[:-1] + b"\x01")
    assert store.load(cells[0]) is None
    items.unlink()
    assert store.load(cells[0]) is None


def test_a_record_under_another_id_counts_as_missing(store: Store, cells: list[Cell], saved: Path) -> None:
    saved.rename(saved.with_name(f"{cells[1].cell_id}.json"))
    assert store.load(cells[1]) is None


def test_a_newer_schema_is_refused(store: Store, cells: list[Cell], saved: Path) -> None:
    body = json.loads(saved.read_text()) | {"schema": SCHEMA + 1}
    saved.write_text(json.dumps(body))
    with pytest.raises(StoreError, match="upgrade"):
        store.load(cells[0])
    (store.root / "store.json").write_text(json.dumps({"schema": SCHEMA + 1}))
    with pytest.raises(StoreError, match="upgrade"):
        Store(store.root)


def test_other_reference_weights_make_a_cell_missing(store: Store, cells: list[Cell], saved: Path) -> None:
    identity = cells[0].model_identity
    store.save_reference_digest("toy", identity, "a" * 64)
    assert store.load(cells[0]) is not None
    store.save_reference_digest("toy", identity, "b" * 64)
    assert store.load(cells[0]) is None


def test_failures_are_kept_apart_and_forgotten_on_success(store: Store, cells: list[Cell]) -> None:
    store.save_failure(cells[0], {"error": "out of luck"})
    assert store.load(cells[0]) is None
    failure = store.load_failure(cells[0].cell_id)
    assert failure is not None
    assert failure["error"] == "out of luck"
    store.save(record_of(cells[0]))
    assert store.load_failure(cells[0].cell_id) is None


def test_prefixes_are_checked(store: Store, cells: list[Cell], saved: Path) -> None:
    for prefix in ("", "zz", "../../etc", "0" * 64):
        with pytest.raises(StoreError):
            store.find(prefix)
    for cell in cells:
        store.save(record_of(cell))
    first = sorted(cell.cell_id for cell in cells)[0][:1]
    alike = [cell for cell in cells if cell.cell_id.startswith(first)]
    if len(alike) > 1:
        with pytest.raises(StoreError, match="more digits"):
            store.find(first)


@pytest.mark.parametrize("digest", ["../../escape", "", "A" * 64, "a" * 63])
def test_paths_stay_in_the_folder(store: Store, digest: str) -> None:
    with pytest.raises(StoreError, match="not a sha256"):
        store.load_failure(digest)


def test_a_full_disk_is_said_and_nothing_is_left(
    store: Store, cells: list[Cell], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, *_: object, **__: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(StoreError, match="no space left"):
        store.save(record_of(cells[0]), ITEMS)
    monkeypatch.undo()
    assert [path.name for path in (store.root / "cells").iterdir()] == [f"{cells[0].cell_id}.safetensors"]
    assert store.load(cells[0]) is None


def test_safetensors_own_words_for_a_full_disk_are_understood(tmp_path: Path) -> None:
    from benchmark.keep.atomic import write_atomically

    def full(_: Path) -> None:
        raise RuntimeError(
            'Error while serializing: I/O error: Os { code: 28, message: "No space left on device" }'
        )

    with pytest.raises(StoreError, match="no space left"):
        write_atomically(tmp_path / "x", full)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    from benchmark.keep.atomic import write_atomically

    path = tmp_path / "x.json"
    write_text_atomically(path, "old")

    def stopped(temporary: Path) -> None:
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, stopped)
    assert path.read_text() == "old"
    assert [item.name for item in tmp_path.iterdir()] == ["x.json"]


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "results").write_text("")
    with pytest.raises(StoreError, match="not a results folder"):
        Store(tmp_path / "results")


def test_an_interrupted_cell_is_told_from_a_missing_one(store: Store, cells: list[Cell]) -> None:
    cell_id = cells[0].cell_id
    assert not store.was_interrupted(cell_id)

    def stopped() -> None:
        with store.cell_lock(cell_id):
            assert not store.was_interrupted(cell_id)  # under way
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert store.was_interrupted(cell_id)
    with store.cell_lock(cell_id):
        pass
    assert not store.was_interrupted(cell_id)


def test_plain_takes_numbers_of_every_kind() -> None:
    value = {"a": np.float32(1.5), "b": (np.int64(2), float("nan")), 3: np.array([1, 2])}
    assert plain(value) == {"a": 1.5, "b": [2, None], "3": [1, 2]}
