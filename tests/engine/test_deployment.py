"""Cells exported by the command, and their integer models measured; rows are kept one by one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner, Result

from benchmark.cli import cli
from benchmark.deployment.deployed import DOCUMENT, Deployment
from benchmark.deployment.views import HEADS, figure, table, to_latex, to_markdown
from benchmark.engine.runner import CellRunner, Settings
from benchmark.grid.cells import Cell
from benchmark.grid.expand import expand
from benchmark.grid.suite import MethodSpec, Suite
from benchmark.keep.store import Store
from benchmark.report.canvas import rendered, style
from quanttune.errors import ConfigError


@pytest.fixture
def measured(store: Store, suite: Suite) -> list[Cell]:
    cells = expand(dataclasses.replace(suite, methods=(MethodSpec("fp32"), MethodSpec("minmax"))))
    runner = CellRunner(Settings(store.root), lambda *_: None)
    for cell in cells:
        assert runner.run(cell).status == "done"
    return cells


def run(store: Store, *words: str) -> Result:
    return CliRunner().invoke(cli, [*words, "--results", str(store.root)])


def test_a_cell_is_exported_with_what_it_is(store: Store, measured: list[Cell], tmp_path: Path) -> None:
    cell = next(each for each in measured if each.scheme_text == "W8A8")
    path = tmp_path / "toy.onnx"
    done = run(store, "export", cell.cell_id[:16], "--output", str(path), "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["cell_id"] == cell.cell_id
    assert told["bytes"] == path.stat().st_size
    said = {prop.key: prop.value for prop in onnx.load(path).metadata_props}
    assert said["quanttune.cell"] == cell.cell_id
    assert said["quanttune.method"] == "minmax"
    assert said["quanttune.licence"] == "unknown"
    again = run(store, "export", cell.cell_id[:16], "--from", str(path), "--output", str(tmp_path / "b.onnx"))
    assert again.exit_code == 0, again.output
    # The weights of the other cell are of another width.
    other = next(each for each in measured if each.scheme_text == "W4A4")
    refused = run(
        store, "export", other.cell_id[:16], "--from", str(path), "--output", str(tmp_path / "c.onnx")
    )
    assert refused.exit_code == 2
    assert "need an export of their own" in refused.stderr


def test_export_says_what_is_missing_in_one_line(store: Store, measured: list[Cell], tmp_path: Path) -> None:
    path = str(tmp_path / "toy.onnx")
    for words, told in (
        ((), "name one cell"),
        (("0000",), "no finished cell"),
        (("--model", "toy", "--method", "nosuch"), "nosuch"),
    ):
        done = run(store, "export", *words, "--output", path)
        assert done.exit_code == 2
        assert told in done.stderr
        assert done.stderr.count("\n") == 1
    assert not list(tmp_path.glob("*.onnx"))


def test_rows_are_measured_once_and_shown(store: Store, measured: list[Cell], tmp_path: Path) -> None:
    said: list[str] = []
    first = Deployment(store, tmp_path, said.append)
    rows = first.measure(measured, ("accuracy", "latency"))
    assert [row["method"] for row in rows] == ["fp32", "minmax", "minmax", "onnxruntime static"]
    for row in rows:
        assert "error" not in row, row
        assert len(row["latency"]) == 4
        assert row["accuracy"]["n"] == 40
        assert row["peak_mib"] >= 0
    fp32, wide, *_ = rows
    assert fp32["accuracy"]["equal_predictions"] == 100
    assert fp32["integer_kernels"] == 0
    assert wide["integer_kernels"] == 3
    assert wide["accuracy"]["equal_predictions"] >= 97.5
    assert len(said) == 4
    again = Deployment(store, tmp_path, said.append)
    assert (
        again.measure(measured, ("accuracy", "latency"))
        == json.loads((tmp_path / DOCUMENT).read_text())["rows"]
    )
    assert len(said) == 4
    assert len(table(rows)[0]) == len(HEADS)
    assert to_markdown(rows).count("\n") == len(rows) + 2
    assert to_latex(rows).count(r"\\") == len(rows) + 1
    with style():
        assert rendered(figure(rows), "png").startswith(b"\x89PNG")
    show = ("deploy", "--show", "--output", str(tmp_path), "--format", "json")
    for words, count in (
        ((), 4),
        (("--precision", "W4*"), 2),
        (("--precision", "w4*"), 2),
        (("--method", "minmax"), 3),
    ):
        assert len(json.loads(run(store, *show, *words).stdout)) == count, words
    refused = run(store, *show, "--model", "x")
    assert refused.exit_code == 2
    assert "no row of" in refused.stderr
    idle = run(store, *show, "--again", "--part", "accuracy")
    assert idle.exit_code == 2
    assert "--show measures nothing; leave out --part and --again" in idle.stderr


def test_what_cannot_be_measured_is_said(
    store: Store, measured: list[Cell], suite: Suite, tmp_path: Path
) -> None:
    deployment = Deployment(store, tmp_path / "deployed", lambda _: None)
    with pytest.raises(ConfigError, match="no fp32 cell"):
        deployment.measure([cell for cell in measured if not cell.is_reference], ("accuracy",))
    assert not list((tmp_path / "deployed").iterdir())
    absent = expand(dataclasses.replace(suite, methods=(MethodSpec("fp32"), MethodSpec("mse"))))
    rows = deployment.measure(absent, ("accuracy",))
    assert ["error" in row for row in rows] == [False, True, True, False]
    assert "not measured yet" in rows[1]["error"]
    assert table(rows)[1][3] == "refused"
