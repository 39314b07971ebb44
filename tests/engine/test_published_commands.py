"""Commands on published results: what can be read of them is, and nothing is written into them."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import benchmark
from benchmark import components
from benchmark.cli import cli
from benchmark.engine.runner import CellRunner, Settings
from benchmark.grid.expand import Selection, expand
from benchmark.grid.suite import load_suite
from benchmark.keep.publishing import publish
from benchmark.keep.reference_store import ReferenceStore
from benchmark.keep.store import Store
from benchmark.report.rows import collect_rows
from quanttune.errors import ConfigError, QuantTuneError
from tests.engine.conftest import SUITE

METHOD = """
from baselines.method import METHODS
from baselines.minmax import MinMax

@METHODS.register("mine")
class Mine(MinMax):
    name = "mine"
    version = "1"
"""


def call(*arguments: Any) -> Result:
    return CliRunner().invoke(cli, [str(each) for each in arguments])


@pytest.fixture
def own(suite_file: str, tmp_path: Path) -> Store:
    runner = CellRunner(Settings(tmp_path / "own"), lambda *_: None)
    for cell in expand(load_suite(suite_file)):
        assert runner.run(cell).status == "done"
    return Store(tmp_path / "own")


@pytest.fixture
def folder(own: Store, suite_file: str, tmp_path: Path) -> Path:
    records = {load_suite(suite_file).name: own.records()}
    publish(tmp_path / "published", records, lambda _, cell_id: own.items(cell_id))
    return tmp_path / "published"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("run", "--suite", "SUITE", "--method", "omse", "--no-tracking", "--jobs", 1), "measured into"),
        (("sync",), "logged to MLflow"),
        (("ui",), "logged to MLflow"),
    ],
)
def test_nothing_is_written_into_them(
    folder: Path, suite_file: str, command: tuple[Any, ...], message: str
) -> None:
    before = contents(folder)
    given = [suite_file if part == "SUITE" else part for part in command]
    done = call(*given, "--results", folder)
    assert done.exit_code == 2
    assert f"holds published results and cannot be {message}" in done.output
    assert contents(folder) == before
    assert sorted(path.name for path in folder.iterdir()) == sorted(before)


def test_reference_is_the_published_folder_for_a_run_too(
    tmp_path: Path, folder: Path, suite_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found: ``run --results reference`` measured into a new folder, which hid the published one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("benchmark.keep.reference_store.reference_folder", lambda: folder)
    arguments = ("--suite", suite_file, "--results", "reference", "--no-tracking", "--jobs", 1)
    done = call("run", "--all", *arguments)
    assert done.exit_code == 0, done.output
    assert "5 cached" in done.output
    assert call("run", "--method", "omse", *arguments).exit_code == 2
    outcomes = benchmark.run(suite_file, results="reference", track=False)
    assert {outcome.status for outcome in outcomes} == {"cached"}
    assert not (tmp_path / "reference").exists()


def test_a_suite_is_published_from_published_results_with_its_own_arrays(
    folder: Path, own: Store, suite_file: str, tmp_path: Path
) -> None:
    """Found: records of one machine went with the predictions of another."""
    name = load_suite(suite_file).name
    records = [record for record in own.records()]
    other = tmp_path / "second.toml"
    other.write_text(SUITE)
    turned = {
        record.cell.cell_id: {key: array[::-1] for key, array in own.items(record.cell.cell_id).items()}
        for record in records
    }
    moved = [
        replace(
            record, reference_digest="b" * 64, items_sha256="c" * 64, result=replace(record.result, value=1.0)
        )
        for record in records
        if record.result is not None
    ]
    publish(folder, {"second": moved}, lambda _, cell_id: turned[cell_id])
    again = tmp_path / "again"
    done = call("publish", "--suite", suite_file, "--suite", other, "--results", folder, "--to", again)
    assert done.exit_code == 0, done.output
    before, after = ReferenceStore(folder), ReferenceStore(again)
    for suite in (name, "second"):
        for record in before.of_suite(suite).records():
            cell_id = record.cell.cell_id
            kept = after.of_suite(suite)
            assert kept.find(cell_id) == record
            for key, array in before.of_suite(suite).items(cell_id).items():
                assert (kept.items(cell_id)[key] == array).all()
    cell_id = records[0].cell.cell_id
    told = call("show", cell_id[:12], "--suite", "second", "--results", again)
    assert json.loads(told.stdout)["reference_digest"] == "b" * 64
    assert f"--suite {name}" in told.stderr
    assert call("show", cell_id[:12], "--suite", "third", "--results", again).exit_code == 2


def test_two_suites_of_one_name_are_not_published(suite_file: str, own: Store, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    same = tmp_path / "elsewhere" / Path(suite_file).name
    same.write_text(SUITE)
    done = call(
        "publish", "--suite", suite_file, "--suite", same, "--results", own.root, "--to", tmp_path / "to"
    )
    assert done.exit_code == 2
    assert "two suites have the name" in done.output


def test_a_method_of_the_user_has_its_row_beside_the_others(
    own: Store, suite_file: str, tmp_path: Path
) -> None:
    """Found: the page on adding a row led to a table without it."""
    path = tmp_path / "mine.py"
    path.write_text(METHOD)
    files = components.include(path)
    try:
        suite = load_suite(suite_file)
        assert len(collect_rows(own, suite).cells) == 5
        runner = CellRunner(Settings(own.root, includes=files), lambda *_: None)
        for cell in expand(suite, Selection(methods=("mine",))):
            runner.run(cell)
        assert [cell.method for cell in collect_rows(own, suite).cells][5:] == ["mine", "mine"]
    finally:
        components.forget(files)
    assert len(collect_rows(own, load_suite(suite_file)).cells) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"jobs": "2"}, "--jobs 2: it must be a whole number"),
        ({"threads": 1.5}, "--threads 1.5: it must be a whole number"),
        ({"threads": None}, "--threads None: it must be a whole number"),
        ({"device": None}, "--device None: give cpu or cuda"),
        ({"results": None}, "results = None: give a name or a path"),
        ({"suite": 3}, "suite = 3: give a name or a path"),
    ],
)
def test_python_is_told_what_is_wrong_at_once(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        benchmark.run(**arguments)


def test_a_model_is_a_name() -> None:
    with pytest.raises(QuantTuneError, match="model = 3: give a model's name"):
        benchmark.reference(3)  # type: ignore[arg-type]


def test_a_cell_is_exported_by_one_name() -> None:
    done = call("export", "4b2d", "--model", "tiny_bert", "--output", "a.onnx")
    assert done.exit_code == 2
    assert "name one cell" in done.output


def test_deployment_of_nothing_says_so(tmp_path: Path) -> None:
    done = call("deploy", "--show", "--results", tmp_path / "none")
    assert done.exit_code == 2
    assert "nothing is measured" in done.output
    assert not (tmp_path / "none").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_behind_standard_output_is_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "benchmark", "list"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 2
    assert done.stderr.strip() == "error: No space left on device: nothing more can be written there"
