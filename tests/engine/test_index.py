"""The index of a store spares parsing, never the digest: whatever it says, a file is what counts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmark.grid.cells import Cell
from benchmark.grid.expand import expand
from benchmark.grid.suite import Suite
from benchmark.keep import index
from benchmark.keep.record import Kept, Noise, Record, Result
from benchmark.keep.store import Store
from benchmark.performance.synthetic_store import synthetic_store
from benchmark.report.rows import collect_rows
from quanttune.errors import StoreError
from tests.engine.test_store import ITEMS, record_of

SITES = [{"id": "up/linear.input", "low": -1.0, "high": 2.0, "shape": [8]}, {"id": "norm/norm.out"}]


@pytest.fixture
def many(store: Store, suite: Suite, monkeypatch: pytest.MonkeyPatch) -> list[Cell]:
    """Cells with records of every shape, and an index of them."""
    monkeypatch.setattr(index, "WORTH_IT", 1)
    cells = expand(dataclasses.replace(suite, seeds=(0, 1)))
    shapes = (
        {"sites": SITES},
        {"status": "skipped", "result": None, "reason": "no softmax"},
        {
            "result": Result(
                "accuracy", True, 1.0, 2.0, 1.5, 1.0, None, None, 4, Noise(5, 1e-6, 4, 1.0, 0.1, None)
            ),
            "quantized": Kept("b" * 64, f"tuning/{'c' * 64}"),
            "details": {"chosen": ["a", 1], "é": None},
            "cost": {"training_s": 1.5, "peak_mb": None},
        },
    )
    for number, cell in enumerate(cells):
        store.save(record_of(cell, **shapes[number % len(shapes)]), ITEMS if number % 2 else None)
    plain = read(store, cells)
    with store.indexed():
        assert read(store, cells) == plain
    assert (store.root / index.FILE).is_file()
    return cells


def read(store: Store, cells: Sequence[Cell]) -> list[Record | None]:
    return [store.load(cell) for cell in cells]


def parsed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The origins of the records that are parsed from now on."""
    found: list[str] = []
    original = Record.from_json
    monkeypatch.setattr(
        Record, "from_json", lambda text, origin: (found.append(Path(origin).stem), original(text, origin))[1]
    )
    return found


def test_records_are_the_same_and_nothing_is_parsed(
    store: Store, many: list[Cell], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, files = read(store, many), parsed(monkeypatch)
    with store.indexed():
        found = read(store, many)
        assert files == []
        assert found == plain
        assert [record.to_json() for record in found if record] == [
            record.to_json() for record in plain if record
        ]
        listed = {record.cell.cell_id: record for record in store.records()}
        assert [listed[cell.cell_id] for cell in many] == plain


def test_sites_are_read_when_somebody_asks(
    store: Store, many: list[Cell], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = parsed(monkeypatch)
    with store.indexed():
        record = store.load(many[0])
    assert record is not None
    assert len(record.sites) == 2
    assert list(record.sites) == SITES
    assert files == []
    path = store.root / "cells" / f"{many[0].cell_id}.json"
    with store.indexed():
        later = store.load(many[0])
    path.write_text(path.read_text().replace("norm/norm.out", "norm/norm.OUT"))
    assert later is not None
    with pytest.raises(StoreError, match="changed while it was read"):
        list(later.sites)


@pytest.mark.parametrize("edited", [".json", ".safetensors"])
def test_an_edited_file_is_missing_although_the_index_knows_it(
    store: Store, many: list[Cell], edited: str
) -> None:
    path = store.root / "cells" / f"{many[1].cell_id}{edited}"
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    with store.indexed():
        assert store.load(many[1]) is None
        assert store.load(many[0]) is not None


def test_a_record_measured_again_takes_the_place_of_the_old_one(store: Store, many: list[Cell]) -> None:
    store.save(record_of(many[0], duration_s=99.0))
    for _ in range(2):
        with store.indexed():
            record = store.load(many[0])
            assert record is not None
            assert record.duration_s == 99.0
    with store.indexed():
        assert len([each for each in store.records() if each.cell == many[0]]) == 1


def test_a_record_under_another_cells_name_is_missing(store: Store, many: list[Cell]) -> None:
    folder = store.root / "cells"
    (folder / f"{many[0].cell_id}.json").write_bytes((folder / f"{many[4].cell_id}.json").read_bytes())
    with store.indexed():
        assert store.load(many[0]) is None


@pytest.mark.parametrize("damage", ["truncated", "edited", "another version", "no Parquet"])
def test_a_damaged_index_is_none(
    store: Store, many: list[Cell], damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, path = read(store, many), store.root / index.FILE
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-40])
    elif damage == "edited":
        with store.indexed():
            rows = dict(store._index._rows)  # type: ignore[union-attr]
        seal = index._seal(rows.items())
        digest, sites, text = rows[many[0].cell_id]
        rows[many[0].cell_id] = (digest, sites, text.replace("70.0", "99.0"))
        monkeypatch.setattr(index, "_seal", lambda _: seal)
        index._write(path, rows)
        monkeypatch.undo()
    elif damage == "another version":
        monkeypatch.setattr(index, "VERSION", 0)
    else:
        path.write_text("not a table")
    monkeypatch.setattr(index, "WORTH_IT", 1)
    with store.indexed():
        assert read(store, many) == plain
    monkeypatch.undo()
    assert read(store, many) == plain


def test_a_folder_that_cannot_be_written_does_without(
    store: Store, many: list[Cell], monkeypatch: pytest.MonkeyPatch
) -> None:
    (store.root / index.FILE).unlink()
    monkeypatch.setattr(index, "write_atomically", lambda *_: (_ for _ in ()).throw(StoreError("read-only")))
    with store.indexed():
        assert all(read(store, many))


def test_a_synthetic_store_is_read_as_a_real_one(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    suite = synthetic_store(folder, 64)
    rows = collect_rows(Store(folder), suite)
    assert rows.complete
    assert len(rows.cells) == 66
    assert (folder / index.FILE).is_file()
    before = {path.name: path.read_bytes() for path in (folder / "cells").iterdir()}
    sizes = [len(content) for name, content in before.items() if name.endswith(".json")]
    assert 40_000 < max(sizes) < 60_000  # as a record of suite laptop
    synthetic_store(folder, 64)
    assert {path.name: path.read_bytes() for path in (folder / "cells").iterdir()} == before
    assert json.loads(next(iter((folder / "cells").glob("*.json"))).read_text())["digest"]
