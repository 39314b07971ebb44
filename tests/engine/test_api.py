"""The suite from Python: the same cells, numbers and refusals as from the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import benchmark
from benchmark.cli import cli
from benchmark.engine.plan import Plan, Request, make_plan
from benchmark.engine.runner import CellRunner, Outcome, Settings
from benchmark.grid.cells import Cell
from benchmark.grid.expand import Selection, expand
from benchmark.grid.suite import load_suite
from benchmark.keep.status import status_of
from benchmark.keep.store import Store
from benchmark.report.rows import COST_FIELDS, NOISE_FIELDS, ROW_FIELDS, collect_rows
from quanttune.errors import ConfigError, UnknownNameError


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return tmp_path / "results"


def run(suite: str, results: Path, **more: Any) -> list[Outcome]:
    return list(benchmark.run(suite, results=results, track=False, **more))


def test_outcomes_come_once_a_cell_and_are_kept(suite_file: str, results: Path) -> None:
    cells = expand(load_suite(suite_file))
    first = run(suite_file, results)
    assert [outcome.cell for outcome in first] == cells
    assert {outcome.status for outcome in first} == {"done"}
    again = run(suite_file, results)
    assert [outcome.cell for outcome in again] == cells
    assert {outcome.status for outcome in again} == {"cached"}
    assert [outcome.value for outcome in again] == [outcome.value for outcome in first]


def test_work_is_done_as_outcomes_are_taken(suite_file: str, results: Path) -> None:
    outcomes = benchmark.run(suite_file, results=results, track=False)
    assert not results.exists()
    next(outcomes)
    assert len(list(Store(results).records())) == 1
    outcomes.close()
    assert len(list(Store(results).records())) == 1
    statuses = [outcome.status for outcome in run(suite_file, results)]
    assert statuses == ["done"] * 4 + ["cached"]  # what was kept comes last


def test_the_frame_has_a_line_for_each_cell(suite_file: str, results: Path) -> None:
    run(suite_file, results, methods="minmax")
    with pytest.raises(ConfigError, match="2 of 5 cells"):
        benchmark.table(suite_file, results=results)
    frame = benchmark.table(suite_file, results=str(results), allow_partial=True)
    assert tuple(frame.columns) == (*ROW_FIELDS, *NOISE_FIELDS, *COST_FIELDS)
    assert len(frame) == 5
    assert list(frame[frame["method"] == "minmax"]["status"]) == ["done", "done"]
    assert set(frame[frame["method"] != "minmax"]["status"]) == {"missing"}


def test_one_text_is_as_good_as_a_sequence_of_one(suite_file: str, results: Path) -> None:
    outcomes = run(suite_file, results, models="toy", methods="minmax", precisions="W6A6", seeds=3)
    assert [(one.cell.method, one.cell.precision, one.cell.seed) for one in outcomes] == [
        ("minmax", "W6A6", 3)
    ]


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"methods": ["minmux"]}, UnknownNameError, "did you mean minmax"),
        ({"executor": "locl"}, UnknownNameError, "did you mean local"),
        ({"overwrite": "sometimes"}, UnknownNameError, "sometimes"),
        ({"jobs": 0}, ConfigError, "--jobs 0"),
        ({"threads": -1}, ConfigError, "--threads -1"),
        ({"limit": 0}, ConfigError, "--limit 0"),
        ({"jobs": 3, "executor": "serial"}, ConfigError, "one cell at a time"),
    ],
)
def test_a_bad_request_is_refused_at_once(
    given: dict[str, Any], error: type[Exception], words: str, suite_file: str, results: Path
) -> None:
    with pytest.raises(error, match=words):
        benchmark.run(suite_file, results=results, **given)
    assert not results.exists()


class Recorder(benchmark.Events):
    def __init__(self) -> None:
        self.told: list[str] = []

    def begin(self, cells: Sequence[Cell], plan: Plan) -> None:
        self.told.append(f"begin {len(cells)} {plan.executor}")

    def started(self, worker: int, cell: Cell) -> None:
        self.told.append(f"started {cell.method}")

    def finished(self, outcome: Outcome) -> None:
        self.told.append(f"finished {outcome.status}")

    def end(self, status: str) -> None:
        self.told.append(f"end {status}")


def test_events_tell_what_goes_on(suite_file: str, results: Path) -> None:
    events = Recorder()
    run(suite_file, results, methods=["fp32"], events=events)
    assert events.told == ["begin 1 serial", "started fp32", "finished done", "end FINISHED"]
    events.told.clear()
    run(suite_file, results, methods=["fp32"], events=events)
    assert events.told == []  # nothing ran


def test_stopping_is_told(suite_file: str, results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = Recorder()
    outcomes = benchmark.run(suite_file, results=results, track=False, events=events)
    next(outcomes)
    outcomes.close()
    assert events.told[-1] == "end KILLED"

    def broken(*_: Any) -> Any:
        raise RuntimeError("the executor broke")

    monkeypatch.setattr(CellRunner, "run", broken)
    with pytest.raises(RuntimeError, match="broke"):
        run(suite_file, results, events=events)
    assert events.told[-1] == "end FAILED"


def test_python_and_the_command_line_keep_the_same_bytes(suite_file: str, tmp_path: Path) -> None:
    run(suite_file, tmp_path / "python")
    arguments = ["--all", "--suite", suite_file, "--results", str(tmp_path / "shell"), "--no-tracking"]
    assert CliRunner().invoke(cli, ["run", *arguments]).exit_code == 0
    one, other = (
        {path.name: path.read_bytes() for path in (tmp_path / folder / "cells").glob("*.safetensors")}
        for folder in ("python", "shell")
    )
    assert len(one) == 9  # items of five cells, quantized models of four
    assert one == other


def test_a_plan_says_what_it_will_do(suite_file: str, results: Path) -> None:
    plan = make_plan(Request(suite_file), Settings(results))
    assert (plan.executor, plan.jobs, len(plan.cells)) == ("serial", 1, 5)
    assert make_plan(Request(suite_file), Settings(results), jobs=2).executor == "local"
    assert plan.known() == {}
    assert not results.exists()


def test_the_command_spreads_over_the_cores(
    suite_file: str, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmark.engine.environment.MOST_JOBS", 4)
    for cores, given, expected in (
        (8, {}, ("local", 4)),
        (2, {}, ("local", 2)),
        (1, {}, ("serial", 1)),
        (8, {"threads": 4}, ("local", 2)),
        (8, {"device": "cuda"}, ("serial", 1)),
        (8, {"processes": 2}, ("serial", 1)),
    ):
        monkeypatch.setattr("os.cpu_count", lambda cores=cores: cores)
        plan = make_plan(Request(suite_file), Settings(results, **given), spread=True)
        assert (plan.executor, plan.jobs) == expected
    one = Selection(methods=("minmax",), precisions=("W8A8",))
    plan = make_plan(Request(suite_file, one), Settings(results), spread=True)
    assert (plan.executor, plan.jobs) == ("serial", 1)


def test_one_answer_to_what_the_store_says(suite_file: str, store: Store, cells: list[Cell]) -> None:
    runner = CellRunner(Settings(store.root), lambda *_: None)
    runner.run(cells[0])
    store.save_failure(cells[1], {"error": "two\nlines", "traceback": ""})
    (store.root / "locks" / f"{cells[2].cell_id}.lock").touch()
    found = [status_of(store, cell) for cell in cells[:4]]
    assert [status.word for status in found] == ["done", "failed", "interrupted", "missing"]
    assert [status.finished for status in found] == [True, False, False, False]
    assert found[1].message == "two\nlines"
    assert status_of(store, cells[2], held=True).word == "missing"
    rows = collect_rows(store, load_suite(suite_file), allow_partial=True).to_json()
    assert [row["status"] for row in rows[:4]] == [status.word for status in found]
    listed = CliRunner().invoke(cli, ["list", "cells", "--suite", suite_file, "--results", str(store.root)])
    words = [line.split()[6] for line in listed.stdout.splitlines()[2:6]]
    assert words == ["cached", "failed", "interrupted", "missing"]
