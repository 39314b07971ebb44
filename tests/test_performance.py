"""The rows of `perf` run and compare what they say, on tiny models."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from benchmark.cli import cli
from benchmark.performance import idle, measurement, onnx_runtime, parallel
from benchmark.performance.architectures import ARCHITECTURES
from benchmark.performance.full_size import in_own_process
from benchmark.performance.growth import Point, _apart, _calibration, _timed, _views, exponents, measured
from benchmark.performance.idle import Watch
from benchmark.performance.ledger import Ledger
from benchmark.performance.measurement import ROWS, Line, NotMeasurableError, Setup, compare
from benchmark.performance.peak_memory import PeakMemory, saved_bytes
from quanttune.errors import StoreError

IDLE = {"idle": True, "others": 0.0, "loop_apart": 1.0, "load": 0.1}
WHERE = {"processor": "a", "threads": 1, "versions": {"torch": "2"}, "commit": "c"}


def perf(tmp_path: Path, *arguments: str) -> Result:
    options = ("--model", "tiny_vit", "--repeats", "1", "--results", str(tmp_path))
    return CliRunner().invoke(cli, ["perf", *arguments, *options])


def kept_in(tmp_path: Path) -> dict[str, dict[str, Any]]:
    rows = json.loads((tmp_path / "performance.json").read_text())["rows"]
    return {key: {line["what"]: line for line in row["lines"]} for key, row in rows.items()}


def test_the_list_names_every_row(tmp_path: Path) -> None:
    shown = perf(tmp_path, "--list").stdout.split()
    assert set(ROWS.names()) <= set(shown)
    assert {"statistics", "simulation", "rival_brecq", "calibrators_onnxruntime"} <= set(ROWS.names())


@pytest.mark.parametrize(
    "name",
    ["statistics", "simulation", "fq_vit", "saved_model", "rival_smoothquant", "observers_torch_ao",
     "fake_quantize_torch_ao", "training_step"],
)  # fmt: skip
def test_a_row_compares_its_work_with_the_first(tmp_path: Path, name: str) -> None:
    result = perf(tmp_path, name)
    assert result.exit_code == 0, result.output
    lines = kept_in(tmp_path)[f"{name} tiny_vit"]
    base, *others = lines.values()
    assert base["ratio"] is None
    assert all(line["ratio"] > 0 for line in others)
    ours_first = "ours over the other" in base["note"]
    for line in others:
        if line["seconds"]:
            of_base = line["seconds"][0] / base["seconds"][0]
            assert line["ratio"] == pytest.approx(1 / of_base if ours_first else of_base)


def test_two_processes_give_the_numbers_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "_ITEMS", 4)
    result = perf(tmp_path, "parallel")
    assert result.exit_code == 0, result.output
    lines = kept_in(tmp_path)["parallel tiny_vit"]
    assert len(lines) == 4
    assert lines["what is kept"]["note"] == "9 cells in all three stores: same numbers"


def test_rows_that_are_there_stay_and_absent_packages_cost_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(idle.Watch, "seen", lambda self: IDLE)
    monkeypatch.setattr("benchmark.performance.measurement.find_spec", lambda package: None)
    assert "skipped: optimum.quanto is not installed" in perf(tmp_path, "calibration_quanto").stderr
    assert not (tmp_path / "performance.json").exists()
    assert perf(tmp_path, "saved_*").exit_code == 0
    first = kept_in(tmp_path)
    assert "measured before" in perf(tmp_path, "saved_model").stderr
    assert kept_in(tmp_path) == first
    perf(tmp_path, "saved_model", "--again")
    assert kept_in(tmp_path) != first


def test_an_unknown_row_is_refused_with_a_close_one(tmp_path: Path) -> None:
    for wrong in ("statistic", "nothing*"):
        result = perf(tmp_path, wrong)
        assert result.exit_code == 2
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1


def test_turns_are_taken_and_ratios_are_those_of_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    clock = {"quick": [1.0, 2.0, 1.0], "slow": [4.0, 6.0, 9.0]}

    def timed(work: Callable[[], object]) -> float:
        work()
        return clock[order[-1]].pop(0)

    monkeypatch.setattr(measurement, "seconds", timed)
    works = {name: partial(order.append, name) for name in clock}
    base, other = compare(3, works, goals={"slow": 4.5})
    assert order == ["quick", "slow"] * 4  # the first round does not count
    assert (base.seconds, base.ratios, base.ratio) == ((1.0, 2.0, 1.0), (), None)
    assert other.ratios == (4.0, 3.0, 9.0)
    assert (other.ratio, other.spread, other.goal) == (4.0, 6.0, 4.5)


def entry_of(tmp_path: Path, *lines: Line, watch: dict[str, Any] = IDLE) -> dict[str, Any]:
    kept = Ledger(tmp_path / "p.json")
    kept.put("a row", "Something", lines, watch, where=WHERE, repeats=2)
    return json.loads((tmp_path / "p.json").read_text())["rows"]["a row"]


def test_a_goal_is_judged_by_the_median_and_on_idle_cores_alone(tmp_path: Path) -> None:
    met = Line("one", (1.0,), (1.0, 1.1, 9.0), goal=1.1)
    missed = replace(met, goal=1.05)
    assert [line["met"] for line in entry_of(tmp_path, met, missed)["lines"]] == [True, False]
    busy = IDLE | {"idle": False, "others": 0.4}
    assert [line["met"] for line in entry_of(tmp_path, met, missed, watch=busy)["lines"]] == [None, None]
    text = (tmp_path / "p.md").read_text()
    assert "other processes took 40% of the processor" in text
    assert ": met" not in text
    assert text.count("not judged") == 2


def test_a_row_is_not_measured_again_until_something_differs(tmp_path: Path) -> None:
    entry_of(tmp_path, Line("one", (1.0,)))
    kept = Ledger(tmp_path / "p.json")
    assert kept.has("a row", WHERE | {"commit": "another"}, 2)
    assert not kept.has("a row", WHERE, 3)
    assert not kept.has("a row", WHERE | {"threads": 2}, 2)
    assert not kept.has("another", WHERE, 2)
    entry_of(tmp_path, Line("one", (1.0,)), watch=IDLE | {"idle": False})
    assert not Ledger(tmp_path / "p.json").has("a row", WHERE, 2)


def test_another_file_is_refused_and_left_alone(tmp_path: Path) -> None:
    other = tmp_path / "store.json"
    other.write_text('{"version": 1}')
    with pytest.raises(StoreError, match="--output"):
        Ledger(other)
    assert other.read_text() == '{"version": 1}'


def test_others_on_the_processor_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idle, "_loops", lambda: [1.0, 1.01])
    clock = {"busy": 100.0}
    monkeypatch.setattr(idle, "_busy_seconds", lambda: clock["busy"])
    monkeypatch.setattr(idle, "_own_seconds", lambda: 50.0)
    watch = Watch()
    assert watch.seen()["idle"]
    clock["busy"] += 1000.0
    assert not watch.seen()["idle"]
    loops = iter(([1.0, 1.01], [1.0, 1.3]))
    monkeypatch.setattr(idle, "_busy_seconds", lambda: 100.0)
    monkeypatch.setattr(idle, "_loops", lambda: next(loops))
    seen = Watch().seen()
    assert not seen["idle"]
    assert "1.30 times" in idle.why_busy(seen)


def test_what_a_batch_saves_is_what_autograd_keeps() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 4))
    inputs = torch.randn(32, 8)
    # the layers' inputs and GELU's own, which is another tensor than its output; no parameters
    assert saved_bytes(model, inputs) == 4 * 32 * (8 + 16 + 16)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere an earlier peak counts, too")
def test_peak_memory_is_what_was_needed_since() -> None:
    mib = 2**20
    earlier = torch.ones(256 * mib // 4)
    del earlier
    memory = PeakMemory(torch.device("cpu"))
    assert memory.above_baseline() < 32 * mib
    held = torch.ones(128 * mib // 4)
    assert 120 * mib < memory.above_baseline() < 160 * mib
    del held
    assert 120 * mib < memory.above_baseline() < 160 * mib  # the highest, not what is left


@pytest.mark.parametrize("key", ARCHITECTURES)
def test_architectures_are_those_of_the_paper(key: str) -> None:
    """On the meta device, so that no weights are drawn: parameters as published, in millions."""
    with torch.device("meta"):
        model = ARCHITECTURES[key].build()
    count = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert round(count, 1) == {"vit_b": 86.6, "swin_b": 87.8, "bert_base": 109.5, "opt_350m": 331.2}[key]


@pytest.mark.slow
@pytest.mark.parametrize("key", ARCHITECTURES)
def test_fewer_layers_of_the_full_width_stay_within_the_limit(key: str) -> None:
    rows = {row.what.partition(": ")[2]: row for row in in_own_process(key, "cpu", 1, 1, layers=2)}
    assert rows["all off"].note == "bit-identical"
    assert "LOGITS" not in rows["simulated W8A8, full"].note
    peak = rows["peak memory"].ratio
    assert peak is not None
    assert 0 < peak <= 1
    steps = [row for what, row in rows.items() if what.startswith("step of")]
    assert len(steps) == (2 if ARCHITECTURES[key].tuned else 0)


def test_growth_measures_every_axis_and_fits_exponents(tmp_path: Path) -> None:
    setup = Setup("tiny_vit", tmp_path, torch.device("cpu"), 1, lambda _: None)
    rows = measured(setup, (), (), (32, 64))
    points = [Point(**point) for point in json.loads((tmp_path / "growth.json").read_text())]
    assert [(point.axis, point.size) for point in points] == [
        ("calibration items", 32),
        ("calibration items", 64),
    ]
    assert (tmp_path / "growth.pdf").read_bytes().startswith(b"%PDF")
    assert "exponents" in rows[-1].note
    line = [Point("table", "cells", size, 0.001 * size**1.5, 2.0 * size) for size in (10, 100, 1000)]
    assert exponents(line) == pytest.approx((1.5, 1.0))


def test_growth_times_the_command_line_on_synthetic_stores(tmp_path: Path) -> None:
    points = list(_views(tmp_path, 66))[1:]
    assert [point.what for point in points] == [
        "table",
        "run --dry-run",
        "run --all, all cached",
        "report, first time",
        "report",
    ]
    assert all(point.seconds > 0 for point in points)
    # Each imports Python's own modules and some of ours, none a model.
    assert all(20 < point.peak_mb < 2000 for point in points)


def test_the_peak_of_a_command_is_not_that_of_whoever_times_it() -> None:
    held = torch.ones(2**26)
    _, peak = _timed([sys.executable, "-I", "-S", "-c", "print('heard by no one')"])
    assert peak < held.nbytes / 2
    with pytest.raises(RuntimeError, match="-c raise SystemExit\\(3\\) ended with 3"):
        _timed([sys.executable, "-c", "raise SystemExit(3)"])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere an earlier peak counts, too")
def test_the_memory_of_a_calibration_hardly_grows_with_its_items() -> None:
    few, many = (_apart(_calibration, items, 1, "cpu").peak_mb for items in (64, 1024))
    assert many < 2 * few


def test_a_calibrator_of_others_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found: the histogram of one overflows on the masks of BERT, and the row failed with it."""
    failing = {"Percentile"}

    def calibrate(name: str, *_: Any) -> Callable[[], object]:
        def run() -> None:
            if name in failing:
                raise ValueError("no range")

        return run

    monkeypatch.setattr(onnx_runtime, "_export", lambda *_: None)
    monkeypatch.setattr(onnx_runtime, "_calibrate", calibrate)
    setup = Setup("tiny_vit", tmp_path, torch.device("cpu"), 1, lambda _: None)
    lines = {line.what: line for line in ROWS.get("calibrators_onnxruntime").measure(setup)}
    assert set(lines) == {"our statistics", measurement.FORWARD, "MinMax", "Entropy"}
    assert "Percentile fails on this model: ValueError: no range" in lines[measurement.FORWARD].note
    failing |= {"MinMax", "Entropy"}
    with pytest.raises(NotMeasurableError, match="MinMax fails"):
        ROWS.get("calibrators_onnxruntime").measure(setup)
