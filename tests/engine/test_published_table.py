"""A published value gets a difference where ours is of the same thing, and a reason everywhere else."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmark.cli import cli
from benchmark.grid.cells import Cell
from benchmark.grid.expand import expand
from benchmark.grid.suite import Suite, load_suite, parse_suite
from benchmark.keep.record import Record, Result
from benchmark.keep.store import Store
from benchmark.report.published.reader import load_published, published_names
from benchmark.report.published.value import IMAGENET
from benchmark.report.published.values import published_values
from benchmark.report.published_table import (
    Line,
    PublishedTable,
    make_published_table,
    published_frame,
    published_latex,
    published_markdown,
    published_terminal,
)
from benchmark.report.rows import collect_rows
from benchmark.subject.models.entry import MODELS
from benchmark.subject.tasks.task import TASKS

VIT_B = "vit_base_patch16_224.augreg_in21k_ft_in1k"
FP32 = 84.0

SUITE = """
models = ["toy"]
precisions = ["W8A8", "W6A6"]
profiles = ["full", "matmul"]
weight_granularity = ["per_channel", "per_tensor"]
symmetric = [true, false]
seeds = [0, 1]
calibration_items = 8
[[methods]]
name = "fp32"
[[methods]]
name = "minmax"
[[methods]]
name = "percentile"
[[methods]]
name = "fq_vit"
[[methods]]
name = "fq_vit"
attention = "integer"
[[methods]]
name = "ptq4vit"
"""


def value_of(cell: Cell) -> float:
    """A number that tells apart every axis of the grid."""
    if cell.is_reference:
        return FP32
    value = 10.0 * len(cell.label) + 100 * cell.seed + (0.5 if cell.profile == "full" else 0.0)
    value += 0.25 if cell.weight_granularity == "per_channel" else 0.0
    return value + (0.125 if cell.symmetric else 0.0) + (3.0 if cell.precision == "W8A8" else 0.0)


Make = Callable[..., PublishedTable]


@pytest.fixture
def imagenet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the toy pass for the released ViT-B on ImageNet."""
    monkeypatch.setattr(MODELS.get("toy"), "checkpoint", VIT_B)
    monkeypatch.setattr(TASKS.get("toy_task"), "benchmark", IMAGENET)


@pytest.fixture
def make(store: Store) -> Make:
    def make(text: str = SUITE, leave_out: Callable[[Cell], bool] = lambda cell: False) -> PublishedTable:
        suite: Suite = parse_suite("toys_1", text, "the test")
        for cell in expand(suite):
            if not leave_out(cell):
                value = value_of(cell)
                result = Result("accuracy", True, value, FP32, None, FP32 - value, -1.0, 1.0, 40)
                store.save(Record(cell, "done", "2026-01-01T00:00:00+00:00", 1.0, result))
        return make_published_table(collect_rows(store, suite, allow_partial=True))

    return make


def line(
    table: PublishedTable, method: str, precision: str = "W8A8", source: str = "", bits: int | None = 0
) -> Line:
    own = source or ("PTQ4ViT" if "ptq" in method else "FQ-ViT")
    (found,) = (
        line
        for line in table.shown
        if (line.method, line.precision) == (method, precision)
        and line.source.startswith(own)
        and bits in (0, line.attention_bits)
    )
    return found


def test_every_published_number_is_read() -> None:
    read = published_values()
    tops = [name for name in published_names() if name.startswith("imagenet")]
    assert sum(value.data == IMAGENET and not value.family for value in read) == sum(
        len(load_published(name)) for name in tops
    )
    by_source = {value.source for value in read}
    assert by_source == {source for name in published_names() for source in load_published(name)["source"]}
    opt = {(value.model, value.precision): value for value in read if value.source.startswith("optimum")}
    assert opt["facebook/opt-125m", "W8A8"].value == 5.0
    assert opt["facebook/opt-125m", "W8A8"].drop == 58.0
    vits = [v for v in read if (v.model, v.method, v.precision) == (VIT_B, "ptq4vit", "W6A6")]
    (vit,) = (v for v in vits if v.source == "PTQ4ViT README")
    assert (vit.value, vit.drop) == (81.65, pytest.approx(84.54 - 81.65))
    (rep,) = (v for v in read if (v.model, v.source, v.precision) == (VIT_B, "RepQ-ViT README", "W6A6"))
    assert (rep.method, rep.value, rep.drop) == ("repq_vit", 83.62, pytest.approx(84.54 - 83.62))
    (mnli,) = (v for v in read if v.metric == "mnli accuracy")
    assert (mnli.value, mnli.drop) == (84.69, pytest.approx(84.94 - 84.69))
    for value in read:
        assert (value.setting is None) == bool(value.why)


