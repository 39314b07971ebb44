"""What a method costs is what it would take by itself, whoever made its stages."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import benchmark.keep.meter
from baselines import METHODS
from benchmark.engine.events import Events
from benchmark.engine.executors import EXECUTORS
from benchmark.engine.progress import spending_line, spent_in_all
from benchmark.engine.runner import CellRunner, Outcome, Settings
from benchmark.engine.spending import PARTS, trainings
from benchmark.grid.cells import Cell
from benchmark.keep.meter import Cost, Meter
from benchmark.keep.record import Record
from benchmark.keep.stages import Stages
from benchmark.keep.store import Store

MEGABYTE = 10**6


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A clock that stands still until it is moved."""
    now = [0.0]
    monkeypatch.setattr(benchmark.keep.meter.time, "monotonic", lambda: now[0])

    def wait(seconds: float) -> None:
        now[0] += seconds

    return wait


def made(wait: Callable[[float], None], seconds: float, *inner: Callable[[], Any]) -> Any:
    def make() -> dict[str, Tensor]:
        for each in inner:
            each()
        wait(seconds)
        return {"a": torch.zeros(1)}

    return make


def test_a_stage_counts_with_what_making_it_took(clock: Callable[[float], None], tmp_path: Path) -> None:
    for first in (True, False):
        stages = Stages(tmp_path / "stages")
        with stages.meter.work() as work:
            clock(1.0)
            for _ in range(2):  # asked for twice, counted once
                stages.tensors("statistics", {}, made(clock, 20.0))
            stages.tensors("tuning", {}, made(clock, 300.0))
        assert work.elapsed == (321.0 if first else 1.0)
        assert work.cost().seconds == 321.0
        assert work.training_seconds == 300.0
        assert work.training_elapsed == (300.0 if first else 0.0)


def test_a_stage_within_a_stage(clock: Callable[[float], None], tmp_path: Path) -> None:
    """One that was there before counts in the outer one with its own making, and so does the outer one."""

    def statistics(stages: Stages) -> Callable[[], Any]:
        return lambda: stages.tensors("statistics", {}, made(clock, 20.0))

    Stages(tmp_path / "stages").tensors("statistics", {}, made(clock, 20.0))
    for elapsed in (4.0, 0.0):
        stages = Stages(tmp_path / "stages").scoped()
        with stages.meter.work() as work:
            stages.tensors("tuning", {}, made(clock, 4.0, statistics(stages)))
        assert (work.elapsed, work.cost().seconds, work.training_seconds) == (elapsed, 24.0, 24.0)


def test_remembered_weights_keep_their_cost(clock: Callable[[float], None], tmp_path: Path) -> None:
    stages = Stages(tmp_path / "stages")
    for _ in range(3):
        with stages.meter.work() as work:
            stages.tensors("tuning", {}, made(clock, 300.0))
        assert work.cost().seconds == 300.0


def test_an_old_sidecar_without_seconds_leaves_the_cost_open(tmp_path: Path) -> None:
    stages = Stages(tmp_path / "stages")
    stages.tensors("tuning", {}, lambda: {"a": torch.zeros(1)})
    (sidecar,) = (tmp_path / "stages" / "tuning").glob("*.json")
    about = json.loads(sidecar.read_text())
    assert about["seconds"] >= 0
    for odd in (None, "soon", True):
        sidecar.write_text(json.dumps(about | {"seconds": odd, "peak_bytes": odd}))
        again = Stages(tmp_path / "stages")
        with again.meter.work() as work:
            again.tensors("tuning", {}, lambda: pytest.fail("made again"))
        assert work.cost().seconds is work.training_seconds is None


