"""The command line: one clear line and the right exit code for every request, good or bad."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from benchmark.cli import cli
from benchmark.engine.runner import CellRunner
from benchmark.grid.suite import suite_names
from benchmark.keep.record import SCHEMA
from benchmark.keep.store import Store
from benchmark.report.rows import COST_FIELDS, NOISE_FIELDS, ROW_FIELDS


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return tmp_path / "results"


@pytest.fixture
def call(results: Path) -> Any:
    def run(*arguments: str, folder: Path = results) -> Result:
        extra = () if arguments[0] in ("fetch",) else ("--results", str(folder))
        return CliRunner().invoke(cli, [*arguments, *extra])

    return run


@pytest.fixture
def ran(call: Any, suite_file: str) -> str:
    result = call("run", "--all", "--suite", suite_file, "--no-tracking")
    assert result.exit_code == 0, result.output
    return suite_file


def test_run_twice(call: Any, ran: str, results: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (results / "cells").iterdir()}
    result = call("run", "--all", "--suite", ran)
    assert result.exit_code == 0
    assert "5 cells: 5 cached" in result.stdout
    assert before == {path: path.stat().st_mtime_ns for path in (results / "cells").iterdir()}
    assert not (results / "mlflow.db").exists()  # nothing to log


def test_dry_run_and_list_show_a_status_for_each_cell(call: Any, ran: str) -> None:
    result = call("run", "--all", "--suite", ran, "--dry-run")
    assert result.exit_code == 0
    assert result.stdout.count("cached") == 5
    rows = json.loads(call("list", "cells", "--suite", ran, "--json").stdout)
    assert {row["status"] for row in rows} == {"cached"}


def test_dry_run_writes_nothing(call: Any, suite_file: str, results: Path) -> None:
    result = call("run", "--all", "--suite", suite_file, "--dry-run")
    assert result.exit_code == 0
    assert result.stdout.count("missing") == 5
    assert not results.exists()


def test_show_prints_the_record(call: Any, ran: str) -> None:
    (row, *_) = json.loads(call("list", "cells", "--suite", ran, "--json").stdout)
    record = json.loads(call("show", row["cell_id"][:16]).stdout)
    assert record["cell_id"] == row["cell_id"]


def test_json_rows_have_the_promised_fields(call: Any, ran: str) -> None:
    result = call("table", "--suite", ran, "--format", "json")
    rows = json.loads(result.stdout)
    assert len(rows) == 5
    assert all(tuple(row) == (*ROW_FIELDS, *NOISE_FIELDS, *COST_FIELDS) for row in rows)
    assert {row["status"] for row in rows} == {"done"}
    assert all(row["drop"] == pytest.approx(row["fp32"] - row["value"]) for row in rows)


@pytest.mark.parametrize(
    ("form", "ending"), [("latex", "tex"), ("markdown", "md"), ("csv", "csv"), ("json", "json")]
)
def test_tables_are_written(call: Any, ran: str, results: Path, form: str, ending: str) -> None:
    result = call("table", "--suite", ran, "--format", form)
    assert result.exit_code == 0
    assert (results / "tables" / f"toys.{ending}").read_text() == result.stdout


def test_a_partial_table_is_refused_unless_allowed(call: Any, suite_file: str) -> None:
    call("run", "--method", "minmax", "--suite", suite_file, "--no-tracking")
    refused = call("table", "--suite", suite_file)
    assert refused.exit_code == 2
    assert "2 of 5 cells" in refused.stderr
    allowed = call("table", "--suite", suite_file, "--allow-partial")
    assert allowed.exit_code == 0
    assert "2 of 5 cells" in allowed.stdout
    assert "missing" in allowed.stdout
    assert "2 of 5 cells" in allowed.stderr


def test_limited_cells_are_refused_by_tables(call: Any, suite_file: str) -> None:
    assert call("run", "--all", "--limit", "7", "--suite", suite_file, "--no-tracking").exit_code == 0
    refused = call("table", "--suite", suite_file)
    assert refused.exit_code == 2
    assert "0 of 5 cells" in refused.stderr
    assert "5 measured with --limit are not used" in refused.stderr


def test_a_failed_cell_fails_the_run(call: Any, tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(
        'models = ["toy"]\nprecisions = ["W8A8"]\ncalibration_items = 8\n'
        'methods = [{name = "toy_breaks"}, {name = "minmax"}]'
    )
    result = call("run", "--all", "--suite", str(path), "--no-tracking")
    assert result.exit_code == 1
    assert "2 cells: 1 done, 1 failed" in result.stdout
    assert "no range for site 3" in result.stderr
    kept = call("run", "--all", "--suite", str(path), "--no-tracking", "--overwrite", "never")
    assert kept.exit_code == 1
    assert "1 cached, 1 failed" in kept.stdout


def test_skipped_cells_are_no_failure(call: Any, tmp_path: Path) -> None:
    path = tmp_path / "skip.toml"
    path.write_text(
        'models = ["toy"]\nprecisions = ["W8A8"]\ncalibration_items = 8\n'
        'methods = [{name = "toy_declines"}, {name = "fp32"}]'
    )
    result = call("run", "--all", "--suite", str(path), "--no-tracking")
    assert result.exit_code == 0
    assert "1 done, 1 skipped" in result.stdout
    assert "no softmax" in result.stderr
    assert "n/a" in call("table", "--suite", str(path)).stdout


def test_ctrl_c_keeps_what_is_done_and_says_how_to_go_on(
    call: Any, suite_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, calls = CellRunner._measure, []

    def stopped(self: CellRunner, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(self, *arguments)

    monkeypatch.setattr(CellRunner, "_measure", stopped)
    result = call("run", "--all", "--suite", suite_file, "--no-tracking")
    assert result.exit_code == 130
    assert "2 of 5 cells are kept; go on with" in result.stderr
    statuses = [
        row["status"] for row in json.loads(call("list", "cells", "--suite", suite_file, "--json").stdout)
    ]
    assert statuses == ["cached", "cached", "interrupted", "missing", "missing"]
    assert "3 done" in call("run", "--all", "--suite", suite_file, "--no-tracking").stdout


def test_a_changed_reference_is_noticed_within_one_run(
    call: Any, ran: str, results: Path, toy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in (results / "stages" / "reference").iterdir():
        path.unlink()
    next((results / "cells").glob("*.json")).unlink()
    monkeypatch.setattr(toy, "weight", 2.0)
    result = call("run", "--all", "--suite", ran, "--no-tracking")
    assert result.exit_code == 0
    assert "5 cells: 5 done" in result.stdout


def test_so_is_one_that_a_skipped_cell_was_measured_on(
    call: Any, results: Path, tmp_path: Path, toy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found: the run ended with a complaint that its folder had been removed."""
    path = tmp_path / "skips.toml"
    path.write_text(
        'models = ["toy"]\nprecisions = ["W8A8", "W4A4"]\ncalibration_items = 8\n'
        'methods = [{name = "fp32"}, {name = "minmax"}, {name = "toy_declines"}]\n'
    )
    words = ("run", "--all", "--suite", str(path), "--no-tracking", "--results", str(results))
    first = call(*words)
    assert first.exit_code == 0, first.stderr
    for stage in (results / "stages" / "reference").iterdir():
        stage.unlink()
    store = Store(results)
    lost = next(record for record in store.records() if record.cell.method == "minmax")
    (results / "cells" / f"{lost.cell.cell_id}.json").unlink()
    monkeypatch.setattr(toy, "weight", 2.0)
    again = call(*words)
    assert again.exit_code == 0, again.stderr
    assert all(store.load(record.cell) is not None for record in store.records())


