"""The changes of CONTRIBUTING.md, made in a temporary folder and run through suite smoke."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file
from sklearn.metrics import balanced_accuracy_score

from benchmark.grid.cells import Cell
from tests.changes.conftest import PAGE
from tests.parts.test_folders import save_image_model

Measure = Callable[..., list[dict[str, Any]]]
Command = Callable[..., str]


def by_precision(records: list[dict[str, Any]], precision: str) -> dict[str, Any]:
    (record,) = [record for record in records if record["cell"]["precision"] == precision]
    return record


def quantizers(record: dict[str, Any]) -> set[str]:
    """The kinds of quantizer a record lists."""
    return {str(site["quantizer"]).partition("(")[0] for site in record["sites"]}


def test_a_method_of_ones_own_repository(measure: Measure, file_of: Callable[[str], Path]) -> None:
    path = file_of("margin")
    records = measure("--include", str(path), "--precision", "W8A8", method="margin")
    margin, plain = by_precision(records, "W8A8"), by_precision(measure("--precision", "W8A8"), "W8A8")
    assert margin["status"] == "done"
    activations = [site for site in margin["sites"] if site["kind"] != "weight"]
    ranges = {site["id"]: site["high"] for site in plain["sites"]}
    assert activations
    # Steps have 16 significant bits.
    assert all(site["high"] == pytest.approx(1.1 * ranges[site["id"]], rel=2**-14) for site in activations)
    (included,) = margin["provenance"]["includes"]
    assert included["name"] == path.name


def test_a_method_of_ones_own_in_worker_processes(measure: Measure, file_of: Callable[[str], Path]) -> None:
    arguments = ("--include", str(file_of("margin")), "--executor", "local", "--jobs", "2")
    records = measure(*arguments, "--precision", "W6A6", "--precision", "W5A5", method="margin")
    assert {by_precision(records, precision)["status"] for precision in ("W6A6", "W5A5")} == {"done"}


@pytest.mark.parametrize("profile", ["full", "matmul"])
@pytest.mark.parametrize("model", ["tiny_vit", "tiny_bert"])
def test_smoothquant(measure: Measure, file_of: Callable[[str], Path], model: str, profile: str) -> None:
    arguments = ("--include", str(file_of("smooth")), "--precision", "W6A6", "--profile", profile)
    records = measure(*arguments, model=model, method="smooth")
    (record,) = [each for each in records if each["cell"]["profile"] == profile]
    assert record["status"] == "done"
    assert "ScaledQuantizer" in quantizers(record)
    # Free in front of linear layers alone; it costs where the residual reads the same integers.
    assert ("extra_operations" in record["details"]) == (model == "tiny_bert" and profile == "full")


@pytest.mark.parametrize(
    ("precision", "kinds"),
    [
        ("W8A8-token", {"UniformQuantizer", "DynamicQuantizer"}),
        ("W4g8A8", {"UniformQuantizer", "GroupQuantizer"}),
        ("W4", {"UniformQuantizer"}),
        ("W4g8", {"GroupQuantizer"}),
        ("W4A8", {"UniformQuantizer"}),
    ],
)
def test_another_scheme_touches_no_file(measure: Measure, precision: str, kinds: set[str]) -> None:
    record = by_precision(measure("--precision", precision), precision)
    assert record["status"] == "done"
    assert quantizers(record) == kinds
    has_activations = any(site["kind"] != "weight" for site in record["sites"])
    assert has_activations == ("A" in precision)
    assert str(Cell.from_identity(record["cell"]).scheme) == precision


def test_a_range_rule_without_static_ranges_is_skipped_with_the_reason(measure: Measure) -> None:
    record = by_precision(measure("--precision", "W8A8-token", method="percentile"), "W8A8-token")
    assert record["status"] == "skipped"
    assert "under W8A8-token ranges are found at run time" in record["reason"]


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(
        'models = ["tiny_vit"]\nprecisions = ["W8A8"]\ncalibration_items = 16\nlimit = 64\n'
        '[[methods]]\nname = "fp32"\n[[methods]]\nname = "minmax"\n'
    )
    return path


def test_another_metric_of_a_task(benchmark_command: Command, suite: Path) -> None:
    benchmark_command("run", "--all", "--suite", str(suite), "--no-tracking")
    rows = json.loads(
        benchmark_command("table", "--suite", str(suite), "--format", "json", "--metric", "macro F1")
    )
    assert {row["metric"] for row in rows} == {"macro F1"}
    assert all(row["ci_low"] <= row["drop"] <= row["ci_high"] for row in rows)


def test_a_new_metric(
    benchmark_command: Command, suite: Path, file_of: Callable[[str], Path], results: Path
) -> None:
    """Of cells that were measured before anybody thought of it."""
    benchmark_command("run", "--all", "--suite", str(suite), "--no-tracking")
    include = ("--include", str(file_of("balanced accuracy")))
    chosen = ("--suite", str(suite), "--metric", "balanced accuracy", *include)
    for row in json.loads(benchmark_command("table", *chosen, "--format", "json")):
        items = load_file(results / "cells" / f"{row['cell_id']}.safetensors")
        expected = 100 * balanced_accuracy_score(items["targets"], items["predictions"])
        assert row["value"] == pytest.approx(expected)
    assert "balanced accuracy" in benchmark_command("table", *chosen)


def test_a_figure(
    benchmark_command: Command, suite: Path, file_of: Callable[[str], Path], results: Path
) -> None:
    benchmark_command("run", "--all", "--suite", str(suite), "--no-tracking")
    benchmark_command("figure", "--suite", str(suite), "--only", "time", "--include", str(file_of("time")))
    made = {path.suffix for path in (results / "figures").glob("mine-time.*")}
    assert made >= {".pdf", ".svg", ".csv"}


def test_an_executor(measure: Measure, file_of: Callable[[str], Path]) -> None:
    arguments = ("--include", str(file_of("backwards")), "--executor", "backwards")
    records = measure(*arguments, "--precision", "W3A3", "--precision", "W2A2")
    assert by_precision(records, "W3A3")["finished_at"] >= by_precision(records, "W2A2")["finished_at"]


def test_a_model_of_the_hub(measure: Measure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a folder that stands in for the Hub on a machine that cannot reach it."""
    save_image_model(tmp_path / "someone" / "vit")
    monkeypatch.setenv("QUANTTUNE_MODELS", str(tmp_path))
    (record,) = measure("--precision", "W8A8", model="hub:someone/vit@fashion_mnist")
    assert record["status"] == "done"


def test_a_data_set_of_ones_own(measure: Measure, tmp_path: Path) -> None:
    words = {"good": "fine lovely great", "bad": "awful dull poor"}
    lines = ["text,label"]
    lines += [f"{words[label]} film {number},{label}" for number in range(150) for label in ("good", "bad")]
    path = tmp_path / "reviews.csv"
    path.write_text("\n".join(lines), encoding="utf-8")
    (record,) = measure("--precision", "W8A8", model=f"tiny_bert@data:{path}")
    assert record["status"] == "done"
    assert record["result"]["n"] > 10
    assert record["result"]["metric"] == "accuracy"


def test_the_page_promises_only_what_is_tested_here() -> None:
    """Every precision and every included file that the table of changes names stands in a test."""
    table = PAGE.read_text(encoding="utf-8").partition("| change |")[2].partition("\n\n")[0]
    tests = Path(__file__).read_text(encoding="utf-8")
    for precision in re.findall(r"--precision (\S+?)`", table):
        assert re.sub(r"g\d+", "g8", precision) in tests
    for name in re.findall(r"\(#an?-(\w+)\)", table):
        assert f"def test_a{'n' if name == 'executor' else ''}_" in tests
