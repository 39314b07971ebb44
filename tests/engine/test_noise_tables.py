"""What rounding alone may set apart is not called different, and every view shows its noise."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable

import numpy as np
import pytest
from click.testing import CliRunner

from benchmark.cli import cli
from benchmark.grid.cells import Cell
from benchmark.grid.expand import expand
from benchmark.grid.suite import MethodSpec, Suite
from benchmark.keep.record import Noise, Record, Result
from benchmark.keep.store import Store
from benchmark.report.claims import _kept
from benchmark.report.comparison import Comparison
from benchmark.report.latex import to_latex
from benchmark.report.other_metric import in_metric
from benchmark.report.roles import CALIBRATORS
from benchmark.report.rounding import Rounded, mean_of, rounded
from benchmark.report.rows import NOISE_FIELDS, SuiteRows, collect_rows
from benchmark.report.tables import make_table, text_of, to_frame, to_markdown
from benchmark.report.terminal import to_terminal
from benchmark.tracking.contents import metrics_of

Fill = Callable[..., SuiteRows]
W8 = ("toy", "W8A8")
METHODS = ("fp32", "minmax", "mse", "quanttune")
SCORES = np.arange(100) % 4 > 0


def noise(mean: float, deviation: float, common: float = 0.0) -> Noise:
    return Noise(5, 1e-6, 10, mean, deviation, common, 12.5)


def record(cell: Cell, value: float, found: Noise | None) -> Record:
    result = Result("accuracy", True, value, 80.0, None, 80.0 - value, 0.0, 5.0, 100, found)
    metrics = {"macro F1": {"value": value - 5, "fp32": 75.0, "fp32_own": None}}
    if found:
        metrics["macro F1"] |= {"noise_mean": value - 6, "noise_deviation": 0.7, "noise_common": 0.3}
    return Record(cell, "done", "2026-01-01T00:00:00+00:00", 1.0, result, metrics)


@pytest.fixture
def fill(suite: Suite, store: Store) -> Fill:
    """Keeps a cell a method: its value, and the mean and deviation over the copies if given."""

    def of(**found: tuple[float, ...]) -> SuiteRows:
        specs = tuple(MethodSpec(name) for name in METHODS if name == "fp32" or name in found)
        made = dataclasses.replace(suite, methods=specs, precisions=("W8A8", "W6A6"))
        hits = SCORES.astype(np.float64)
        items = {"ids": np.arange(100), "scores": hits, "predictions": np.arange(100) % 3}
        for cell in expand(made):
            value, *parts = (80.0,) if cell.is_reference else found[cell.method]
            store.save(record(cell, value, noise(*parts) if parts else None), items)
        return collect_rows(store, made)

    return of


def test_what_lies_within_the_noise_of_the_best_is_as_good(fill: Fill) -> None:
    # 2 * hypot(0.5, 0.5) = 1.414
    rows = fill(minmax=(70.0, 70.0, 0.5), mse=(71.0, 71.4, 0.5), quanttune=(69.0, 69.9, 0.5))
    assert make_table(rows).best(W8) == {"minmax", "mse"}
    rows = fill(minmax=(70.0, 69.9, 0.5), mse=(71.0, 71.4, 0.5), quanttune=(69.0, 69.9, 0.5))
    assert make_table(rows).best(W8) == {"mse"}


def test_the_best_is_chosen_by_the_mean_over_the_copies(fill: Fill, store: Store) -> None:
    rows = fill(minmax=(72.0, 70.0, 0.1), mse=(71.0, 71.5, 0.1), quanttune=(69.0, 69.0, 0.1))
    assert make_table(rows).best(W8) == {"mse"}
    best = Comparison(rows).best("toy", "W8A8", CALIBRATORS)
    assert best is not None
    assert best.label == "mse"


def test_without_noise_only_what_prints_the_same_is_the_same(fill: Fill) -> None:
    rows = fill(minmax=(70.0,), mse=(70.1,), quanttune=(70.06,))
    assert make_table(rows).best(W8) == {"mse", "quanttune"}
    assert "rounding" not in make_table(rows).caption
    assert not set(NOISE_FIELDS) & set(to_frame(rows).columns)


def test_tables_show_it(fill: Fill) -> None:
    rows = fill(minmax=(70.0, 70.2, 0.5), mse=(60.0, 60.1, 0.4), quanttune=(75.0, 75.1, 0.25))
    table = make_table(rows)
    assert text_of(table, W8, "minmax") == ("70.0 ± 0.5", "10.0 [0.0, 5.0]")
    assert text_of(table, W8, "fp32") == ("80.0", "")
    for phrase in (
        "The standard deviation of rounding alone, behind ± and in the interval, is from 5 copies",
        "differ by 1e-06 at most, on 10 items",
        "bold, too, is what lies within twice that of its difference to the best",
        "Flips: predictions that are others in a copy.",
    ):
        assert phrase in table.caption
    # of QuantTune and its control alone
    assert to_markdown(table).count("flips 12.5 %") == len(table.rows)
    assert "75.0 ± 0.2**<br>5.0 [0.0, 5.0]<br>flips 12.5 %" in to_markdown(table)
    assert "flips 12.5 %" in to_terminal(table, 80)
    assert "{\\scriptsize flips 12.5 \\%}" in to_latex(table, "x")
    reference, line, *_ = rows.to_json()
    assert [line[name] for name in NOISE_FIELDS] == [70.2, 0.5, 0.0, 10, 12.5]
    assert [reference[name] for name in NOISE_FIELDS] == [None] * 5
    assert tuple(to_frame(rows).columns)[-5:] == NOISE_FIELDS


def test_a_caption_speaks_of_every_model(fill: Fill) -> None:
    """Found: it spoke of the last model alone, whose task may have no classes and other items."""
    rows = fill(minmax=(70.0, 70.2, 0.5), quanttune=(75.0, 75.1, 0.25))
    records = dict(rows.records)
    last = [record for record in records.values() if record.cell.method == "quanttune"][-1]
    assert last.result is not None
    assert last.result.noise is not None
    noise = dataclasses.replace(last.result.noise, items=3, flips=None)
    records[last.cell.cell_id] = dataclasses.replace(
        last, result=dataclasses.replace(last.result, noise=noise)
    )
    caption = make_table(dataclasses.replace(rows, records=records)).caption
    assert "on 3 to 10 items" in caption
    assert "Flips: predictions that are others in a copy." in caption


def test_seeds_average_and_keep_their_own_deviation(suite: Suite, store: Store) -> None:
    several = dataclasses.replace(suite, seeds=(0, 1), methods=(MethodSpec("fp32"), MethodSpec("minmax")))
    for cell in expand(several):
        found = None if cell.is_reference else noise(70.0 + cell.seed, 0.6)
        store.save(record(cell, 70.0 + 2 * cell.seed, found))
    table = make_table(collect_rows(store, several))
    entry = table.entries[W8, "minmax"]
    assert entry.compared.mean == pytest.approx(70.5)
    assert entry.compared.deviation == pytest.approx(0.6 / np.sqrt(2))
    assert text_of(table, W8, "minmax")[0] == "71.0 ± 1.4"
    assert "behind ±" not in table.caption


def test_another_metric_has_its_own_noise(fill: Fill) -> None:
    rows = fill(minmax=(70.0, 70.2, 0.5))
    records = {cell_id: dataclasses.replace(each) for cell_id, each in rows.records.items()}
    arrays = {name: np.arange(100) % 3 for name in ("predictions", "targets")} | {"hits": np.ones(100)}
    for each in records.values():
        rows.store.save(each, {"ids": np.arange(100), "scores": np.ones(100), **arrays})
    found = in_metric(rows, "macro F1")
    results = [each.result for each in found.records.values() if not each.cell.is_reference]
    for result in results:
        assert result is not None
        assert rounded(result) == Rounded(64.0, 0.7, 0.3)
        # the same items on both sides, so the common part is all there is
        assert result.ci_high == pytest.approx(1.96 * 1.08 * 0.3, rel=0.1)


def test_a_gain_ends_no_closer_than_rounding_leads(fill: Fill, store: Store) -> None:
    rows = fill(minmax=(75.0, 75.0, 0.5), quanttune=(75.0, 76.2, 0.5))
    comparison = Comparison(rows)
    gain = comparison.gain(comparison.pairs("W8A8", CALIBRATORS))
    # the same scores: the bootstrap alone would say exactly none
    assert gain.value == 0.0
    assert (gain.low, gain.high) == pytest.approx((min(0, 1.2 - 2**0.5), 1.2 + 2**0.5))


def test_a_common_part_widens_a_gain(fill: Fill, store: Store) -> None:
    rows = fill(minmax=(75.0, 75.0, 0.1, 3.0), quanttune=(75.0, 75.0, 0.1, 4.0))
    comparison = Comparison(rows)
    gain = comparison.gain(comparison.pairs("W8A8", CALIBRATORS))
    assert gain.high == pytest.approx(1.96 * 1.08 * 5, rel=0.1)


@pytest.mark.parametrize(
    ("mean", "verdict"),
    [
        (79.9, "kept on 1 of 1 models"),
        (79.4, "kept on 0 of 1 models, open on 1"),
        (78.6, "kept on 0 of 1 models, open on 1"),
        (77.0, "kept on 0 of 1 models"),
    ],
)
def test_accuracy_is_kept_or_not_or_open(fill: Fill, store: Store, mean: float, verdict: str) -> None:
    rows = fill(minmax=(70.0, 70.0, 0.3), quanttune=(mean, mean, 0.3))
    assert _kept(Comparison(rows)).verdict == verdict


def test_numbers_that_rounding_moves() -> None:
    one, other = Rounded(3.0, 0.3, 0.1), Rounded(2.0, 0.4, 0.2)
    difference = one - other
    assert (difference.mean, difference.deviation) == (1.0, pytest.approx(0.5))
    assert one.is_close_to(other)
    assert not one.is_close_to(Rounded(1.9, 0.4))
    assert not Rounded(1.0).is_close_to(Rounded(1.0))
    mean = mean_of([one, other])
    assert (mean.mean, mean.deviation) == (2.5, pytest.approx(0.25))
    assert mean.common == pytest.approx(np.sqrt(0.05) / 2)


def test_show_and_mlflow_tell_it(fill: Fill, store: Store) -> None:
    rows = fill(minmax=(70.0, 70.2, 0.5, 0.1))
    kept = next(each for each in rows.records.values() if not each.cell.is_reference)
    logged = metrics_of(kept)
    assert [logged[f"noise_{part}"] for part in ("mean", "deviation", "common")] == [70.2, 0.5, 0.1]
    assert logged["flips"] == 12.5
    shown = CliRunner().invoke(cli, ["show", kept.cell.cell_id[:12], "--results", str(store.root)])
    assert json.loads(shown.stdout)["result"]["noise"]["flips"] == 12.5
    reference = next(each for each in rows.records.values() if each.cell.is_reference)
    assert not [name for name in metrics_of(reference) if "noise" in name or name == "flips"]
