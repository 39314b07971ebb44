"""The table of costs is of its records."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmark.grid.expand import expand
from benchmark.grid.suite import MethodSpec, Suite, load_suite
from benchmark.keep.record import Record, Result
from benchmark.keep.store import Store
from benchmark.report.costs import cost_frame, cost_terminal, make_cost_table, seconds_text
from benchmark.report.figures.figure import FIGURES
from benchmark.report.html import make_report
from benchmark.report.rows import COST_FIELDS, SuiteRows, collect_rows
from benchmark.tracking.contents import metrics_of
from tests.pages import Page

SECONDS = {
    "minmax": (0.0, 2.0, 0),
    "mse": (0.0, 6.0, 3),
    "finetune": (200.0, 2.0, 1),
    "quanttune": (100.0, 4.0, 3),
}


@pytest.fixture
def rows(tmp_path: Path) -> SuiteRows:
    methods = tuple(MethodSpec(name) for name in ("fp32", *SECONDS))
    suite: Suite = dataclasses.replace(
        load_suite("smoke"), models=("tiny_vit",), methods=methods, precisions=("W8A8", "W6A6"), name="costs"
    )
    store = Store(tmp_path)
    for cell in expand(suite):
        value = {"W8A8": 70.0, "W6A6": 60.0}.get(cell.precision, 80.0)
        cost: dict[str, float | None] = {}
        if cell.method in SECONDS:
            training, calibration, trainings = SECONDS[cell.method]
            step = 1.0 if cell.precision == "W8A8" else -1.0
            numbers = (training, calibration + step, 100.0 + step, 2.0 + step, trainings)
            cost = dict(zip(COST_FIELDS, numbers, strict=True))
        result = Result("accuracy", True, value, 80.0, None, 80.0 - value, 1.0, 2.0, 10)
        record = Record(cell, "done", "2026-01-01T00:00:00+00:00", 1.0, result, cost=cost)
        store.save(record, {"ids": np.arange(10), "scores": np.arange(10) < value / 10})
    return collect_rows(store, suite)


def test_a_line_a_method(rows: SuiteRows) -> None:
    frame = cost_frame(make_cost_table(rows)).set_index("method")
    assert list(frame.index) == list(SECONDS)
    for method, (training, calibration, trainings) in SECONDS.items():
        line = frame.loc[method]
        assert (line.training_s, line.calibration_s, line.trainings) == (training, calibration, trainings)
        assert line.total_s == trainings * training + 3 * calibration
        assert (line.peak_mb, line.extra_operations) == (101.0, 3)  # the most
        assert (line.loss_W8A8, line.loss_W6A6) == (10.0, 20.0)
    text = cost_terminal(make_cost_table(rows), 80)
    assert "3 x 100" in text
    assert max(map(len, text.splitlines())) <= 80


def test_what_is_not_known_is_said(rows: SuiteRows) -> None:
    records = {
        key: dataclasses.replace(record, cost={**record.cost, "training_s": None, "peak_mb": None})
        if record.cell.method == "minmax"
        else record
        for key, record in rows.records.items()
    }
    table = make_cost_table(dataclasses.replace(rows, records=records))
    line = table.lines[0]
    assert (line.training_s, line.total_s, line.peak_mb) == (None, None, None)
    assert line.texts(table.precisions)[:5] == ["0", "--", "2.0", "--", "--"]
    assert "minmax" in cost_terminal(table, 80)


def test_rows_and_runs_have_the_costs(rows: SuiteRows) -> None:
    quantized = [row for row in rows.to_json() if row["method"] == "finetune"]
    assert [row["calibration_s"] for row in quantized] == [3.0, 1.0]
    reference = rows.to_json()[0]
    assert all(reference[name] is None for name in COST_FIELDS)
    record = next(record for record in rows.records.values() if record.cell.method == "quanttune")
    assert {name: metrics_of(record)[name] for name in COST_FIELDS} == dict(record.cost)


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "--"), (0.04, "0.0"), (9.94, "9.9"), (9.96, "10"), (1234.4, "1,234")]
)
def test_seconds(seconds: float | None, text: str) -> None:
    assert seconds_text(seconds) == text


def test_the_report_has_the_table(rows: SuiteRows) -> None:
    frames = {name: pd.DataFrame() for name in FIGURES.names()}
    words = " ".join(" ".join(Page(make_report(rows, frames)).words).split())
    assert "What the methods take" in words
    assert "finetune 1 200 2.0 206 101 3 10.0 20.0" in words
    old = {key: dataclasses.replace(record, cost={}) for key, record in rows.records.items()}
    without = make_report(dataclasses.replace(rows, records=old), frames)
    assert "What the methods take" not in without
