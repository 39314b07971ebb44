"""The noise of rounding: on which items, its numbers against NumPy, and what of it is kept."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from benchmark.engine import noise
from benchmark.engine.measure import FEW_COPIES, RESAMPLES, Items, drop_interval
from benchmark.engine.noise import flips, noise_ids, spreads
from benchmark.engine.runner import CellRunner, Settings
from benchmark.grid.cells import Cell
from benchmark.grid.expand import expand
from benchmark.grid.suite import Suite, parse_suite
from benchmark.keep.record import Noise, Record, Result
from benchmark.keep.store import Store
from benchmark.subject.tasks.task import get_task
from quanttune.errors import ConfigError
from quanttune.quantization.perturbation import COPIES, RELATIVE
from quanttune.seeds import numpy_generator
from tests.engine.conftest import SUITE

Progress = list[tuple[str, int, int]]


class Mean:
    """A task with one metric, a mean."""

    metric, metrics = "score", ("score",)

    @staticmethod
    def metric_value(scores: np.ndarray) -> float:
        return float(scores.mean())

    @staticmethod
    def named(scores: np.ndarray) -> dict[str, np.ndarray]:
        return {}


class Exponential(Mean):
    @staticmethod
    def metric_value(scores: np.ndarray) -> float:
        return float(np.exp(scores.mean()))


def measured(n: int, places: np.ndarray, common: float = 0.0, seed: int = 0) -> tuple[Items, list[Items]]:
    generator = np.random.default_rng(seed)
    scores = generator.standard_normal(n) + 0.5 * generator.standard_normal((COPIES + 1, n))
    scores += common * generator.standard_normal((COPIES + 1, 1))
    classes = generator.integers(0, 3, (COPIES + 1, n))
    ids = 100 + np.arange(n)
    copies = [Items(ids[places], row[places], one[places]) for row, one in zip(scores, classes, strict=True)]
    return Items(ids, scores[0], classes[0]), copies[1:]


@pytest.mark.parametrize("step", [1, 5])
def test_mean_and_deviation_are_those_of_the_whole_with_the_copies_put_in(step: int) -> None:
    task: Any = Mean()
    places = np.arange(0, 60, step)[::-1]
    items, copies = measured(60, places)
    values = [items.scores.mean()]
    for copy in copies:
        scores = items.scores.copy()
        scores[places] = copy.scores
        values.append(scores.mean())
    found = spreads(task, items, copies)["score"]
    assert found.mean == pytest.approx(np.mean(values))
    assert found.deviation == pytest.approx(np.std(values, ddof=1) * np.sqrt(step))


@pytest.mark.parametrize("common", [0.0, 0.2, 1.0])
def test_the_common_part_is_what_the_items_own_variances_do_not_explain(common: float) -> None:
    task: Any = Mean()
    places = np.arange(200)
    items, copies = measured(200, places, common, seed=3)
    scores = np.stack([items.scores, *(copy.scores for copy in copies)])
    total = scores.mean(axis=1).var(ddof=1)
    alone = scores.var(axis=0, ddof=1).sum() / 200**2
    expected = max(0.0, total - alone) * 200 / 199
    found = spreads(task, items, copies)["score"]
    # 50 shuffles tell the independent part to about a tenth
    assert found.common**2 == pytest.approx(expected, abs=0.4 * alone)
    assert (found.common > 0.5 * common) or common == 0


def test_a_metric_that_is_no_mean_has_the_noise_of_its_slope() -> None:
    items, copies = measured(400, np.arange(400), 0.02)
    tasks: list[Any] = [Mean(), Exponential()]
    of_mean, of_exp = (spreads(task, items, copies)["score"] for task in tasks)
    slope = np.exp(of_mean.mean)
    assert of_exp.deviation == pytest.approx(slope * of_mean.deviation, rel=0.02)
    assert of_exp.common == pytest.approx(slope * of_mean.common, rel=0.02)


def test_copies_that_agree_have_no_noise_and_one_item_tells_nothing_common() -> None:
    task: Any = Mean()
    items, copies = measured(30, np.arange(30))
    same = spreads(task, items, [items] * COPIES)["score"]
    assert (same.deviation, same.common) == (0.0, 0.0)
    one = spreads(task, items, [copy.rows(np.array([4])) for copy in copies])["score"]
    assert one.common == 0.0
    assert one.deviation > 0


def test_flips_are_the_share_of_other_predictions() -> None:
    places = np.array([3, 17, 8])
    items, copies = measured(20, places)
    assert items.predictions is not None
    others = [copy.predictions != items.predictions[places] for copy in copies]
    assert flips(items, copies) == pytest.approx(100 * np.mean(others))
    assert flips(dataclasses.replace(items, predictions=None), copies) is None


def test_the_drawn_items_depend_on_the_task_alone(cells: list[Cell]) -> None:
    task = get_task("toy_task")
    drawn = {cell.method: noise_ids(task, cell) for cell in cells}
    assert len({tuple(ids) for ids in drawn.values()}) == 1
    ids = drawn["minmax"]
    assert len(ids) == 4  # a tenth of 40
    assert ids == [item for item in task.split_ids("test") if item in ids]
    cell = cells[1]
    assert noise_ids(task, dataclasses.replace(cell, noise="all")) == task.split_ids("test")
    assert len(noise_ids(task, dataclasses.replace(cell, limit=7))) == 1
    assert set(noise_ids(task, dataclasses.replace(cell, limit=20))) <= set(task.split_ids("test", 20))


def test_rounding_widens_the_interval_by_a_normal_draw() -> None:
    generator = np.random.default_rng(0)
    reference, scores = generator.random((2, 50))
    plain = drop_interval(reference, scores, np.mean)
    wide = drop_interval(reference, scores, np.mean, 2.0)
    assert wide[1] - wide[0] == pytest.approx(2 * 1.96 * 2 * FEW_COPIES, rel=0.1)
    assert wide[0] < plain[0] < plain[1] < wide[1]
    same = drop_interval(reference, reference, np.mean, 1.0)
    draws = FEW_COPIES * numpy_generator(0, "rounding", 50).standard_normal(RESAMPLES)
    assert same == pytest.approx(tuple(np.percentile(draws, [2.5, 97.5])))


@pytest.fixture
def run(store: Store) -> Callable[..., tuple[Record, Progress]]:
    def of(cell: Cell, overwrite: str = "failed") -> tuple[Record, Progress]:
        told: Progress = []
        runner = CellRunner(Settings(store.root, overwrite=overwrite), lambda *stage: told.append(stage))
        assert runner.run(cell).status == "done"
        record = store.load(cell)
        assert record is not None
        return record, told

    return of


def test_a_cell_keeps_its_noise_and_measures_it_once(
    run: Callable[..., tuple[Record, Progress]], cells: list[Cell], monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = next(cell for cell in cells if cell.precision == "W4A4")
    record, told = run(cell)
    assert record.result is not None
    kept = record.result.noise
    assert kept is not None
    assert (kept.copies, kept.relative, kept.items) == (COPIES, RELATIVE, 4)
    leading = record.metrics["accuracy"]
    assert (kept.mean, kept.deviation) == (leading["noise_mean"], leading["noise_deviation"])
    assert kept.flips is not None
    assert all("noise_deviation" in numbers for numbers in record.metrics.values())
    # one progress over all copies
    assert [step for step in told if step[0] == "rounding noise"] == [
        ("rounding noise", 4 * copy, 4 * COPIES) for copy in range(1, COPIES + 1)
    ]
    # a method with the same quantizers, and the same cell again, find the copies measured
    monkeypatch.setattr(noise, "_measure", lambda *_: pytest.fail("measured again"))
    again, told = run(cell, "always")
    assert again.result == record.result
    assert not [step for step in told if step[0] == "rounding noise"]


def test_the_reference_has_none_nor_has_a_cell_that_does_not_ask(
    run: Callable[..., tuple[Record, Progress]], cells: list[Cell]
) -> None:
    for cell in (cells[0], dataclasses.replace(cells[1], noise="none")):
        record, _ = run(cell)
        assert record.result is not None
        assert record.result.noise is None
        assert set(record.metrics["accuracy"]) == {"value", "fp32", "fp32_own"}
        assert dataclasses.replace(record, cost={}).to_json()["schema"] == 2


def test_a_record_with_noise_comes_back_and_one_without_is_as_it_was(
    run: Callable[..., tuple[Record, Progress]], cells: list[Cell]
) -> None:
    measured, _ = run(cells[1])
    record = dataclasses.replace(measured, cost={})
    body = json.loads(json.dumps(record.to_json()))
    assert body["schema"] == 3
    assert Record.from_json(body, "here") == record
    assert record.result is not None
    old = dataclasses.replace(
        record, result=dataclasses.replace(record.result, noise=None), metrics={}, quantized=None
    )
    body = old.to_json()
    assert body["schema"] == 1
    assert "noise" not in body["result"]
    assert Record.from_json(body, "here") == old


def test_a_noise_that_is_no_number_is_kept_as_none(cells: list[Cell]) -> None:
    kept = Noise(5, 1e-6, 4, float("nan"), float("nan"), float("nan"))
    result = Result("accuracy", True, 1.0, 2.0, None, 1.0, 0.0, 2.0, 40, kept)
    again = Record.from_json(
        Record(cells[1], "done", "2026-01-01T00:00:00+00:00", 0.0, result).to_json(), "here"
    )
    assert again is not None
    assert again.result is not None
    assert again.result.noise == Noise(5, 1e-6, 4, None, None, None)


def test_a_suite_says_on_which_items(suite: Suite) -> None:
    assert suite.noise == "subset"
    everywhere = parse_suite("s", 'noise = "all"\n' + SUITE, "s")
    before, after = expand(suite), expand(everywhere)
    same = [one.cell_id == other.cell_id for one, other in zip(before, after, strict=True)]
    # the reference has no noise and is the same cell
    assert same == [cell.is_reference for cell in before]
    assert all("noise" not in cell.identity() for cell in before)
    assert after[1].identity()["noise"] == "all"
    assert Cell.from_identity(after[1].identity()) == after[1]
    with pytest.raises(ConfigError, match="noise = 'some'; known: subset, all, none"):
        parse_suite("s", 'noise = "some"\n' + SUITE, "s")
