"""A table in another metric says what the kept items say, and refuses what was measured without them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import pytest
from click.testing import CliRunner

from benchmark.cli import cli
from benchmark.engine.measure import drop_interval
from benchmark.grid.cells import Cell
from benchmark.grid.expand import expand
from benchmark.grid.suite import MethodSpec, Suite, load_suite
from benchmark.keep.record import Record, Result
from benchmark.keep.store import Store
from benchmark.report.other_metric import in_metric
from benchmark.report.rows import SuiteRows, collect_rows
from benchmark.report.tables import OWN_ROW, make_table, text_of
from benchmark.subject.metrics.metric import CLASS, METRICS, Metric
from quanttune.errors import ConfigError, StoreError, UnknownNameError

N = 40
NLL = "negative log-likelihood"
OWN = 0.25


def items_of(cell: Cell, shift: int = 0) -> dict[str, np.ndarray]:
    """The more bits, the more items are right and the likelier the targets."""
    wrong = 4 if cell.is_reference else {"W8A8": 8, "W4A4": 24}[cell.precision]
    hits = np.roll(np.arange(N) >= wrong, 5 * len(cell.method)).astype(np.float64)
    return {
        "ids": np.arange(N) + shift,
        "scores": hits,
        "hits": hits,
        "nll": 0.1 + (1 - hits) * (2 + np.arange(N) / N),
    }


def fill(store: Store, suite: Suite, *, kept: bool = True, value: float | None = 0.0, shift: int = 0) -> None:
    """A finished grid; ``value`` moves what the records say of the metric away from what the items say."""
    reference = items_of(expand(suite)[0])
    fp32 = 100 * float(reference["hits"].mean())
    for cell in expand(suite):
        items = items_of(cell, 0 if cell.is_reference else shift)
        trained = cell.method == "toy_trained"
        accuracy = 100 * float(items["hits"].mean())
        result = Result(
            "accuracy", True, accuracy, fp32, 95.0 if trained else None, fp32 - accuracy, 0.0, 0.0, N
        )
        nll = None if value is None else float(items["nll"].mean()) + value
        metrics = {
            NLL: {"value": nll, "fp32": float(reference["nll"].mean()), "fp32_own": OWN if trained else None}
        }
        record = Record(
            cell,
            "done",
            "2026-01-01T00:00:00+00:00",
            1.0,
            result,
            metrics=metrics,
            weights_digest=cell.method,
        )
        if not kept:
            record = dataclasses.replace(record, metrics={})
            items = {name: items[name] for name in ("ids", "scores")}
        store.save(record, items)


@pytest.fixture
def wide(suite: Suite) -> Suite:
    methods = tuple(MethodSpec(name) for name in ("fp32", "minmax", "toy_trained"))
    return dataclasses.replace(suite, methods=methods)


@pytest.fixture
def rows(wide: Suite, store: Store) -> SuiteRows:
    fill(store, wide)
    return collect_rows(store, wide)


def test_values_and_intervals_are_those_of_the_items(rows: SuiteRows) -> None:
    found = in_metric(rows, NLL).to_json()
    assert [row["cell_id"] for row in found] == [cell.cell_id for cell in rows.cells]
    reference = items_of(rows.cells[0])["nll"]
    for row, cell in zip(found, rows.cells, strict=True):
        nll = items_of(cell)["nll"]
        assert (row["metric"], row["status"], row["n"]) == (NLL, "done", N)
        assert row["value"] == pytest.approx(nll.mean())
        assert row["drop"] == pytest.approx(reference.mean() - nll.mean())
        # the same draws as those of the leading metric
        low, high = drop_interval(reference, nll, lambda scores: float(scores.mean()))
        assert (row["ci_low"], row["ci_high"]) == (pytest.approx(low), pytest.approx(high))
        assert cell.is_reference or row["ci_low"] <= row["drop"] <= row["ci_high"]
        assert row["fp32_own"] == (OWN if cell.method == "toy_trained" else None)


def test_the_table_is_of_the_metric_alone(rows: SuiteRows) -> None:
    table = make_table(in_metric(rows, NLL))
    assert "negative log-likelihood (nats) on the test split" in table.caption
    assert "the rise of negative log-likelihood against FP32" in table.caption
    assert "accuracy" not in table.caption
    value, lost = text_of(table, ("toy", "W8A8"), "minmax")
    nll = items_of(next(cell for cell in rows.cells if cell.method == "minmax"))["nll"]
    assert value == f"{nll.mean():.2f}"
    assert not lost.startswith("-")
    assert table.entries[("toy", OWN_ROW), "toy_trained"].value == OWN
    assert make_table(rows).caption == make_table(in_metric(rows, "accuracy")).caption
    assert in_metric(rows, "accuracy").to_json() == rows.to_json()


def test_what_the_records_say_counts(wide: Suite, store: Store) -> None:
    """The run computed it; what is kept of the items serves the interval."""
    fill(store, wide, value=1.0)
    for row in in_metric(collect_rows(store, wide), NLL).to_json():
        assert row["value"] > 1.0


def test_a_cell_without_a_value_is_not_a_number(wide: Suite, store: Store) -> None:
    fill(store, wide, value=None)
    rows = collect_rows(store, wide)
    assert {row["value"] for row in in_metric(rows, NLL).to_json()} == {None}
    assert {row["status"] for row in in_metric(rows, NLL).to_json()} == {"done"}
    assert text_of(make_table(in_metric(rows, NLL)), ("toy", "W8A8"), "minmax") == ("n/a", "")


class Misses(Metric):
    """A metric that was written after the cells were measured."""

    name: ClassVar[str] = "misses"
    title: ClassVar[str] = "items that are wrong"
    higher_is_better: ClassVar[bool] = False
    needs: ClassVar[tuple[str, ...]] = ("hits",)
    answers: ClassVar[tuple[str, ...]] = (CLASS,)

    def value(self, items: Mapping[str, np.ndarray]) -> float:
        return float((1 - items["hits"]).sum())


@pytest.fixture
def misses(monkeypatch: pytest.MonkeyPatch) -> str:
    METRICS.names()
    monkeypatch.setitem(METRICS._items, "misses", Misses())
    return "misses"


@pytest.mark.parametrize("kept", [True, False])
def test_a_younger_metric_is_made_from_what_is_kept(
    kept: bool, misses: str, wide: Suite, store: Store
) -> None:
    fill(store, wide, kept=kept)  # what accuracy is made from is there in the oldest cells
    rows = in_metric(collect_rows(store, wide), misses).to_json()
    found = {(row["method"], row["precision"]): row for row in rows}
    assert found["fp32", "FP32"]["value"] == 4
    assert (found["minmax", "W4A4"]["value"], found["minmax", "W4A4"]["drop"]) == (24, -20)
    assert found["toy_trained", "W8A8"]["fp32_own"] is None


def test_old_cells_are_refused_with_the_command(wide: Suite, store: Store) -> None:
    fill(store, wide, kept=False)
    rows = collect_rows(store, wide)
    with pytest.raises(ConfigError) as refused:
        in_metric(rows, NLL).to_json()
    text = str(refused.value)
    assert text.startswith(
        f"5 cells of suite toys lack what {NLL} needs ({rows.cells[0].cell_id[:8]} toy fp32, "
    )
    assert "and 2 more" in text
    assert "run --suite the test --model toy --overwrite always --results " in text
    assert text.endswith(f"{store.root}` measures them again")
    partial = in_metric(rows, NLL, allow_partial=True)
    assert (partial.finished, set(partial.unfinished.values())) == (0, {"not kept"})
    assert "Partial: 0 of 5 cells" in make_table(partial).caption


def test_one_old_cell_is_named_alone(wide: Suite, store: Store) -> None:
    fill(store, wide)
    old = next(cell for cell in expand(wide) if cell.method == "toy_trained")
    items = {name: array for name, array in items_of(old).items() if name != "nll"}
    record = store.load(old)
    assert record is not None
    store.save(record, items)
    rows = collect_rows(store, wide)
    with pytest.raises(ConfigError, match=r"1 cells of .* --model toy --method toy_trained --overwrite"):
        in_metric(rows, NLL).to_json()
    assert len(in_metric(rows, NLL, allow_partial=True).records) == 4


def test_a_suite_without_its_reference_uses_the_one_in_the_store(wide: Suite, store: Store) -> None:
    fill(store, wide)
    alone = dataclasses.replace(wide, methods=(MethodSpec("minmax"),))
    assert all(row["ci_low"] < 0 for row in in_metric(collect_rows(store, alone), NLL).to_json())
    (reference,) = (cell for cell in expand(wide) if cell.is_reference)
    (store.root / "cells" / f"{reference.cell_id}.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"toy fp32.* --method fp32 --overwrite"):
        in_metric(collect_rows(store, alone), NLL).to_json()


def test_other_items_are_not_paired(wide: Suite, store: Store) -> None:
    fill(store, wide, shift=1)
    with pytest.raises(StoreError, match="measured on different items"):
        in_metric(collect_rows(store, wide), NLL).to_json()


def test_names_are_suggested_and_what_is_not_offered_is_refused(rows: SuiteRows) -> None:
    with pytest.raises(UnknownNameError, match="did you mean accuracy"):
        in_metric(rows, "acuracy").to_json()
    with pytest.raises(
        ConfigError, match="no task of suite toys is measured in perplexity: toy_task in accuracy"
    ):
        in_metric(rows, "perplexity").to_json()


def test_the_command_prints_and_writes_it(store: Store, suite_file: str) -> None:
    fill(store, load_suite(suite_file))
    arguments = ["table", "--suite", suite_file, "--results", str(store.root), "--metric"]
    shown = CliRunner().invoke(cli, [*arguments, NLL, "--format", "json"])
    assert shown.exit_code == 0, shown.output
    written = store.root / "tables" / "toys-negative-log-likelihood.json"
    assert json.loads(shown.stdout) == json.loads(written.read_text())
    assert {row["metric"] for row in json.loads(shown.stdout)} == {NLL}
    refused = CliRunner().invoke(cli, [*arguments, NLL, "--published"])
    assert refused.exit_code == 2
    assert "leave out --metric" in refused.stderr
