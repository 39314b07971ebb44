"""Published results of several machines: each suite has its own numbers, and one reference a model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from benchmark.cli import cli
from benchmark.keep.merging import difference, take
from benchmark.keep.publishing import publish
from benchmark.keep.record import Record
from benchmark.keep.reference_store import ReferenceStore
from benchmark.keep.store import Store
from tests.engine.test_reference_store import of, published

__all__ = ["published"]


@pytest.fixture
def two_machines(published: ReferenceStore, store: Store) -> tuple[ReferenceStore, Record, Record]:
    """A cell of suites ``first`` and ``second``, which suite ``another`` has from other reference weights."""
    shared = next(record for record in published.records() if record.cell.is_reference)
    assert shared.result is not None
    result = dataclasses.replace(shared.result, value=1.0)
    other = dataclasses.replace(shared, result=result, reference_digest="b" * 64, items_sha256="c" * 64)
    items = {name: array[::-1].copy() for name, array in store.items(shared.cell.cell_id).items()}
    publish(published.root, {"another": [other]}, lambda *_: items)
    return ReferenceStore(published.root), shared, other


def test_suites_of_two_machines_keep_their_own_numbers_of_a_cell(
    two_machines: tuple[ReferenceStore, Record, Record], store: Store
) -> None:
    """Found: what was published last stood for the cell in every suite, whose tables mixed two references."""
    kept, shared, other = two_machines
    cell_id = shared.cell.cell_id
    assert kept.suites == {"another": 1, "first": 3, "second": 3}
    for name, record in (("first", shared), ("second", shared), ("another", other)):
        view = kept.of_suite(name)
        assert view.load(record.cell) == record
        assert name in view.suites_of(cell_id)
    own, others = (kept.of_suite(name).items(cell_id)["targets"] for name in ("first", "another"))
    np.testing.assert_array_equal(own, others[::-1])
    assert len(list(kept.records())) == 5  # one a cell
    assert len(list(kept.measurements())) == 6


def test_the_main_job_stands_for_a_cell_and_the_rest_is_told(
    two_machines: tuple[ReferenceStore, Record, Record], store: Store
) -> None:
    kept, shared, other = two_machines
    cell_id = shared.cell.cell_id
    assert kept.find(cell_id) == other  # of "another", by name before "first"
    assert kept.elsewhere(cell_id) == ["first", "second"]
    told = CliRunner().invoke(cli, ["show", cell_id[:12], "--results", str(kept.root)])
    assert "another number, on other reference weights: --suite first or second" in told.stderr
    assert json.loads(told.stdout)["result"]["value"] == 1.0
    publish(kept.root, {"laptop": [shared]}, of(store))
    again = ReferenceStore(kept.root)
    assert again.find(cell_id) == shared
    assert again.elsewhere(cell_id) == ["another"]
    assert again.measured_like(other).find(cell_id) == other
    assert again.measured_like(shared).find(cell_id) == shared


def test_a_measurement_goes_with_the_last_suite_that_shows_it(
    two_machines: tuple[ReferenceStore, Record, Record], store: Store
) -> None:
    kept, shared, _ = two_machines
    publish(kept.root, {"another": [shared]}, of(store))
    again = ReferenceStore(kept.root)
    assert [record for record, _ in again.measurements() if record.cell == shared.cell] == [shared]
    assert again.suites_of(shared.cell.cell_id) == ["another", "first", "second"]


def test_a_merge_knows_a_cell_by_any_of_its_measurements(
    two_machines: tuple[ReferenceStore, Record, Record], store: Store, tmp_path: Path
) -> None:
    kept, _, other = two_machines
    assert difference(store, kept).conflicts == []
    third = dataclasses.replace(other, reference_digest="d" * 64, items_sha256=None)
    assert third.result is not None
    foreign = Store(tmp_path / "foreign")
    foreign.prepare()
    foreign.save(dataclasses.replace(third, result=dataclasses.replace(third.result, value=2.0)))
    (conflict,) = difference(foreign, kept).conflicts
    assert "accuracy 2.0" in str(conflict)
    # a store of the user has one reference of a model: the others' cells are named
    target = Store(tmp_path / "target")
    (conflict,) = difference(kept, target).conflicts
    assert "reference weights of toy: aaaaaaaaaaaa here, bbbbbbbbbbbb there; 1 cell" in str(conflict)


def test_a_suite_that_is_not_published_sees_one_set_of_weights(
    two_machines: tuple[ReferenceStore, Record, Record], store: Store
) -> None:
    """Found: its table had the FP32 of one machine above the methods of another."""
    kept, shared, other = two_machines
    for name, record in (("unknown", other), ("first", shared)):
        view = kept.of_suite(name)
        assert view.load(shared.cell) == record
    assert {record.reference_digest for record in kept.of_suite("unknown").records()} == {"b" * 64}
    missing = next(record.cell for record in store.records() if not record.cell.is_reference)
    assert kept.of_suite("unknown").load(missing) is None
    assert kept.load(missing) is not None


def test_a_merge_takes_a_measurement_with_its_own_items_and_suites(
    two_machines: tuple[ReferenceStore, Record, Record], store: Store, tmp_path: Path
) -> None:
    """Found: the items and suites were those of the cell as the default view has it."""
    kept, shared, other = two_machines
    cell_id = shared.cell.cell_id
    for record, suites, turned in ((shared, ["first", "second"], 1), (other, ["another"], -1)):
        view = kept.measured_like(record)
        assert view.find(cell_id) == record
        assert view.suites_of(cell_id) == suites
        target = tmp_path / suites[0]
        lacking = [each for each in kept.records() if each.cell.cell_id != cell_id]
        publish(target, {"rest": lacking}, lambda _, each: kept.items(each))
        taken = ReferenceStore(target)
        take(kept, taken, [record], lambda each: kept.measured_like(each).suites_of(each.cell.cell_id))
        found = ReferenceStore(target)
        assert found.find(cell_id) == record
        assert found.suites_of(cell_id) == suites
        np.testing.assert_array_equal(
            found.items(cell_id)["targets"], store.items(cell_id)["targets"][::turned]
        )
