"""What is cheap runs first, over all models; the order of a table stays the suite's."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from baselines.method import METHODS, Method
from benchmark.engine.executors.handing import next_cell
from benchmark.engine.plan import Request, make_plan
from benchmark.engine.runner import CellRunner, Settings
from benchmark.grid.cells import Cell
from benchmark.grid.expand import expand
from benchmark.grid.order import CHEAP, cheap, phase_of, running_order
from benchmark.grid.suite import MethodSpec, Suite, load_suite
from benchmark.keep.store import Store
from benchmark.subject.models.entry import MODELS


def kind(registered: str, **attributes: Any) -> type[Method]:
    """A method that is never run, of a role and a way of training."""

    class Kind(Method):
        name: ClassVar[str] = registered

        def quantize(self, context: Any) -> Any:
            raise AssertionError("not to be run")

    for attribute, value in attributes.items():
        setattr(Kind, attribute, value)
    return Kind


@pytest.fixture
def mixed(suite: Suite, toy: Any, monkeypatch: pytest.MonkeyPatch) -> list[Cell]:
    """Two models, and a method of every kind, dearest first."""
    kinds = {
        "anew": kind("anew", role="trained", trains=True, per_width=True),
        "once": kind("once", role="control", trains=True),
        "optimised": kind("optimised", role="rival", per_width=True),
        "rival": kind("rival", role="rival"),
    }
    for name, item in kinds.items():
        monkeypatch.setitem(METHODS._items, name, item)
    monkeypatch.setitem(MODELS._items, "toy_too", toy)
    methods = tuple(MethodSpec(name) for name in (*kinds, "mse", "fp32"))
    return expand(dataclasses.replace(suite, models=("toy", "toy_too"), methods=methods))


def test_phases_run_over_all_models(mixed: list[Cell]) -> None:
    ran = running_order(mixed)
    blocks = list(dict.fromkeys((phase_of(cell), cell.model, cell.method) for cell in ran))
    assert blocks == [
        (phase, model, method)
        for phase, methods in enumerate([("fp32", "mse"), ("rival",), ("optimised",), ("once",), ("anew",)])
        for model in (("toy_too", "toy") if phase % 2 else ("toy", "toy_too"))
        for method in methods
    ]
    assert sorted(cell.cell_id for cell in ran) == sorted(cell.cell_id for cell in mixed)
    assert cheap(mixed) == [cell for cell in mixed if cell.method in ("fp32", "mse")]


def test_a_calibrator_that_optimises_for_each_precision_is_not_cheap(
    cells: list[Cell], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(METHODS.get("mse"), "per_width", True)
    assert {phase_of(cell) for cell in cells if cell.method == "mse"} == {2}
    assert {phase_of(cell) for cell in cells if cell.method == "minmax"} == {CHEAP}


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_take_the_phases_in_turn(mixed: list[Cell], workers: int) -> None:
    """However long cells take, no cell of a phase begins before every one of the last can be under way."""
    pending, draw = running_order(mixed), random.Random(workers)
    crew = [SimpleNamespace(cell=None, model=None) for _ in range(workers)]
    begun: list[Cell] = []
    while pending:
        worker = draw.choice(crew)
        worker.cell = None
        worker.cell = next_cell(pending, worker, crew)  # type: ignore[arg-type]
        worker.model = worker.cell.model
        begun.append(worker.cell)
    assert len(begun) == len(mixed)
    first_dear = next(index for index, cell in enumerate(begun) if phase_of(cell) != CHEAP)
    assert first_dear == len(cheap(mixed))
    if workers == 1:
        assert [phase_of(cell) for cell in begun] == sorted(phase_of(cell) for cell in begun)


def test_a_worker_without_a_model_takes_one_that_nobody_is_at(mixed: list[Cell]) -> None:
    pending = running_order(mixed)
    crew = [SimpleNamespace(cell=None, model=None) for _ in range(2)]
    for worker in crew:
        worker.cell = next_cell(pending, worker, crew)  # type: ignore[arg-type]
        worker.model = worker.cell.model
    assert [worker.model for worker in crew] == ["toy", "toy_too"]
    for worker in crew:  # and stays at its own as long as that has cells of the phase
        worker.cell = next_cell(pending, worker, crew)  # type: ignore[arg-type]
        assert worker.cell.model == worker.model


def test_nobody_waits_for_a_training(mixed: list[Cell]) -> None:
    trained = [cell for cell in mixed if cell.method in ("once", "anew")]
    busy = SimpleNamespace(cell=trained[0], model="toy")
    free = SimpleNamespace(cell=None, model="toy")
    same = [cell for cell in trained if cell.training_group == trained[0].training_group]
    taken = next_cell([*same[1:], *trained[len(same) :]], free, [busy, free])  # type: ignore[arg-type]
    assert taken.training_group != trained[0].training_group


def test_a_plan_runs_the_phases_and_keeps_the_order_of_its_cells(suite_file: str, store: Store) -> None:
    path = Path(suite_file)
    path.write_text(path.read_text().replace("minmax", "toy_trained"))
    plan = make_plan(Request(suite_file), Settings(store.root))
    assert [cell.method for cell in plan.cells] == ["fp32", *["toy_trained"] * 2, *["mse"] * 2]
    outcomes = list(plan.outcomes())
    assert [outcome.status for outcome in outcomes] == ["done"] * 5
    assert [outcome.cell.method for outcome in outcomes] == ["fp32", *["mse"] * 2, *["toy_trained"] * 2]


def test_every_calibrator_of_the_main_job_comes_before_what_trains() -> None:
    ran = running_order(expand(load_suite("laptop")))
    first = [cell for cell in ran if phase_of(cell) == CHEAP]
    assert ran[: len(first)] == first
    assert {cell.model for cell in first} == set(load_suite("laptop").models)
    assert {"minmax", "percentile", "mse", "omse"} <= {cell.method for cell in first}
    assert not {"finetune", "quanttune"} & {cell.method for cell in first}


def test_executors_give_the_same_numbers_in_any_order(tmp_path: Path) -> None:
    """Two models and every kind of training: the serial and the local executor, and the suite's own order."""
    text = (
        'models = ["tiny_bert", "tiny_opt"]\nprecisions = ["W8A8", "W4A4"]\nnoise = "none"\nlimit = 12\n'
        "calibration_items = 8\n"
        'methods = [{name = "quanttune"}, {name = "fq_vit"}, {name = "minmax"}, {name = "fp32"}]'
    )
    path = tmp_path / "all.toml"
    path.write_text(text)
    found: dict[str, dict[str, tuple[str, float | None]]] = {}
    for name, jobs in (("serial", 1), ("local", 2)):
        plan = make_plan(Request(str(path)), Settings(tmp_path / name), name, jobs)
        outcomes = list(plan.outcomes())
        assert {outcome.status for outcome in outcomes} <= {"done", "skipped"}
        found[name] = {outcome.cell.cell_id: (outcome.status, outcome.value) for outcome in outcomes}
        if name == "serial":
            ran = [outcome.cell for outcome in outcomes]
            assert ran == running_order(plan.cells) != list(plan.cells)
    runner = CellRunner(Settings(tmp_path / "own"), lambda *_: None)
    own = [runner.run(cell) for cell in plan.cells]
    found["own"] = {outcome.cell.cell_id: (outcome.status, outcome.value) for outcome in own}
    assert found["serial"] == found["local"] == found["own"]
