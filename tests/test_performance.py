"""The speed measurements run and compare what they say, on tiny models."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmark.performance.__main__ import main
from benchmark.performance.architectures import ARCHITECTURES
from benchmark.performance.full_size import in_own_process
from benchmark.performance.growth import Point, _apart, _calibration, _views, exponents, measured
from benchmark.performance.measurement import MEASUREMENTS, Setup, interleaved
from benchmark.performance.peak_memory import PeakMemory, saved_bytes


def run(tmp_path: Path, *arguments: str) -> str:
    result = CliRunner().invoke(main, [*arguments, "--repeats", "1", "--results", str(tmp_path)])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_without_a_name_it_lists_them(tmp_path):
    assert run(tmp_path).split() == MEASUREMENTS.names()
    assert {"fq_vit", "ptq4vit"} <= set(MEASUREMENTS.names())


@pytest.mark.parametrize("model", ["tiny_vit", "tiny_bert"])
def test_fq_vit_compares_its_calibration_with_the_forward(tmp_path, model):
    lines = run(tmp_path, "fq_vit", "--model", model).splitlines()
    forward, calibration = (line for line in lines if "FP32 forward of 128" in line or "three widths" in line)
    plain, full, ratio = float(forward.split()[-1]), *map(float, calibration.split()[4:6])
    assert ratio == pytest.approx(full / plain, rel=0.02)


def test_ptq4vit_compares_its_search_with_the_exhaustive_one(tmp_path):
    output = run(tmp_path, "ptq4vit", "--model", "tiny_vit")
    taken = next(line for line in output.splitlines() if line.startswith("exhaustive search, W8A8"))
    assert float(taken.split()[4]) > 1.5
    assert "of the goal of 180 s" in output


def test_an_unknown_name_is_refused_in_one_line(tmp_path):
    result = CliRunner().invoke(main, ["fqvit", "--results", str(tmp_path)])
    assert result.exit_code == 1
    assert "fq_vit" in result.stderr


def test_interleaved_takes_turns_and_keeps_the_fastest():
    order = []

    def work(name: str, pauses: list[float]) -> None:
        order.append(name)
        time.sleep(pauses.pop())

    slow, quick = [0.02, 0.08], [0.01, 0.03]
    taken = interleaved(2, lambda: work("slow", slow), lambda: work("quick", quick))
    assert order == ["slow", "quick"] * 2
    assert 0.02 <= taken[0] < 0.08
    assert 0.01 <= taken[1] < 0.03


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
    table, dry, cached = (point for point in list(_views(tmp_path, 66))[1:])
    assert [point.what for point in (table, dry, cached)] == [
        "table",
        "run --dry-run",
        "run --all, all cached",
    ]
    assert all(point.seconds > 0.3 and 100 < point.peak_mb < 2000 for point in (table, dry, cached))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere an earlier peak counts, too")
def test_the_memory_of_a_calibration_hardly_grows_with_its_items() -> None:
    few, many = (_apart(_calibration, items, 1, "cpu").peak_mb for items in (64, 1024))
    assert many < 2 * few