@pytest.mark.usefixtures("imagenet")
def test_the_same_setting_gives_the_difference(make: Make) -> None:
    table = make()
    reference = line(table, "fp32", "FP32", "FQ-ViT")
    assert (reference.published, reference.measured, reference.why) == (84.53, FP32, "")
    assert reference.difference == pytest.approx(FP32 - 84.53)
    assert reference.published_drop is None
    assert reference.measured_drop is None
    minmax = line(table, "minmax")
    # full, per channel, asymmetric; the mean over seeds 0 and 1 adds 50
    assert minmax.measured == 10 * len("minmax") + 50 + 0.5 + 0.25 + 3
    assert minmax.difference == pytest.approx(minmax.measured - 23.64)
    assert minmax.published_drop == pytest.approx(84.53 - 23.64)
    assert minmax.measured_drop == pytest.approx(FP32 - minmax.measured)
    searched = line(table, "ptq4vit", "W6A6")
    assert searched.measured == 10 * len("ptq4vit") + 50 + 0.125  # matmul, per tensor, symmetric


@pytest.mark.usefixtures("imagenet")
def test_attention_bits_choose_the_variant(make: Make) -> None:
    table = make()
    assert (line(table, "fq_vit", bits=8).measured or 0) < 200  # label fq_vit
    assert (line(table, "fq_vit", bits=4).measured or 0) > 250  # label fq_vit[attention=integer]
    alone = make(SUITE.replace('attention = "integer"', 'attention = "log2"'))
    assert (
        line(alone, "fq_vit", bits=4).why == "other parameters: published attention = integer, here uniform"
    )


@pytest.mark.usefixtures("imagenet")
@pytest.mark.parametrize(
    ("method", "precision", "old", "new", "why"),
    [
        (
            "minmax",
            "W8A8",
            "[true, false]",
            "[true]",
            "activation ranges published asymmetric, here symmetric",
        ),
        ("minmax", "W8A8", '["full", "matmul"]', '["matmul"]', "other profile: published full, here matmul"),
        (
            "ptq4vit",
            "W8A8",
            '["per_channel", "per_tensor"]',
            '["per_channel"]',
            "weights published per tensor",
        ),
        ("ptq4vit", "W6A6", '["W8A8", "W6A6"]', '["W8A8"]', "the suite has no W6A6"),
        ("base_ptq", "W8A8", "", "", "the suite has no base_ptq"),
        ("percentile", "W8A8", "", "", "other parameters: published p = 99.999, here 99.99"),
        ("minmax", "W8A8", "seeds", "limit = 5\nseeds", "measured on 5 items only"),
        ("minmax", "W8A8", "seeds", 'split = "validation"\nseeds', "measured on the validation split"),
    ],
)
def test_anything_else_gives_the_reason(
    make: Make, method: str, precision: str, old: str, new: str, why: str
) -> None:
    found = line(make(SUITE.replace(old, new, 1)), method, precision)
    assert found.why.startswith(why)
    assert found.measured is None
    assert found.difference is None


@pytest.mark.usefixtures("imagenet")
def test_unfinished_cells_are_no_measurement(make: Make) -> None:
    table = make(leave_out=lambda cell: cell.method == "minmax" and cell.seed == 1)
    assert line(table, "minmax").why == "not measured: missing"
    assert line(table, "fp32", "FP32", "FQ-ViT").why == ""