def test_the_table_of_a_run_is_of_what_ran(call: Any, results: Path, suite_file: str) -> None:
    """Found: two profiles of a suite of one were averaged and called by its name."""
    words = ("run", "--method", "minmax", "--suite", suite_file, "--no-tracking", "--results", str(results))
    both = call(*words, "--precision", "W8A8", "--profile", "full", "--profile", "matmul").stdout
    assert "profile full, matmul" in " ".join(both.split())
    assert all(word in both for word in ("W8A8 full", "W8A8 matmul"))
    one = " ".join(call(*words, "--precision", "W8A8", "--profile", "matmul", "--seed", "3").stdout.split())
    assert "profile matmul" in one
    assert "seed 3." in one


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run"], "nothing is selected"),
        (["run", "--all", "--suite", "smoky"], "did you mean smoke"),
        (["run", "--model", "toyy", "--suite", "SUITE"], "did you mean toy"),
        (["run", "--method", "minmux", "--suite", "SUITE"], "did you mean minmax"),
        (["run", "--method", "x*", "--suite", "SUITE"], "x*"),
        (["run", "--precision", "W0A8", "--suite", "SUITE"], "W0A8"),
        (["run", "--precision", "W-8A8", "--suite", "SUITE"], "W-8A8"),
        (["run", "--profile", "ful", "--suite", "SUITE"], "did you mean full"),
        (["run", "--all", "--limit", "-3", "--suite", "SUITE"], "--limit -3"),
        (["run", "--all", "--limit", "many", "--suite", "SUITE"], "many"),
        (["run", "--all", "--jobs", "0", "--suite", "SUITE"], "--jobs 0"),
        (["run", "--all", "--executor", "locl", "--suite", "SUITE"], "did you mean local"),
        (["run", "--all", "--executor", "serial", "--jobs", "3", "--suite", "SUITE"], "one cell at a time"),
        (["run", "--all", "--device", "tpu9000", "--suite", "SUITE"], "tpu9000"),
        (["run", "--all", "--overwrite", "maybe", "--suite", "SUITE"], "maybe"),
        (["run", "--al", "--suite", "SUITE"], "--all"),
        (["rn"], "did you mean run"),
        (["list", "cell"], "cell"),
        (["table", "--suite", "SUITE"], "0 of 5"),
        (["table", "--format", "word"], "word"),
        (["show", "nothex"], "hexadecimal"),
        (["show", "abcdef"], "no finished cell"),
        (["ui", "--port", "0"], "--port 0"),
        (["ui"], "mlflow.db"),
    ],
)
def test_bad_requests_get_one_line_and_exit_2(
    call: Any, suite_file: str, results: Path, arguments: list[str], words: str
) -> None:
    result = call(*(suite_file if argument == "SUITE" else argument for argument in arguments))
    assert result.exit_code == 2
    assert words in result.stderr
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.strip().splitlines()) == 1
    assert not results.exists()


