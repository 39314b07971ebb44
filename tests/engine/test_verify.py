"""Published cells measured again: equal to the bit, near enough where weights differ, or told apart."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from baselines.method import METHODS
from benchmark.cli import cli
from benchmark.engine.runner import CellRunner, Settings
from benchmark.engine.verification import TO_THE_BIT, WITHIN, compare, sample
from benchmark.grid.expand import expand
from benchmark.grid.suite import load_suite
from benchmark.keep.publishing import publish
from benchmark.keep.record import Record
from benchmark.keep.reference_store import ReferenceStore
from benchmark.keep.store import Store
from tests.engine.conftest import ToyModel

Command = Callable[..., Any]


@pytest.fixture
def published(store: Store, suite_file: str, tmp_path: Path) -> ReferenceStore:
    runner = CellRunner(Settings(store.root), lambda *_: None)
    for cell in expand(load_suite(suite_file)):
        assert runner.run(cell).status == "done"
    publish(tmp_path / "published", {"toys": store.records()}, lambda _, cell_id: store.items(cell_id))
    return ReferenceStore(tmp_path / "published")


@pytest.fixture
def verify(published: ReferenceStore, tmp_path: Path) -> Command:
    def run(*arguments: str, code: int = 0) -> str:
        where = ("--of", str(published.root), "--results", str(tmp_path / "again"))
        done = CliRunner().invoke(cli, ["verify", *where, *arguments])
        assert done.exit_code == code, done.output
        return done.output

    return run


def test_a_second_measurement_agrees_to_the_bit(verify: Command) -> None:
    told = verify()
    assert told.count("agrees to the bit") == 4  # the reference is no quantized cell
    assert "4 of 4 cells agree: 4 to the bit" in told


def test_one_cell_or_a_few(verify: Command, published: ReferenceStore) -> None:
    assert "2 of 2 cells agree" in verify("--sample", "2")
    record = next(each for each in published.records() if each.cell.method == "mse")
    told = verify("--cell", record.cell.cell_id[:10])
    assert "1 of 1 cells agree" in told
    assert record.cell.cell_id[:12] in told


def test_another_number_is_a_difference(verify: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the code had changed and the version had not been raised."""
    plain = METHODS.get("minmax").quantize

    def wider(self: Any, context: Any) -> Any:
        found = plain(self, context)
        moved = {}
        for name, quantizer in found.quantizers.items():
            if name.endswith("output"):
                state = quantizer.state()
                tensors = {**state.tensors, "scale": 60 * state.tensors["scale"]}
                moved[name] = type(quantizer).from_state(dataclasses.replace(state, tensors=tensors))
        return dataclasses.replace(found, quantizers={**found.quantizers, **moved})

    monkeypatch.setattr(METHODS.get("minmax"), "quantize", wider)
    told = verify(code=1)
    assert "2 of 4 cells agree: 2 to the bit" in told
    assert told.count("differs: ") == 2
    assert "of 40 items differ" in told or "the noise of rounding differs" in told


def test_a_cell_that_fails_does_not_agree(verify: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Any, context: Any) -> Any:
        raise ValueError("no range for site 3")

    monkeypatch.setattr(METHODS.get("mse"), "quantize", broken)
    told = verify(code=1)
    assert "ValueError: no range for site 3" in told
    assert "2 of 4 cells agree" in told


def test_other_weights_are_held_to_the_interval(
    verify: Command, toy: ToyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ToyModel, "weight", 1.0 + 1e-6)
    assert "4 of 4 cells agree: 4 within the interval" in verify()


def near(record: Record, low: float, high: float, digest: str) -> Record:
    assert record.result is not None
    result = dataclasses.replace(record.result, drop=(low + high) / 2, ci_low=low, ci_high=high)
    return dataclasses.replace(record, result=result, reference_digest=digest)


class Items:
    """A store that holds other items of every cell."""

    def __init__(self, items: dict[str, np.ndarray]) -> None:
        self._items = items

    def items(self, _: str) -> dict[str, np.ndarray]:
        return self._items


@pytest.mark.parametrize(
    ("factor", "reference_rule", "agrees"),
    [(1.0, "to the bit", True), (1 + 1e-6, "up to rounding", True), (1.01, "up to rounding", False)],
)
def test_the_kernels_of_fp32_may_round_and_nothing_else_may(
    published: ReferenceStore, factor: float, reference_rule: str, agrees: bool
) -> None:
    for reference in (True, False):
        record = next(
            each
            for each in published.records()
            if each.result is not None and each.cell.is_reference == reference
        )
        items = dict(published.items(record.cell.cell_id))
        scores = np.asarray(items["scores"], dtype=np.float64) + 1.0
        ids = items["ids"]
        old, new = Items({"ids": ids, "scores": scores}), Items({"ids": ids, "scores": scores * factor})
        verdict = compare(record, old, record, new)  # type: ignore[arg-type]
        assert verdict.rule == (reference_rule if reference else "to the bit")
        assert verdict.holds == (agrees if reference else factor == 1.0)


def test_other_items_are_not_the_same_fp32(published: ReferenceStore) -> None:
    record = next(each for each in published.records() if each.cell.is_reference)
    items = dict(published.items(record.cell.cell_id))
    other = Items(items | {"ids": items["ids"] + 1})
    verdict = compare(record, Items(items), record, other)  # type: ignore[arg-type]
    assert not verdict.holds
    assert "ids" in verdict.why


@pytest.mark.parametrize(("low", "high", "holds"), [(1.0, 3.0, True), (2.0, 4.0, True), (2.25, 4.0, False)])
def test_intervals_that_do_not_touch_are_two_numbers(
    published: ReferenceStore, low: float, high: float, holds: bool
) -> None:
    record = next(each for each in published.records() if not each.cell.is_reference)
    verdict = compare(near(record, 0.0, 2.0, "a"), published, near(record, low, high, "b"), published)
    assert (verdict.rule, verdict.holds) == (WITHIN, holds)
    assert verdict.why == ("" if holds else "drop 3.12 and not 1.00: the intervals are 0.25 apart")
    same = compare(record, published, record, published)
    assert (same.rule, same.holds, same.why) == (TO_THE_BIT, True, "")


def test_a_sample_has_some_of_each(published: ReferenceStore) -> None:
    records = list(published.records())
    chosen = sample(records, 2)
    assert Counter(record.cell.method for record in chosen) == {"minmax": 1, "mse": 1}
    assert chosen == sample(reversed(records), 2)
    assert len(sample(records, None)) == 4
    assert sample(records, 5, trained=True) == []


def test_what_cannot_be_done_is_said(verify: Command, published: ReferenceStore, tmp_path: Path) -> None:
    assert "no suite 'laptop' is published there; it has toys" in verify("--suite", "laptop", code=2)
    assert "no published cell is of that kind" in verify("--trained", code=2)
    (tmp_path / "empty").mkdir()
    done = CliRunner().invoke(cli, ["verify", "--of", str(tmp_path / "empty")])
    assert done.exit_code == 2
    assert "holds no published results" in done.output
