"""Sensitivities of measured cells: kept and read back, resumed, shown in every form, never of test items."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from benchmark.cli import cli
from benchmark.engine import sensitivity
from benchmark.engine.measure import evaluate
from benchmark.engine.reopen import load_quantized
from benchmark.engine.session import Session
from benchmark.grid.expand import expand
from benchmark.grid.suite import load_suite
from benchmark.keep.record import Record
from benchmark.keep.store import Store
from benchmark.report.figures.figure import choose
from benchmark.report.gallery import make_frames, svg_of
from benchmark.report.rows import collect_rows
from benchmark.report.sensitivity_table import _two_digits, lines_of
from quanttune.analysis import Probe, by_block
from quanttune.errors import StoreError
from quanttune.quantization import simulate

Call = Callable[..., Result]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return tmp_path / "results"


@pytest.fixture
def call(results: Path) -> Call:
    def run(*arguments: str) -> Result:
        return CliRunner().invoke(cli, [*arguments, "--results", str(results)])

    return run


@pytest.fixture
def ran(call: Call, suite_file: str) -> str:
    result = call("run", "--all", "--suite", suite_file, "--no-tracking")
    assert result.exit_code == 0, result.output
    return suite_file


def record_of(results: Path, suite: str, method: str = "minmax", precision: str = "W4A4") -> Record:
    (record,) = [
        record
        for cell in expand(load_suite(suite))
        if cell.method == method and cell.precision == precision
        and (record := Store(results).load(cell))
    ]  # fmt: skip
    return record


def session_of(results: Path) -> Session:
    return Session("toy", Store(results).stages, torch.device("cpu"), lambda *_: None)


def test_what_is_measured_is_what_the_validation_items_say(ran: str, results: Path) -> None:
    store, record, session = Store(results), record_of(results, ran), session_of(results)
    found = sensitivity.measured(session, store, record, "site", 6)
    quantizers = load_quantized(store, record.cell.cell_id).quantizers
    assert [part.name for part in found.parts] == [row["id"] for row in record.sites]
    assert found.items == 6

    def value(names: list[str]) -> float:
        with simulate(session.model, {name: quantizers[name] for name in names}, exact=True):
            items = evaluate(
                session.model,
                session.task,
                session.entry,
                split="validation",
                limit=6,
                device=session.device,
                progress=lambda *_: None,
            )
        return float(session.task.metric_value(items.scores))

    assert found.fp32 == value([])
    assert found.whole["drop"] == found.fp32 - value(list(quantizers))
    for part in found.parts:
        assert part.alone["drop"] == found.fp32 - value([part.name])
        assert part.rest["drop"] == found.fp32 - value([name for name in quantizers if name != part.name])
    assert any(part.alone["divergence"] > 0 for part in found.parts)
    assert {part.kind for part in found.parts} > {"weight"}


def test_blocks_are_those_of_the_analysis(ran: str, results: Path) -> None:
    record = record_of(results, ran)
    found = sensitivity.measured(session_of(results), Store(results), record, "block", 6)
    blocks = by_block(str(row["id"]) for row in record.sites)
    assert {part.name: part.sites for part in found.parts} == {
        name: len(sites) for name, sites in blocks.items()
    }
    assert {part.kind for part in found.parts} == {"block"}


def test_it_is_measured_once_and_read_without_a_model(
    ran: str, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, record = Store(results), record_of(results, ran)
    assert sensitivity.kept(store, record, "site") is None
    first = sensitivity.measured(session_of(results), store, record, "site", 6)
    more = sensitivity.measured(session_of(results), store, record, "site", 9)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(Probe, "__init__", refuse)
    assert sensitivity.measured(session_of(results), store, record, "site", 6) == first
    monkeypatch.setattr(Session, "__init__", refuse)
    assert sensitivity.kept(store, record, "site") == more  # that of the most items
    assert sensitivity.kept(store, record, "block") is None
    assert sensitivity.kept(store, record_of(results, ran, "mse"), "site") is None
    assert sensitivity.kept(store, record_of(results, ran, "fp32", "FP32"), "site") is None


def test_what_was_interrupted_goes_on_at_the_next_site(
    ran: str, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, record, session = Store(results), record_of(results, ran), session_of(results)
    counts: list[int] = []
    effect = Probe.effect

    def counted(self: Probe, quantizers: Any) -> Any:
        if len(counts) == 5:
            counts.append(-1)
            raise KeyboardInterrupt
        counts.append(len(quantizers))
        return effect(self, quantizers)

    monkeypatch.setattr(Probe, "effect", counted)
    with pytest.raises(KeyboardInterrupt):
        sensitivity.measured(session, store, record, "site", 6)
    resumed = sensitivity.measured(session, store, record, "site", 6)
    assert len(counts) - 1 == 1 + 2 * len(record.sites)  # everything, and each site twice
    (kept,) = (results / "stages" / sensitivity.STAGE).glob("*.safetensors")
    kept.unlink()
    monkeypatch.setattr(Probe, "effect", effect)
    assert sensitivity.measured(session_of(results), store, record, "site", 6) == resumed


def test_unfinished_work_that_was_damaged_begins_anew(ran: str, results: Path) -> None:
    store, record = Store(results), record_of(results, ran)
    whole = sensitivity.measured(session_of(results), store, record, "block", 6)
    (kept,) = (results / "stages" / sensitivity.STAGE).glob("*.safetensors")
    unfinished = results / "stages" / "unfinished" / f"{sensitivity.STAGE}-{kept.stem}.safetensors"
    unfinished.parent.mkdir(exist_ok=True)
    unfinished.write_bytes(kept.read_bytes())  # intact, but nothing that this work has kept
    kept.unlink()
    assert sensitivity.measured(session_of(results), store, record, "block", 6) == whole
    assert not unfinished.exists()


def test_a_cell_of_another_reference_is_refused(
    ran: str, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, record, session = Store(results), record_of(results, ran), session_of(results)
    monkeypatch.setattr(Session, "reference_digest", "0" * 64)
    with pytest.raises(StoreError, match="another reference than toy has now; measure it again"):
        sensitivity.measured(session, store, record, "site", 6)


def test_the_command_measures_and_shows(ran: str, call: Call) -> None:
    select = ("sensitivity", "--suite", ran, "--precision", "W4A4")
    result = call(*select, "--items", "7", "--top", "2")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert [line for line in lines if len(line) > 80] == []
    assert sum(line.startswith("toy minmax W4A4 full, by ") for line in lines) == 2
    assert sum(line.startswith("toy mse W4A4 full, by ") for line in lines) == 2
    assert "on 7 validation items" in " ".join(lines)
    again = call(*select, "--kept", "--top", "2")
    assert again.stdout == result.stdout
    whole = call(*select, "--kept", "--top", "99").stdout
    assert "left out" in result.stdout
    assert "left out" not in whole


@pytest.mark.parametrize("form", ["markdown", "latex", "csv", "json"])
def test_every_form_is_written_and_says_the_same(ran: str, call: Call, results: Path, form: str) -> None:
    select = ("sensitivity", "--suite", ran, "--method", "minmax", "--precision", "W4A4", "--items", "7")
    result = call(*select, "--format", form)
    assert result.exit_code == 0, result.output
    (written,) = (results / "tables").iterdir()
    assert written.read_text() == result.stdout
    found = [sensitivity.kept(Store(results), record_of(results, ran), unit) for unit in sensitivity.UNITS]
    names = [part.name for one in found if one for part in one.parts]
    if form in ("csv", "json"):
        rows = (
            json.loads(result.stdout) if form == "json" else list(csv.DictReader(io.StringIO(result.stdout)))
        )
        assert [row["part"] for row in rows] == names
        values = [part.rest["divergence"] for one in found if one for part in one.parts]
        assert [float(row["all_but_divergence"]) for row in rows] == values
    else:
        for name in names:
            assert (
                name if form == "markdown" else name.replace("#", r"\#").replace("_", r"\_")
            ) in result.stdout


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0.0"), (-0.0, "0.0"), (12.34, "12.3"), (-1.04, "-1.0"), (0.0304, "0.030"), (-0.0021, "-2.1e-03")],
)
def test_small_numbers_have_two_digits(value: float, text: str) -> None:
    assert _two_digits(value) == text


def test_a_long_id_is_broken_at_its_parts() -> None:
    assert lines_of("blocks.0/add.output") == ["blocks.0/add.output"]
    name = "bert.encoder.layer.0.intermediate.intermediate_act_fn/gelu.output"
    lines = lines_of(name)
    assert "".join(line.strip() for line in lines) == name
    assert len(lines) > 1
    assert all(len(line) <= 34 for line in lines)


def test_what_is_not_there_says_which_command_measures_it(call: Call, suite_file: str, results: Path) -> None:
    result = call("sensitivity", "--suite", suite_file)
    assert (result.exit_code, "nothing is selected; give --all" in result.stderr) == (2, True)
    result = call("sensitivity", "--suite", suite_file, "--method", "minmax")
    assert result.exit_code == 2
    run = f"python -m benchmark run --method minmax --suite {suite_file} --results {results}"
    assert f"none of the 2 chosen cells is measured; run `{run}`" in result.stderr
    assert call("run", "--method", "minmax", "--suite", suite_file, "--no-tracking").exit_code == 0
    result = call("sensitivity", "--suite", suite_file, "--all", "--kept")
    assert result.exit_code == 2
    measure = f"python -m benchmark sensitivity --all --suite {suite_file} --results {results}"
    assert f"no sensitivity of the chosen cells is kept; run `{measure}`" in result.stderr
    result = call("sensitivity", "--suite", suite_file, "--all", "--by", "block", "--items", "4")
    assert result.exit_code == 0
    assert "partial: 2 of 4 cells are measured" in result.stderr


def test_the_figure_draws_what_is_kept(ran: str, call: Call, results: Path) -> None:
    figures = choose(["sensitivity"])
    rows = collect_rows(Store(results), load_suite(ran))
    assert not len(make_frames(figures, rows, [], 1)["sensitivity"])
    result = call("figure", "--suite", ran, "--only", "sensitivity")
    command = f"python -m benchmark sensitivity --all --suite {ran} --results {results}"
    assert f"not measured: sensitivity; run `{command}`" in result.stderr
    assert "not measured: sensitivity" not in call("figure", "--suite", ran).stderr
    assert call("sensitivity", "--suite", ran, "--all", "--items", "5").exit_code == 0
    frame = make_frames(figures, rows, [], 1)["sensitivity"]
    assert set(zip(frame["method"], frame["precision"], frame["by"], strict=True)) == {
        (method, precision, by)
        for method in ("minmax", "mse")
        for precision in ("W8A8", "W4A4")
        for by in ("block", "site")
    }
    assert set(frame["items"]) == {5}
    assert svg_of(figures[0], frame).startswith("<?xml")
    assert svg_of(figures[0], frame[frame["by"] == "block"]).startswith("<?xml")
