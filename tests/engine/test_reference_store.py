"""Published results: written from a store, read like one, refused when they are not what was written."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from benchmark.cli import cli
from benchmark.grid.cells import Cell
from benchmark.grid.expand import expand
from benchmark.grid.suite import load_suite, parse_suite
from benchmark.keep import atomic, publishing
from benchmark.keep.publishing import publish
from benchmark.keep.record import Record, Result
from benchmark.keep.reference_store import ITEMS, MANIFEST, RECORDS, ReferenceStore, open_store
from benchmark.keep.store import Store
from benchmark.report.rows import collect_rows
from quanttune.digests import json_digest
from quanttune.errors import StoreError

SUITE = """
models = ["toy"]
precisions = ["W8A8", "W6A6"]
calibration_items = 8
[[methods]]
name = "fp32"
[[methods]]
name = "minmax"
"""
OTHER = SUITE.replace("minmax", "mse")


def arrays(cell: Cell, n: int = 40) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(len(cell.cell_id) + int(cell.cell_id[:6], 16))
    targets = np.arange(n) % 3
    predictions = np.where(generator.random(n) < 0.8, targets, (targets + 1) % 3)
    scores = (predictions == targets).astype(np.float64)
    likelihoods = generator.random(n)
    return {
        "ids": np.arange(n, dtype=np.int64) * 1000,
        "targets": targets,
        "scores": scores,
        "predictions": predictions,
        "likelihoods": likelihoods,
    }


def of(store: Store) -> Callable[[str, str], Mapping[str, np.ndarray]]:
    return lambda suite, cell_id: store.items(cell_id)


def measure(store: Store, text: str, name: str) -> list[Record]:
    records = []
    for cell in expand(parse_suite(name, text, name)):
        items = arrays(cell)
        value = float(100 * items["scores"].mean())
        result = Result("accuracy", True, value, 90.0, None, 90.0 - value, -1.25, 1.5, 40)
        site = {"id": "head/linear.weight", "low": -0.1, "high": 1 / 3, "shape": [3, 8], "source": None}
        record = Record(
            cell,
            "done",
            "2026-01-01T00:00:00+00:00",
            1.25,
            result,
            reference_digest="a" * 64,
            sites=[site] * (not cell.is_reference),
        )
        records.append(store.save(record, items))
    return records


@pytest.fixture
def published(store: Store, tmp_path: Path) -> ReferenceStore:
    records = {"first": measure(store, SUITE, "first"), "second": measure(store, OTHER, "second")}
    publish(tmp_path / "reference", records, of(store))
    return ReferenceStore(tmp_path / "reference")


def test_records_come_back_to_the_bit(published: ReferenceStore, store: Store) -> None:
    kept = list(store.records())
    assert len(kept) == 5  # the reference is in both suites
    assert list(published.records()) == kept
    for record in kept:
        assert published.load(record.cell) == record
        assert published.find(record.cell.cell_id[:20]) == record


def test_so_do_the_arrays_that_are_published(published: ReferenceStore, store: Store) -> None:
    for record in store.records():
        own, found = store.items(record.cell.cell_id), published.items(record.cell.cell_id)
        assert set(found) == set(own) - {"likelihoods"}
        for name, array in found.items():
            assert array.dtype == own[name].dtype
            np.testing.assert_array_equal(array, own[name])


@pytest.mark.parametrize(
    "array",
    [
        np.array([0.0, 1.0, -0.0]),
        np.array([1 / 3, 2e300]),
        np.array([[1.5, 2.25], [3.0, -1e10]]),
        np.array([2**40, -1]),
        np.array([300, -7]),
        np.array([], dtype=np.int64),
        np.array([[1.0], [255.0]], dtype=np.float32),
    ],
)
def test_packing_loses_nothing(array: np.ndarray, store: Store, tmp_path: Path) -> None:
    (record, *_) = measure(store, SUITE, "first")
    publish(tmp_path / "to", {"first": [record]}, lambda *_: {"scores": array})
    found = ReferenceStore(tmp_path / "to").items(record.cell.cell_id)["scores"]
    assert found.dtype == array.dtype
    assert found.shape == array.shape
    assert found.tobytes() == (array + 0).tobytes() or np.array_equal(found, array)


def test_a_suite_is_replaced_and_the_others_stay(
    published: ReferenceStore, store: Store, tmp_path: Path
) -> None:
    assert published.suites == {"first": 3, "second": 3}
    records = measure(store, SUITE.replace('"W8A8", "W6A6"', '"W5A5"'), "first")
    made = publish(published.root, {"first": records}, of(store))
    again = ReferenceStore(published.root)
    assert again.suites == made.suites == {"first": 2, "second": 3}
    ids = {record.cell.cell_id for record in again.records()}
    expected = {cell.cell_id for cell in expand(parse_suite("second", OTHER, "second"))}
    assert ids == expected | {record.cell.cell_id for record in records}
    for cell_id in ids:
        assert set(again.items(cell_id)) == {"ids", "targets", "scores", "predictions"}


def test_a_folder_is_read_once_until_it_is_another(published: ReferenceStore, store: Store) -> None:
    again = ReferenceStore(published.root)
    assert again.files.measured is published.files.measured
    publish(published.root, {"second": measure(store, SUITE, "second")}, of(store))
    later = ReferenceStore(published.root)
    assert later.files.measured is not published.files.measured
    assert {name for suites, _ in later.files.measured.values() for name in suites} == {"first", "second"}


def test_a_cell_of_a_suite_that_stays_keeps_its_record(published: ReferenceStore, store: Store) -> None:
    """Found: the times of a shared reference changed, and kept tables of the other suite with them."""
    first = next(iter(published.records()))
    later = dataclasses.replace(first, duration_s=first.duration_s + 100)
    publish(published.root, {"another": [later]}, of(store))
    kept = ReferenceStore(published.root)
    assert kept.find_or_none(first.cell.cell_id) == first
    assert "another" in kept.suites_of(first.cell.cell_id)


def test_the_same_results_give_the_same_files(
    published: ReferenceStore, store: Store, tmp_path: Path
) -> None:
    records = {"second": measure(store, OTHER, "second"), "first": measure(store, SUITE, "first")}
    publish(tmp_path / "again", records, of(store))
    for path in published.root.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_too_much_is_refused_and_changes_nothing(published: ReferenceStore, store: Store) -> None:
    before = {path.name: path.read_bytes() for path in published.root.iterdir()}
    with pytest.raises(StoreError, match=r"would have 0\.0 MiB, more than 0\.0; publish fewer suites"):
        publish(published.root, {"first": measure(store, SUITE, "first")}, of(store), largest=100)
    assert {path.name: path.read_bytes() for path in published.root.iterdir()} == before


@pytest.mark.parametrize("name", [MANIFEST, RECORDS, ITEMS])
@pytest.mark.parametrize("how", ["gone", "cut", "edited"])
def test_a_damaged_folder_is_refused_in_one_line(published: ReferenceStore, name: str, how: str) -> None:
    (path,) = published.root.glob(f"{name}*")
    content = path.read_bytes()
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(content[:-20] if how == "cut" else content.replace(b"first", b"furst") + b" ")
    if how == "gone" and name == MANIFEST:
        assert not isinstance(open_store(published.root), ReferenceStore)
        return
    with pytest.raises(StoreError) as raised:
        open_store(published.root)
    assert str(path) in str(raised.value)
    assert "get" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("text", ["[]", "null", "3", "{}", '{"schema": 2}', '{"files": [], "digest": ""}'])
def test_a_manifest_of_another_form_is_refused(published: ReferenceStore, text: str) -> None:
    (published.root / MANIFEST).write_text(text)
    with pytest.raises(StoreError, match="damaged or was edited"):
        open_store(published.root)


@pytest.mark.parametrize(
    "files", [{}, {"records-1.parquet": "0"}, {"../records.parquet": "0", "items.parquet": "0"}]
)
def test_a_manifest_names_both_files(published: ReferenceStore, files: dict[str, str]) -> None:
    body = {"schema": 2, "suites": {}, "files": files}
    (published.root / MANIFEST).write_text(json.dumps(body | {"digest": json_digest(body)}))
    with pytest.raises(StoreError, match="get the folder again"):
        open_store(published.root)


@pytest.mark.parametrize("broken", [RECORDS, ITEMS, "manifest"])
def test_a_full_disk_leaves_the_folder_as_it_was(
    published: ReferenceStore, store: Store, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    """Found: files were replaced one by one, and half of a publication made the folder unreadable."""
    before = [record for record, _ in published.measurements()]

    def full(path: Path, write: Any, lasting: bool = True) -> None:
        if path.name.startswith(broken):
            raise StoreError("no space left on the disk")
        atomic.write_atomically(path, write, lasting)

    monkeypatch.setattr(publishing, "write_atomically", full)
    monkeypatch.setattr(
        publishing, "write_text_atomically", lambda path, text: full(path, lambda to: to.write_text(text))
    )
    records = measure(store, SUITE.replace("minmax", "omse"), "third")
    with pytest.raises(StoreError, match="no space"):
        publish(published.root, {"third": records}, of(store))
    kept = ReferenceStore(published.root)
    assert [record for record, _ in kept.measurements()] == before
    assert set(kept.suites) == {"first", "second"}
    monkeypatch.undo()
    publish(published.root, {"third": records}, of(store))
    assert len(list(published.root.glob("*.parquet"))) == 2


def test_files_of_others_in_the_folder_stay(published: ReferenceStore, store: Store) -> None:
    theirs = [published.root / name for name in ("mine.parquet", "records-mine.parquet")]
    for path in theirs:
        path.write_bytes(b"data")
    publish(published.root, {"third": measure(store, SUITE.replace("minmax", "omse"), "third")}, of(store))
    assert all(path.read_bytes() == b"data" for path in theirs)


def test_two_that_publish_at_once_lose_nothing(published: ReferenceStore, store: Store) -> None:
    records = {
        name: measure(store, SUITE.replace("minmax", name), name) for name in ("omse", "ema", "entropy")
    }
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda name: publish(published.root, {name: records[name]}, of(store)), records))
    assert set(ReferenceStore(published.root).suites) == {"first", "second", *records}


def test_what_must_not_be_published(published: ReferenceStore, store: Store) -> None:
    records = list(store.records())
    with pytest.raises(StoreError, match="the name of what was merged"):
        publish(published.root, {"submitted": records}, of(store))
    with pytest.raises(StoreError, match="a results folder of its own"):
        publish(store.root, {"first": records}, of(store))
    assert not isinstance(open_store(store.root), ReferenceStore)


def test_a_newer_folder_is_refused(published: ReferenceStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publishing, "SCHEMA", 7)
    publish(published.root, {}, of(published))
    with pytest.raises(StoreError, match="has schema 7, this version reads up to 2; upgrade"):
        open_store(published.root)


def test_nothing_is_measured_into_it(published: ReferenceStore) -> None:
    with pytest.raises(StoreError, match="cannot be measured into; choose another --results"):
        published.prepare()
    (record, *_) = published.records()
    with pytest.raises(StoreError, match="quantized models are not among the published results"):
        published.quantized(record)


Command = Callable[..., Any]


@pytest.fixture
def command(tmp_path: Path) -> Command:
    for name, text in (("first", SUITE), ("second", OTHER)):
        (tmp_path / f"{name}.toml").write_text(text)

    def run(*arguments: str, code: int = 0) -> str:
        done = CliRunner().invoke(cli, arguments)
        assert done.exit_code == code, done.output
        return done.output

    return run


def test_the_commands_publish_and_show(command: Command, store: Store, tmp_path: Path) -> None:
    first, second, folder = str(tmp_path / "first.toml"), str(tmp_path / "second.toml"), tmp_path / "to"
    measure(store, SUITE, "first")
    where = ("--results", str(store.root))
    refused = command("publish", "--suite", first, "--suite", second, *where, code=2)
    assert "1 of 3 cells of suite second are finished" in refused
    assert not folder.exists()
    said = command("publish", "--suite", first, "--to", str(folder / "reference"), *where)
    assert "first: 3 cells" in said
    own = json.loads(command("table", "--suite", first, "--format", "json", *where).partition("written")[0])
    shown = command("table", "--suite", first, "--format", "json", "--results", str(folder / "reference"))
    assert json.loads(shown.partition("written")[0]) == own
    # Views go beside the folder, which stays as it was published.
    assert (folder / "tables" / "first.json").is_file()
    assert len(list((folder / "reference").iterdir())) == 3
    (cell_id,) = {row["cell_id"] for row in own if row["precision"] == "W6A6"}
    shown = command("show", cell_id[:12], "--results", str(folder / "reference"))
    assert cell_id in shown
    assert "measure it again:\n# python -m benchmark run" in shown
    assert "benchmark.load" not in shown
    into = ("--suite", first, "--results", str(folder / "reference"))
    assert "3 cached" in command("run", "--all", *into)
    assert "holds published results" in command("run", "--precision", "W5A5", *into, code=2)
    assert len(list((folder / "reference").iterdir())) == 3


def test_what_came_with_the_code_is_named_where_nothing_was_measured(
    command: Command, published: ReferenceStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmark.keep.reference_store._CHECKOUT", published.root)
    monkeypatch.chdir(tmp_path)
    empty = ("--results", str(tmp_path / "none"))
    assert "--results reference shows what came" in command("table", "--suite", "first.toml", *empty, code=2)
    (tmp_path / "third.toml").write_text(SUITE)
    assert "--results reference" not in command("table", "--suite", "third.toml", *empty, code=2)
    (published.root.parent / "elsewhere").mkdir()
    monkeypatch.chdir(published.root.parent / "elsewhere")
    assert "toy" in command("table", "--suite", str(tmp_path / "first.toml"), "--results", "reference")


def test_every_suite_that_came_with_the_code_is_one_that_is_known() -> None:
    from benchmark.keep.reference_store import reference_folder

    folder = reference_folder()
    if folder is None:
        pytest.skip("nothing is published yet")
    store = ReferenceStore(folder)
    for name in store.suites:
        cells = expand(load_suite(name))
        view = store.of_suite(name)
        assert sum(name in view.suites_of(record.cell.cell_id) for record in view.records()) == len(cells)
        # one table is of one set of weights
        digests = {
            (record.cell.model, record.reference_digest)
            for record in collect_rows(store, load_suite(name)).records.values()
            if record.reference_digest
        }
        assert len(digests) == len({model for model, _ in digests})
        assert all(store.load(cell) is not None for cell in cells)
