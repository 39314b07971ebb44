"""The speed measurements run and compare what they say, on tiny models."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmark.performance.__main__ import main
from benchmark.performance.measurement import MEASUREMENTS, interleaved


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
