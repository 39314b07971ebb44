"""A cell is measured as its identity says, gated, and recorded with everything that made it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import benchmark.engine.session
from baselines import METHODS
from benchmark.engine.executors import EXECUTORS
from benchmark.engine.measure import RESAMPLES, drop_interval
from benchmark.engine.runner import CellRunner, Settings
from benchmark.engine.session import Session
from benchmark.grid.cells import Cell
from benchmark.grid.expand import expand
from benchmark.grid.suite import MethodSpec, Suite
from benchmark.keep.stages import Stages
from benchmark.keep.store import Store
from benchmark.subject.models.entry import ModelEntry
from quanttune.errors import StoreError

Run = Callable[..., CellRunner]


@pytest.fixture
def runner(store: Store) -> Run:
    def make(**changes: Any) -> CellRunner:
        return CellRunner(Settings(store.root, **changes), lambda *_: None)

    return make


def cells_of(suite: Suite, *methods: str) -> list[Cell]:
    return expand(dataclasses.replace(suite, methods=tuple(MethodSpec(name) for name in methods)))


def test_a_whole_grid(runner: Run, store: Store, cells: list[Cell], toy: Any) -> None:
    outcomes = [runner().run(cell) for cell in cells]
    assert [outcome.status for outcome in outcomes] == ["done"] * len(cells)
    records = [store.load(cell) for cell in cells]
    for cell, record in zip(cells, records, strict=True):
        assert record is not None
        result = record.result
        assert result is not None
        items = store.items(cell.cell_id)
        assert result.n == len(items["scores"]) == 40
        assert result.value == pytest.approx(100 * items["scores"].mean())
        targets = np.array([item % 3 for item in items["ids"]])
        assert np.array_equal(items["predictions"] == targets, items["scores"] == 1)
        assert result.drop == result.fp32 - result.value
        assert result.ci_low <= result.drop <= result.ci_high
        assert record.provenance["threads"] == 1
        assert record.provenance["versions"]["torch"]
        assert (len(record.sites) > 0) == (not cell.is_reference)
        assert all(site["low"] <= 0 <= site["high"] for site in record.sites)
    assert toy.made == 1
    assert [runner().run(cell).status for cell in cells] == ["cached"] * len(cells)


def test_quantizing_does_what_the_record_says(runner: Run, store: Store, cells: list[Cell]) -> None:
    low, high = (cell for cell in cells if cell.method == "minmax")
    low, high = (low, high) if low.precision == "W4A4" else (high, low)
    reference = next(cell for cell in cells if cell.is_reference)
    run = runner()
    for cell in (reference, low, high):
        run.run(cell)
    exact = store.items(reference.cell_id)["predictions"]
    wrong = [int((store.items(cell.cell_id)["predictions"] != exact).sum()) for cell in (high, low)]
    assert wrong[0] <= wrong[1]
    assert wrong[1] > 0


def test_two_runs_give_the_same_bytes(runner: Run, store: Store, cells: list[Cell]) -> None:
    def numbers() -> list[Any]:
        found = [runner(overwrite="always").run(cell) and store.load(cell) for cell in cells]
        return [(record.result, record.items_sha256, record.sites) for record in found if record]

    assert numbers() == numbers()


def test_training_is_shared_and_its_own_fp32_measured(runner: Run, store: Store, suite: Suite) -> None:
    run = runner()
    cells = cells_of(suite, "toy_trained")
    for cell in cells:
        assert run.run(cell).status == "done"
        record = store.load(cell)
        assert record is not None
        assert record.result is not None
        # no quantizers: the trained weights are measured as they are
        assert record.result.fp32_own == record.result.value
        assert record.weights_digest != record.reference_digest
        assert record.details == {"steps": 2, "largest_ratio": 21.5, "evaluation_batch": 50}
    assert len(cells) == 2
    assert METHODS.get("toy_trained").calls == 1  # type: ignore[attr-defined]


def test_tuned_weights_are_hashed_once_a_session(
    runner: Run, suite: Suite, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []
    digest = benchmark.engine.session.tensor_digest

    def counting(tensors: Any) -> str:
        hashed.append(digest(tensors))
        return hashed[-1]

    for module in ("benchmark.engine.session", "baselines.method", "quanttune.quantization.quantized"):
        monkeypatch.setattr(f"{module}.tensor_digest", counting)
    run = runner()
    cells = cells_of(suite, "finetune")
    assert [run.run(cell).status for cell in cells] == ["done", "done"]
    (weights,) = {run.store.load(cell).weights_digest for cell in cells}  # type: ignore[union-attr]
    assert hashed.count(weights) == 1


def test_the_reference_model_is_never_changed(runner: Run, suite: Suite) -> None:
    run = runner()
    for cell in cells_of(suite, "toy_trained", "minmax"):
        run.run(cell)
    session = run._session
    assert session is not None
    for name, tensor in session.model.state_dict().items():
        assert torch.equal(tensor, session._weights[name])


def test_a_method_may_decline(runner: Run, store: Store, suite: Suite) -> None:
    (cell, _) = cells_of(suite, "toy_declines")
    assert (runner().run(cell).status, runner().run(cell).message) == ("skipped", "the toy has no softmax")
    assert runner().run(cell).status == "skipped"


def test_failures_are_recorded_and_tried_again_or_not(runner: Run, store: Store, suite: Suite) -> None:
    (cell, _) = cells_of(suite, "toy_breaks")
    outcome = runner().run(cell)
    assert (outcome.status, outcome.message) == ("failed", "ValueError: no range for site 3")
    failure = store.load_failure(cell.cell_id)
    assert failure is not None
    assert "Traceback" in failure["traceback"]
    assert runner(overwrite="never").run(cell).seconds == 0
    assert runner(overwrite="failed").run(cell).seconds > 0


def test_a_reference_that_is_not_the_known_one_is_refused(
    runner: Run, store: Store, cells: list[Cell], toy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toy, "expected", 99.0, raising=False)
    run = runner()
    outcomes = [run.run(cell) for cell in cells]
    assert {outcome.status for outcome in outcomes} == {"failed"}
    assert "expected 99.00" in outcomes[0].message
    assert all(store.load(cell) is None for cell in cells)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_reference_that_is_not_finite_is_refused(
    runner: Run, store: Store, cells: list[Cell], toy: Any, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    """Without a word of what its metric should be: NaN in a bias answers class 0 every time."""
    whole = type(toy)._reference

    def broken(*args: Any) -> dict[str, torch.Tensor]:
        weights = whole(*args)
        weights["head.bias"][1] = value
        return weights

    monkeypatch.setattr(type(toy), "_reference", broken)
    run = runner()
    outcomes = [run.run(cell) for cell in cells]
    assert {outcome.status for outcome in outcomes} == {"failed"}
    assert "the reference is not finite: 1 of 3 values of parameter head.bias" in outcomes[0].message
    assert all(store.load(cell) is None for cell in cells)


def test_logits_that_are_not_finite_fail_their_cell_by_name(
    runner: Run, store: Store, cells: list[Cell], toy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toy, "weight", 1e18, raising=False)
    outcome = runner().run(cells[0])
    assert outcome.status == "failed"
    assert "model toy, FP32 evaluation: logits are NaN or infinite among items" in outcome.message


def test_a_changed_reference_makes_its_cells_missing(
    runner: Run, store: Store, cells: list[Cell], toy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner().run(cells[0])
    for path in (store.root / "stages" / "reference").iterdir():
        path.unlink()
    monkeypatch.setattr(toy, "weight", 2.0)
    runner().run(cells[1])
    assert store.load(cells[0]) is None
    assert store.load(cells[1]) is not None


def test_a_full_disk_stops_the_run(runner: Run, cells: list[Cell], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise StoreError("no space left")

    run = runner()
    monkeypatch.setattr(Store, "save", full)
    with pytest.raises(StoreError):
        run.run(cells[0])


def test_limits_take_part_of_the_items(runner: Run, store: Store, suite: Suite) -> None:
    cell = expand(suite, limit=5)[0]
    runner().run(cell)
    record = store.load(cell)
    assert record is not None
    assert record.result is not None
    assert record.result.n == 5


def test_every_rival_calibrates_on_the_same_items(store: Store) -> None:
    def drawn(seed: int) -> list[torch.Tensor]:
        session = Session("toy", Stages(store.root / "stages"), torch.device("cpu"), lambda *_: None)
        return [batch.inputs for batch in session.calibration(8, seed)]  # type: ignore[misc]

    assert all(torch.equal(one, other) for one, other in zip(drawn(0), drawn(0), strict=True))
    assert not torch.equal(drawn(0)[0], drawn(1)[0])


def test_every_executor_registers() -> None:
    assert EXECUTORS.names() == ["local", "serial"] or {"local", "serial"} < set(EXECUTORS.names())


def accuracy(scores: np.ndarray) -> float:
    return 100 * float(scores.mean())


def test_the_interval_of_no_difference_is_nothing() -> None:
    scores = np.array([1.0, 0.0, 1.0, 1.0])
    assert drop_interval(scores, scores.copy(), accuracy) == (0.0, 0.0)


def test_the_interval_agrees_with_scipy() -> None:
    from scipy.stats import bootstrap

    generator = np.random.default_rng(0)
    reference = (generator.random(500) < 0.85).astype(float)
    scores = np.where(generator.random(500) < 0.2, 1 - reference, reference)
    low, high = drop_interval(reference, scores, accuracy)
    theirs = bootstrap(
        (reference - scores,),
        lambda drop: 100 * drop.mean(),
        method="percentile",
        n_resamples=RESAMPLES,
        vectorized=False,
        rng=np.random.default_rng(1),
    ).confidence_interval
    assert low == pytest.approx(theirs.low, abs=0.6)
    assert high == pytest.approx(theirs.high, abs=0.6)
    assert (low, high) == drop_interval(reference, scores, accuracy)


def test_pairing_matters() -> None:
    generator = np.random.default_rng(0)
    reference = (generator.random(400) < 0.7).astype(float)
    scores = reference.copy()
    scores[np.flatnonzero(reference)[:8]] = 0
    low, high = drop_interval(reference, scores, accuracy)
    assert high - low < 4  # unpaired, two proportions of 0.7 would span 12 points
    assert low > 0


def test_items_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="shape"):
        drop_interval(np.zeros(3), np.zeros(4), accuracy)


def test_records_hold_no_python_objects(runner: Run, store: Store, cells: list[Cell]) -> None:
    runner().run(cells[1])
    for path in (store.root / "cells").iterdir():
        assert path.suffix in (".json", ".safetensors")
    text = (store.root / "cells" / f"{cells[1].cell_id}.json").read_text()
    assert json.loads(text)["cell_id"] == cells[1].cell_id


def test_the_contract_of_entries_is_used_as_declared(toy: ModelEntry) -> None:
    assert toy.needs() == ()
