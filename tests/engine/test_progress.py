"""What a person sees of a run."""

from __future__ import annotations

import dataclasses

import pytest

from benchmark.engine.progress import Display, Estimator, duration_text, outcome_line
from benchmark.engine.runner import Outcome
from benchmark.grid.cells import Cell


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.4, "59 s"), (60, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


def test_the_estimate_learns_first_and_later_cells_apart(cells: list[Cell]) -> None:
    estimator = Estimator()
    assert estimator.seconds(cells) is None
    minmax = [cell for cell in cells if cell.method == "minmax"]
    mse = [cell for cell in cells if cell.method == "mse"]
    estimator.add(Outcome(minmax[0], "done", seconds=100.0))
    estimator.add(Outcome(minmax[1], "done", seconds=2.0))
    assert estimator.seconds([]) == 0.0
    assert estimator.seconds(mse) == pytest.approx(102.0)


def test_plain_lines_without_a_terminal(cells: list[Cell], capsys: pytest.CaptureFixture[str]) -> None:
    with Display(cells, 1) as display:
        for cell in cells:
            display.started(0, cell)
            display.stage(0, "statistics", 1, 4)
            display.finished(Outcome(cell, "done", seconds=10.0, value=70.0, drop=5.0))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5
    assert lines[0].startswith("[1/5] done")
    assert "left" in lines[0]
    assert "left" not in lines[-1]


def test_long_stages_speak_now_and_then(
    cells: list[Cell], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("benchmark.engine.progress.time.monotonic", lambda: now[0])
    with Display(cells, 1) as display:
        display.started(0, cells[0])
        for step in range(1, 101):
            now[0] += 1.0
            display.stage(0, "tuning", step, 100)
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 4
    assert "tuning, 1 min" in lines[0]


def test_bars_draw_on_a_terminal(cells: list[Cell]) -> None:
    with Display(cells, 2, live=True) as display:
        for worker in (0, 1):
            display.started(worker, cells[worker])
            display.stage(worker, "tuning", 3, 9)
        display.finished(Outcome(cells[0], "failed", "a [bracket] in the message", 1.0))
        display.started(0, cells[2])


def test_a_line_says_what_matters(cells: list[Cell]) -> None:
    line = outcome_line(Outcome(cells[1], "done", "", 12.0, 74.7, 10.7))
    assert line == f"done     {cells[1]}  74.70  drop 10.70  12 s"
    assert "drop" not in outcome_line(Outcome(cells[0], "done", "", 1.0, 85.0, 0.0))


def test_resumed_work_is_timed_from_where_it_began(
    cells: list[Cell], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("benchmark.engine.progress.time.monotonic", lambda: now[0])
    with Display(cells, 1) as display:
        display.started(0, cells[0])
        for step in range(500, 541):  # ten seconds a step: 460 steps are 4,600 s
            display.stage(0, "tuning", step, 1000)
            now[0] += 10.0
    done, _, left = capsys.readouterr().err.splitlines()[-1].strip().partition("/1000 tuning, ")
    assert left == f"{duration_text(10.0 * (1000 - int(done)))} left"


def test_an_estimate_that_takes_long_is_made_less_often(
    cells: list[Cell], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now, made = [0.0], []

    def seconds(self: Estimator, pending: list[Cell]) -> float:
        made.append(len(pending))
        now[0] += 0.1  # as over ten thousand cells
        return 1.0 * len(pending)

    monkeypatch.setattr("benchmark.engine.progress.time.monotonic", lambda: now[0])
    monkeypatch.setattr(Estimator, "seconds", seconds)
    many = [dataclasses.replace(cells[1], seed=seed) for seed in range(100)]
    with Display(many, 1) as display:
        for cell in many:
            now[0] += 0.1
            display.finished(Outcome(cell, "done", seconds=0.1))
    assert made[0] == 99
    assert 4 <= len(made) <= 6
    # those in between say what the last estimate said
    assert sum("1 min 39 s left" in line for line in capsys.readouterr().err.splitlines()) > 10
