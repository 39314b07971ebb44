"""Scores on validation items: the task's metric on that split, and never a test item."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch

from baselines.method import METHODS, Batch
from benchmark.engine.measure import evaluate
from benchmark.engine.runner import CellRunner, Settings
from benchmark.engine.session import Session
from benchmark.engine.validation import TaskValidation
from benchmark.grid.cells import Cell
from benchmark.grid.expand import expand
from benchmark.grid.suite import MethodSpec, Suite
from benchmark.keep.stages import Stages
from benchmark.keep.store import Store
from benchmark.subject.models.entry import ModelEntry
from benchmark.subject.tasks.task import TASKS
from quanttune.errors import ConfigError
from quanttune.quantization import simulate
from tests.engine.conftest import ToyTask


class Watched(ToyTask):
    """Notes every item that anybody asks for."""

    def __init__(self) -> None:
        self.seen: set[int] = set()

    def collate(self, entry: ModelEntry, ids: Sequence[int]) -> Batch:
        self.seen |= set(ids)
        return super().collate(entry, ids)


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> Watched:
    watched = Watched()
    monkeypatch.setitem(TASKS._items, "toy_task", watched)
    return watched


@pytest.fixture
def cell(suite: Suite) -> Cell:
    cells = expand(dataclasses.replace(suite, methods=(MethodSpec("best_calibrator"),)))
    return next(cell for cell in cells if cell.precision == "W4A4")


def session(store: Store) -> Session:
    return Session("toy", Stages(store.root / "stages"), torch.device("cpu"), lambda *_: None)


def test_no_test_item_is_seen_before_the_choice_is_made(task: Watched, cell: Cell, store: Store) -> None:
    here = session(store)
    quantized = cell.make_method().quantize(here.context(cell))
    assert set(task.split_ids("validation")) <= task.seen
    assert not task.seen & set(task.split_ids("test"))
    assert quantized.details["validation_items"] == 10
    assert quantized.details["validation_metric"] == "accuracy"


def test_a_score_is_the_metric_of_the_validation_split(cell: Cell, store: Store, task: Watched) -> None:
    here = session(store)
    context = here.context(cell)
    quantized = METHODS.get("mse")().quantize(context)
    with simulate(here.model, quantized.quantizers):
        items = evaluate(
            here.model,
            here.task,
            here.entry,
            split="validation",
            device=here.device,
            progress=lambda *_: None,
        )
    value = here.task.metric_value(items.scores)
    assert context.validation is not None
    assert context.validation.score(here.model, quantized.quantizers, 256) == value
    task.higher_is_better = False
    assert context.validation.score(here.model, quantized.quantizers, 256) == -value


def test_the_key_holds_the_items_and_the_metric(cell: Cell, store: Store) -> None:
    validation = session(store).context(cell).validation
    assert validation is not None
    assert validation.key(10) == validation.key(256)
    assert validation.key(10) != validation.key(5)
    assert validation.key(10)["metric"] == "accuracy"
    assert (validation.count(5), validation.count(256)) == (5, 10)


def test_a_task_without_validation_items_says_what_to_do(
    task: Watched, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = session(store)
    validation = TaskValidation(here.task, here.entry, here.device, here.progress)
    monkeypatch.setattr(task, "split_ids", lambda split, limit=None: [])
    with pytest.raises(ConfigError, match="task toy_task has no validation items to choose a method on"):
        validation.count(3)


def test_a_cell_records_what_was_chosen_and_its_scores(cell: Cell, store: Store) -> None:
    outcome = CellRunner(Settings(store.root), lambda *_: None).run(cell)
    assert outcome.status == "done", outcome.message
    record = store.load(cell)
    assert record is not None
    scores = record.details["validation_scores"]
    assert len(scores) == 7
    assert scores[record.details["chosen_calibrator"]] == max(scores.values())
    kept = {path.stem for path in (store.root / "stages" / "validation").glob("*.safetensors")}
    assert 1 < len(kept) <= 7  # calibrators that agree share a score
    CellRunner(Settings(store.root, overwrite="always"), lambda *_: None).run(cell)
    assert {path.stem for path in (store.root / "stages" / "validation").glob("*.safetensors")} == kept