def test_other_data_and_other_weights(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODELS.get("toy"), "checkpoint", VIT_B)
    of_methods_here = {
        found.why for found in make().shown if found.source in ("FQ-ViT README", "RepQ-ViT README")
    }
    assert of_methods_here == {"other data: ImageNet-1k, here toy_task"}
    others = {found.why for found in make().shown if found.method == "apq_vit"}
    assert others == {"no method here is this one"}
    monkeypatch.setattr(MODELS.get("toy"), "checkpoint", "facebook/opt-125m")
    whys = {(found.source[:5], found.method, found.why) for found in make().shown}
    assert ("optim", "quanto", "another method: quanto's own calibration") in whys
    assert ("arXiv", "minmax", "other weights: trained from scratch by the authors") in whys
    assert all(found.difference is None for found in make().shown)


def test_a_model_without_counterparts_is_named(make: Make) -> None:
    table = make()
    assert table.shown == []
    assert len(table.lines) == len(published_values())
    assert "toy: no published value of its weights is known." in table.notes
    assert any("56 of FQ-ViT README" in note for note in table.notes)


@pytest.mark.usefixtures("imagenet")
def test_forms_say_the_same(make: Make, tmp_path: Path) -> None:
    table = make()
    minmax = line(table, "minmax")
    difference = f"{minmax.difference:+.2f}"
    for text in (
        published_markdown(table),
        published_terminal(table, 80),
        published_latex(table, "tab:x"),
    ):
        assert difference in text
        assert "23.64 (60.89)" in text
        assert "calibrated on 32 images" in text
    latex = published_latex(table, "tab:x")
    assert latex.count("{") - latex.count("\\{") == latex.count("}") - latex.count("\\}")
    assert not re.search(r"(?<!\\)[_%#&]", latex.partition("\\caption")[2].partition("\\label")[0])
    frame = published_frame(table)
    assert len(frame) == len(published_values())
    assert frame["difference"].notna().sum() == sum(found.why == "" for found in table.lines)
    if shutil.which("pdflatex"):
        head = "\\documentclass{article}\\usepackage{booktabs,longtable}\\begin{document}"
        (tmp_path / "t.tex").write_text(f"{head}{latex}\\end{{document}}")
        command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t.tex"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stdout[-2000:]


def test_the_command_prints_and_writes_it(suite_file: str, store: Store) -> None:
    arguments = ["table", "--published", "--suite", suite_file, "--results", str(store.root)]
    refused = CliRunner().invoke(cli, arguments)
    assert refused.exit_code == 2
    shown = CliRunner().invoke(cli, [*arguments, "--allow-partial", "--format", "json"])
    assert shown.exit_code == 0
    assert json.loads(shown.stdout) == json.loads((store.root / "tables" / "toys-published.json").read_text())
    assert len(json.loads(shown.stdout)) == len(published_values())


def test_a_declared_checkpoint_has_a_task_to_compare_on() -> None:
    known = {value.model: value.data for value in published_values() if value.setting is not None}
    for name in MODELS.names():
        entry = MODELS.get(name)
        if entry.checkpoint in known:
            assert TASKS.get(entry.task).benchmark == known[entry.checkpoint], name


@pytest.mark.parametrize(
    ("name", "source"),
    [("published_fq_vit", "FQ-ViT README"), ("published_ptq4vit", "PTQ4ViT README")],
)
def test_a_suite_in_a_tables_own_setting_has_a_cell_for_each_of_its_values(
    name: str, source: str, store: Store
) -> None:
    suite = load_suite(name)
    for cell in expand(suite):
        result = Result("accuracy", True, 80.0, FP32, None, FP32 - 80.0, 0.0, 0.0, 40)
        store.save(Record(cell, "done", "2026-01-01T00:00:00+00:00", 1.0, result))
    shown = [line for line in make_published_table(collect_rows(store, suite)).shown if line.source == source]
    assert {line.cell_model for line in shown} == set(suite.models)
    assert [line.why for line in shown if line.measured is None] == []
    methods = {cell.method for cell in expand(suite)}
    assert {line.method for line in shown} == methods