def test_a_newer_folder_is_refused(call: Any, ran: str, results: Path) -> None:
    (results / "store.json").write_text(json.dumps({"schema": SCHEMA + 1}))
    for arguments in (["run", "--all", "--suite", ran], ["table", "--suite", ran], ["show", "ab"]):
        result = call(*arguments)
        assert result.exit_code == 2
        assert "upgrade" in result.stderr


def test_a_file_as_results_folder_is_refused(call: Any, suite_file: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = call("run", "--all", "--suite", suite_file, folder=tmp_path / "file")
    assert result.exit_code == 2
    assert "not a results folder" in result.stderr


def test_no_command_shows_help() -> None:
    result = CliRunner().invoke(cli, [])
    assert result.exit_code == 2
    assert "run" in result.output
    assert CliRunner().invoke(cli, ["--help"]).exit_code == 0


@pytest.mark.parametrize("kind", ["suites", "models", "methods", "tasks", "metrics", "figures", "executors"])
def test_lists(kind: str) -> None:
    plain = CliRunner().invoke(cli, ["list", kind])
    assert plain.exit_code == 0, plain.output
    rows = json.loads(CliRunner().invoke(cli, ["list", kind, "--json"]).stdout)
    assert rows
    names = [row[kind.removesuffix("s")] for row in rows]
    assert names == sorted(names)
    if kind == "suites":
        assert names == suite_names()


def test_fetch_of_random_models_is_nothing(suite_file: str) -> None:
    result = CliRunner().invoke(cli, ["fetch", "--suite", suite_file])
    assert result.exit_code == 0
    assert "nothing to fetch" in result.stdout


def test_a_report_of_all_holds_suites_of_one_s_own_that_are_named(
    call: Any, ran: str, results: Path, tmp_path: Path
) -> None:
    alone = call("report", "--all")
    assert alone.exit_code == 2
    assert "no suite has results" in alone.stderr
    part = tmp_path / "part.toml"
    part.write_text(Path(ran).read_text().replace('"W8A8", "W4A4"', '"W4A4"'))
    shown = call("report", "--all", "--suite", ran, "--suite", str(part), "--suite", ran)
    assert shown.exit_code == 0, shown.output
    folder = results / "report" / "all"
    assert shown.stdout.strip() == str(folder / "index.html")
    assert {page.stem for page in (folder / "suites").glob("*.html")} == {"toys", "part"}
    several = call("report", "--suite", str(part), "--suite", ran)
    assert several.stdout == shown.stdout
    one = call("report", "--suite", ran)
    assert one.stdout.strip() == str(results / "report" / "toys" / "index.html")
    namesake = tmp_path / "other" / "toys.toml"
    namesake.parent.mkdir()
    namesake.write_text(part.read_text())
    twice = call("report", "--suite", ran, "--suite", str(namesake))
    assert twice.exit_code == 2
    assert "two suites are called toys" in twice.stderr
    unknown = call("report", "--all", "--suite", "nothing")
    assert unknown.exit_code == 2
    assert "nothing" in unknown.stderr