def test_an_interrupted_training_counts_from_its_beginning(
    clock: Callable[[float], None], tmp_path: Path
) -> None:
    def stopped() -> dict[str, Tensor]:
        clock(70.0)
        path = stages.checkpoint("tuning", {})
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    for _ in range(2):
        stages = Stages(tmp_path / "stages")
        with pytest.raises(KeyboardInterrupt):
            stages.tensors("tuning", {}, stopped)
    with stages.meter.work() as work:
        stages.tensors("tuning", {}, made(clock, 30.0))
    assert work.cost().seconds == 170.0
    assert work.training_elapsed == 30.0
    assert not list((tmp_path / "stages" / "unfinished").glob("*.json"))


def test_a_stage_that_starts_over_does_not_count_what_failed(
    clock: Callable[[float], None], tmp_path: Path
) -> None:
    def broken() -> dict[str, Tensor]:
        clock(70.0)
        raise ValueError("no checkpoint was written")

    stages = Stages(tmp_path / "stages")
    with pytest.raises(ValueError, match="checkpoint"):
        stages.tensors("tuning", {}, broken)
    with stages.meter.work() as work:
        stages.tensors("tuning", {}, made(clock, 30.0))
    assert work.cost().seconds == 30.0


def test_the_peak_is_that_of_the_work_or_of_a_stage_made_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peaks: list[int | None] = []
    monkeypatch.setattr(benchmark.keep.meter._ResidentPeak, "since_last", lambda self: peaks.pop(0))
    held = iter([50, 100, 60, 0, 0])
    monkeypatch.setattr(benchmark.keep.meter._ResidentPeak, "held", lambda self: next(held))

    def make() -> dict[str, Tensor]:
        return {"a": torch.zeros(1)}

    # until the work begins, until the stage begins, until it ends, until the work ends
    peaks[:] = [900, 100, 500, 200]
    stages = Stages(tmp_path / "stages")
    with stages.meter.work() as work:
        stages.tensors("statistics", {}, make)
    assert (work.peak_bytes, work.cost().peak_bytes) == (150, 400)
    peaks[:] = [900, 150]
    stages = Stages(tmp_path / "stages")
    with stages.meter.work() as work:
        stages.tensors("statistics", {}, make)
    assert (work.peak_bytes, work.cost().peak_bytes) == (90, 400)
    peaks[:] = [None, None]
    with Meter().work() as work:
        pass
    assert work.cost().peak_bytes is None


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux forgets a peak")
def test_memory_that_is_given_back_counts_for_whom_it_served() -> None:
    meter = Meter()
    with meter.work() as large:
        block = bytearray(200 * MEGABYTE)
        block[::4096] = b"x" * len(block[::4096])
        del block
    with meter.work() as small:
        pass
    if large.peak_bytes is None or small.peak_bytes is None:
        pytest.skip("this machine does not let a process forget its peak")
    assert 190 * MEGABYTE < large.peak_bytes < 260 * MEGABYTE
    assert small.peak_bytes < 20 * MEGABYTE


def records_of(cells: list[Cell], store: Store) -> list[Record]:
    found = [store.load(cell) for cell in cells]
    return [record for record in found if record is not None]


def test_records_tell_the_cost_of_their_method(store: Store, suite_file: str, cells: list[Cell]) -> None:
    runner = CellRunner(Settings(store.root), lambda *_: None)
    outcomes = [runner.run(cell) for cell in cells]
    reference, *others = records_of(cells, store)
    assert reference.cost == {}
    for record in others:
        assert set(record.cost) == {
            "training_s", "calibration_s", "peak_mb", "extra_operations", "trainings"
        }  # fmt: skip
        assert record.cost["calibration_s"] > 0
        assert record.cost["training_s"] == record.cost["trainings"] == record.cost["extra_operations"] == 0
        again = Record.from_json(json.loads(json.dumps(record.to_json())), "the test")
        assert again == record
        assert record.to_json()["schema"] == 4
    for outcome in outcomes:
        assert set(outcome.spent) <= set(PARTS)
        assert sum(outcome.spent.values()) <= outcome.seconds + 0.01
    spent = spent_in_all(outcomes)
    assert list(spent) == [*PARTS, "other"]
    assert spent["references"] > 0
    assert spent["evaluation"] > 0
    assert spent["training"] == 0
    assert sum(spent.values()) == pytest.approx(sum(outcome.seconds for outcome in outcomes), abs=0.05)


