"""What is printed for a person fits the terminal."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from benchmark.cli import cli
from benchmark.grid.expand import expand
from benchmark.grid.suite import MethodSpec, Suite
from benchmark.keep.record import Noise, Record
from benchmark.keep.record import Result as Measured
from benchmark.keep.store import Store
from benchmark.report.columns import Row, blocks, broken, printable, terminal_width
from benchmark.report.rows import SuiteRows, collect_rows
from benchmark.report.tables import make_table
from benchmark.report.terminal import to_terminal
from benchmark.subject.models.entry import MODELS

NOISE = Noise(copies=5, relative=1e-6, items=4, mean=70.0, deviation=0.2, common=0.1, flips=1.5)
SCHEMES = ("W8A8", "W7A7", "W6A6", "W4g128A8")
LABELS = ("minmax", "quanttune", "fq_vit[attention=integer,factor=False]", "ptq4vit[twin_softmax=False]")


@pytest.fixture
def rows(suite: Suite, store: Store, toy: Any, monkeypatch: pytest.MonkeyPatch) -> SuiteRows:
    """Two models, seven methods of long names, four precisions, with noise."""
    monkeypatch.setitem(MODELS._items, "toy_too", toy)
    specs = [MethodSpec(name) for name in ("fp32", "minmax", "quanttune", "mse", "percentile")]
    specs.append(MethodSpec("fq_vit", parameters={"attention": "integer", "factor": False}))
    specs.append(MethodSpec("ptq4vit", parameters={"twin_softmax": False}))
    wide = dataclasses.replace(
        suite, models=("toy", "toy_too"), methods=tuple(specs), precisions=SCHEMES, name="wide"
    )
    for index, cell in enumerate(expand(wide)):
        value = 80.0 if cell.is_reference else 79.0 - index
        own = 79.5 if cell.method == "quanttune" else None
        drop = 80.0 - value
        noise = None if cell.is_reference else dataclasses.replace(NOISE, mean=value)
        measured = Measured("accuracy", True, value, 80.0, own, drop, drop - 1.5, drop + 1.5, 40, noise)
        store.save(Record(cell, "done", "2026-01-01T00:00:00+00:00", 1.0, measured, weights_digest="w"))
    return collect_rows(store, wide)


@pytest.mark.parametrize("width", [50, 64, 80, 100, 200])
def test_no_line_is_wider_than_the_terminal_and_nothing_is_left_out(rows: SuiteRows, width: int) -> None:
    text = to_terminal(make_table(rows), width)
    assert max(map(len, text.splitlines())) <= width
    assert not any(line != line.rstrip() for line in text.splitlines())
    for record in rows.records.values():
        if record.result is not None and not record.cell.is_reference:
            assert f"{record.result.value:.1f} ± 0.2" in text
    assert text.count("FP32 79.5") >= 2  # of each model, below the name of what trains
    assert text.count("toy: FP32 accuracy 80.0") == text.count("toy_too: FP32 accuracy 80.0") == 1


def test_precisions_stand_side_by_side_as_long_as_there_is_room(rows: SuiteRows) -> None:
    table = make_table(rows)

    def heads(width: int) -> list[list[str]]:
        lines = to_terminal(table, width).splitlines()
        return [line.split()[1:] for line in lines if line.startswith("method")]

    assert heads(200) == [list(SCHEMES)] * 2
    assert heads(80) == [list(SCHEMES)] * 2  # intervals have moved to lines of their own
    assert [name for line in heads(50) for name in line] == [*SCHEMES] * 2
    assert len(heads(50)) > 2
    assert "1.0 [-0.5, 2.5]" not in to_terminal(table, 80)
    beside, below = (to_terminal(table, width).count("\n") for width in (200, 80))
    assert below > beside


def test_the_best_has_a_mark(rows: SuiteRows) -> None:
    marked = [line for line in to_terminal(make_table(rows), 200).splitlines() if "* " in line]
    assert marked[0] == "* stands for bold"
    assert [line.split()[0] for line in marked[1:]] == ["minmax"] * 2
    assert all(line.count("* ") == 4 for line in marked[1:])


def test_a_place_without_a_number_says_why(suite: Suite, store: Store) -> None:
    text = to_terminal(make_table(collect_rows(store, suite, allow_partial=True)), 80)
    assert text.count("missing") == 4
    assert "\ntoy\n" in text  # its FP32 value is not known


@pytest.mark.parametrize("width", [8, 12, 20, 60])
@pytest.mark.parametrize("label", [*LABELS, "aname" * 20, ""])
def test_long_names_are_broken_where_they_can_be(label: str, width: int) -> None:
    lines = broken(label, width)
    assert "".join(lines) == label
    assert all(len(line) <= width for line in lines)
    if width == 20 and label.startswith("fq_vit"):
        assert lines == ["fq_vit[", "attention=integer,", "factor=False]"]


def test_a_column_wider_than_the_terminal_stands_alone() -> None:
    made = blocks("method", [["a"], ["b"]], [Row("m", [["x" * 90], ["1"]])], 40)
    assert len(made) == 2
    assert "x" * 90 in made[0]
    assert made[1].splitlines()[-1].split() == ["m", "1"]


def test_the_width_is_the_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    for columns, width in (("132", 132), ("80", 80), ("7", 40)):
        monkeypatch.setenv("COLUMNS", columns)
        assert terminal_width() == width


def test_signs_that_a_terminal_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    for encoding, text in (("ascii", "1 +- 2"), ("utf-8", "1 ± 2"), ("cp1252", "1 ± 2")):
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
        assert printable("1 ± 2") == text


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(cli, [*arguments, "--results", str(tmp_path / "results")])

    return run


@pytest.fixture
def mixed(tmp_path: Path) -> str:
    path = tmp_path / "mixed.toml"
    path.write_text(
        'models = ["toy"]\nprecisions = ["W8A8", "W4A4"]\ncalibration_items = 8\n'
        'methods = [{name = "toy_trained"}, {name = "fp32"}, {name = "mse"}, {name = "minmax"}]'
    )
    return str(path)


def test_a_run_prints_the_first_table_then_the_whole_one(call: Any, mixed: str) -> None:
    run = ("run", "--all", "--suite", mixed, "--no-tracking")
    result = call(*run)
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= 80
    said = result.stderr
    at = said.index("First table: calibrators. The whole one, of 2 cells more, follows.")
    cells, last = said.index("[5/7]"), said.index("[6/7]")
    assert cells < at < last
    first = said[at:last]
    assert "minmax" in first
    assert "mse" in first
    assert "toy_trained" not in first
    whole = result.stdout
    assert whole.index("toy_trained") < whole.index("7 cells: 7 done")
    assert whole.count("method ") == 1
    again = call(*run)  # nothing runs, so there is no first table
    assert "First table" not in again.stderr
    assert again.stdout.startswith(whole[: whole.index("7 cells")])
    assert "7 cells: 7 cached" in again.stdout
    assert "time," not in again.stdout


def test_the_first_table_waits_for_missing_cells_alone(call: Any, mixed: str) -> None:
    call("run", "--method", "mse", "--suite", mixed, "--no-tracking")
    result = call("run", "--all", "--suite", mixed, "--no-tracking")
    first = result.stderr[result.stderr.index("First table") :]
    assert "mse" in first
    assert "minmax" in first


def test_runs_of_one_kind_print_one_table(call: Any, mixed: str) -> None:
    for method in ("minmax", "toy_trained"):
        result = call("run", "--method", method, "--suite", mixed, "--no-tracking")
        assert "First table" not in result.stderr
        assert method in result.stdout
        assert "missing" not in result.stdout
    nothing = call("run", "--method", "fp32", "--suite", mixed, "--no-tracking")
    assert "1 cells: 1 done" in nothing.stdout
    assert "method" not in nothing.stdout


def test_a_run_of_other_cells_than_the_suites_prints_theirs(call: Any, mixed: str) -> None:
    run = (
        "run",
        "--method",
        "omse",
        "--precision",
        "W6A6",
        "--limit",
        "7",
        "--suite",
        mixed,
        "--no-tracking",
    )
    result = call(*run)
    assert "W6A6" in result.stdout
    assert "omse" in result.stdout
    assert "n = 7" in result.stdout


def test_a_dry_run_prints_no_table(call: Any, mixed: str) -> None:
    call("run", "--all", "--suite", mixed, "--no-tracking")
    assert "± " not in call("run", "--all", "--suite", mixed, "--dry-run").stdout


@pytest.mark.parametrize("form", ["terminal", "markdown", "latex", "csv", "json"])
def test_the_cost_of_methods_in_every_form(call: Any, mixed: str, tmp_path: Path, form: str) -> None:
    from tests.engine.test_tables import check_latex

    call("run", "--all", "--suite", mixed, "--no-tracking")
    result = call("table", "--suite", mixed, "--cost", "--format", form)
    assert result.exit_code == 0, result.output
    text = result.stdout
    if form == "terminal":
        assert max(map(len, text.splitlines())) <= 80
        return
    kept = tmp_path / "results" / "tables"
    ending = {"markdown": "md", "latex": "tex"}.get(form, form)
    assert (kept / f"mixed-cost.{ending}").read_text() == text
    if form == "latex":
        check_latex(text)
        assert "\\label{tab:mixed-cost}" in text
    if form == "markdown":
        table = [line for line in text.splitlines() if line.startswith("|")]
        assert len(table) == 5
        assert len({line.count("|") for line in table}) == 1
    if form == "json":
        lines = {line["method"]: line for line in json.loads(text)}
        assert list(lines) == ["toy_trained", "mse", "minmax"]
        assert {name: line["trainings"] for name, line in lines.items()} == {
            "toy_trained": 1, "mse": 0, "minmax": 0
        }  # fmt: skip
        for line in lines.values():
            total = line["trainings"] * line["training_s"] + 3 * line["calibration_s"]
            assert line["total_s"] == pytest.approx(total, abs=0.01)
            assert {"loss_W8A8", "loss_W4A4", "peak_mb", "extra_operations"} <= set(line)


def test_costs_that_nobody_kept(call: Any, suite_file: str, store: Store, suite: Suite) -> None:
    refused = call("table", "--suite", suite_file, "--cost", "--allow-partial")
    assert refused.exit_code == 2
    assert "tells what its method takes" in refused.stderr
    assert "--overwrite always" in refused.stderr
    both = call("table", "--suite", suite_file, "--cost", "--published")
    assert both.exit_code == 2
    assert "give one of them" in both.stderr