def test_later_cells_of_one_training_tell_its_whole_cost(
    store: Store, monkeypatch: pytest.MonkeyPatch, cells: list[Cell]
) -> None:
    kind = METHODS.get("toy_trained")
    quantize = kind.quantize

    def slow(self: Any, context: Any) -> Any:
        halve = context.stages.tensors

        class Slow:
            def tensors(self, stage: str, key: Any, make: Any) -> Any:
                return halve("tuning", key, lambda: (time.sleep(0.3), make())[1])

        context.stages = Slow()
        return quantize(self, context)

    monkeypatch.setattr(kind, "quantize", slow)
    trained = [
        Cell.from_identity(cell.identity() | {"method": "toy_trained"})
        for cell in cells
        if cell.method == "minmax"
    ]
    runner = CellRunner(Settings(store.root), lambda *_: None)
    outcomes = [runner.run(cell) for cell in trained]
    assert [outcome.status for outcome in outcomes] == ["done", "done"]
    first, second = (record.cost for record in records_of(trained, store))
    assert first["training_s"] == second["training_s"] >= 0.3
    assert first["calibration_s"] < 0.3
    assert (first["trainings"], first["extra_operations"]) == (1, 0)
    assert outcomes[0].spent["training"] >= 0.3 > outcomes[1].spent["training"]


def test_a_method_that_names_no_training_stage_trains_all_the_time(store: Store, cells: list[Cell]) -> None:
    cell = Cell.from_identity(cells[1].identity() | {"method": "toy_trained"})  # its stage is called tuned
    outcome = CellRunner(Settings(store.root), lambda *_: None).run(cell)
    (record,) = records_of([cell], store)
    assert record.cost["calibration_s"] == 0
    assert outcome.spent["training"] > 0
    assert outcome.spent["calibration"] == 0


def test_trainings_for_three_widths(monkeypatch: pytest.MonkeyPatch) -> None:
    trained, calibrator = METHODS.get("toy_trained")(), METHODS.get("minmax")()
    assert (trainings(calibrator), trainings(trained)) == (0, 1)
    monkeypatch.setattr(METHODS.get("toy_trained"), "per_width", True)
    assert trainings(trained) == 3


def test_workers_hand_over_what_they_spent(store: Store) -> None:
    from benchmark.grid.expand import expand
    from benchmark.grid.suite import parse_suite

    suite = parse_suite(
        "tiny",
        'models = ["tiny_vit"]\nprecisions = ["W8A8"]\ncalibration_items = 8\nlimit = 20\n'
        'methods = [{name = "fp32"}, {name = "minmax"}]',
        "the test",
    )
    cells = expand(suite)
    outcomes = list(EXECUTORS.get("local")(cells, Settings(store.root), 1, Events()))
    assert all(outcome.spent["references"] > 0 for outcome in outcomes)
    spent = spent_in_all([*outcomes, Outcome(cells[0], "cached")])
    assert spent["evaluation"] > 0


def test_a_line_tells_where_the_time_went(cells: list[Cell]) -> None:
    spent = {"references": 61.0, "evaluation": 5.0, "training": 0.1}
    outcomes = [
        Outcome(cells[0], "done", seconds=70.0, spent=spent),
        Outcome(cells[1], "failed", seconds=3.0),
    ]
    assert spending_line(outcomes) == (
        "time, all workers together: references 1 min 1 s, evaluation 5 s, other 7 s"
    )
    assert spending_line([Outcome(cells[0], "cached")]) == ""


def test_a_stage_is_told_to_the_work_that_asked_for_it() -> None:
    meter = Meter()
    meter.used("statistics", "d", Cost(5.0), 1.0)  # nobody measures
    with meter.work() as outer, meter.work():
        meter.used("statistics", "d", Cost(5.0), 1.0)
    assert outer.stages == {}
