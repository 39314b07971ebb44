"""The report: gains are those of the items, verdicts follow from them, the page stands alone."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from baselines.method import METHODS
from benchmark.cli import cli
from benchmark.engine.measure import drop_interval
from benchmark.grid.expand import expand
from benchmark.grid.suite import MethodSpec, Suite, parse_suite
from benchmark.keep.store import Store
from benchmark.report.claims import ABSENT, claims
from benchmark.report.comparison import Comparison, comparison_frame
from benchmark.report.figures.overview import Overview
from benchmark.report.gallery import csv_of
from benchmark.report.html import make_report
from benchmark.report.roles import CALIBRATORS, CONTROLS, STATE_OF_THE_ART
from benchmark.report.rows import SuiteRows, collect_rows
from benchmark.subject.models.entry import MODELS
from benchmark.subject.tasks.task import get_task
from quanttune.errors import StoreError
from tests.pages import Page
from tests.report.made_rows import ACCURACY, NO_FRAMES, SUITE, by_statement, fill, frames_of_figures


def test_the_best_rival_is_chosen_by_model_and_precision(rows: SuiteRows, store: Store) -> None:
    comparison = Comparison(rows)
    assert comparison.models == ["tiny_vit", "tiny_bert"]
    for precision, label in (("W8A8", "mse"), ("W6A6", "minmax")):
        best = comparison.best("tiny_vit", precision, CALIBRATORS)
        assert best is not None
        assert best.label == label
    control = comparison.best("tiny_vit", "W8A8", CONTROLS)
    assert control is not None
    assert control.label == "finetune+mse"
    assert comparison.best("tiny_vit", "W8A8", STATE_OF_THE_ART) is None
    assert comparison.get("tiny_vit", "W4A4", "quanttune") is None


def test_gains_are_differences_of_drops_with_the_paired_interval(rows: SuiteRows, store: Store) -> None:
    comparison = Comparison(rows)
    pairs = comparison.pairs("W8A8", CALIBRATORS)
    assert list(pairs) == ["tiny_vit", "tiny_bert"]
    gain = comparison.gain(pairs)
    assert gain.value == pytest.approx(89.0 - 75.0)
    one = comparison.gain({"tiny_vit": pairs["tiny_vit"]})
    ours, rival = pairs["tiny_vit"]
    low, high = drop_interval(ours.scores, rival.scores, lambda scores: 100 * float(scores.mean()))
    # other draws of the same bootstrap: the ends agree to a fraction of the interval's width
    assert one.low == pytest.approx(low, abs=0.15 * (high - low))
    assert one.high == pytest.approx(high, abs=0.15 * (high - low))
    # two models whose items are drawn apart: the interval of the mean is narrower by about sqrt(2)
    assert gain.low is not None
    assert gain.high is not None
    assert (gain.high - gain.low) / (high - low) == pytest.approx(2**-0.5, abs=0.12)
    same = comparison.gain({"tiny_vit": (ours, ours)})
    assert (same.value, same.low, same.high) == (0, 0, 0)
    assert comparison.gain(pairs) == gain


def test_the_comparison_names_the_rivals_and_the_fair_drop(rows: SuiteRows, store: Store) -> None:
    frame = comparison_frame(Comparison(rows))
    assert len(frame) == 4
    line = frame.iloc[0]
    assert (line["model"], line["precision"]) == ("tiny_vit", "W8A8")
    assert line["quanttune_drop"] == pytest.approx(1.0)
    assert line["quanttune_drop_against_better_fp32"] == pytest.approx(2.0)  # training reached 91
    assert (line["best_calibrator"], line["best_finetune"]) == ("mse", "finetune+mse")
    assert line["gain_over_calibrator"] == pytest.approx(14.0)
    assert line["gain_over_finetune"] == pytest.approx(4.0)
    assert line["gain_over_finetune_low"] < 4.0 < line["gain_over_finetune_high"]
    assert line["best_state_of_the_art"] is None


def test_seeds_are_averaged_item_by_item(suite: Suite, store: Store) -> None:
    seeded = dataclasses.replace(suite, seeds=(0, 1))
    comparison = Comparison(fill(store, seeded))
    ours = comparison.get("tiny_vit", "W8A8", "quanttune")
    assert ours is not None
    assert set(np.unique(ours.scores)) == {0.0, 0.5, 1.0}
    assert ours.value == pytest.approx(89.0)


def test_different_items_are_not_compared(suite: Suite, store: Store) -> None:
    rows = fill(store, dataclasses.replace(suite, seeds=(0, 1)), shift=1)
    with pytest.raises(StoreError, match="different items"):
        Comparison(rows)


def test_the_page_stands_alone(rows: SuiteRows, store: Store) -> None:
    text = make_report(
        rows,
        frames_of_figures()
        | {"outliers": pd.DataFrame(), "saturation": pd.DataFrame()}
        | {"decomposition": pd.DataFrame(), "overview": Overview("overview").frame(rows)},
    )
    page = Page(text)
    assert page.open == []
    assert all(target.startswith(("#", "data:text/csv;base64,")) for target in page.targets)
    assert {target[1:] for target in page.targets if target.startswith("#")} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    outside = re.sub(r'xmlns(:\w+)?="[^"]*"', "", text)
    assert "http" not in outside
    assert "<script" not in text
    assert "url(" not in re.sub(r"url\(#", "", text)
    words = " ".join(page.words)
    for expected in ("made<up>", "a <fast> one", "89.0", "finetune+mse", "65 %", "12.09", "18.84", ABSENT):
        assert expected in words
    assert "torch 2.9" in words
    assert "Partial:" not in words
    assert text == make_report(rows, NO_FRAMES | {"overview": Overview("overview").frame(rows)})


def test_a_partial_report_says_so(suite: Suite, store: Store) -> None:
    cells = expand(suite)
    fill(store, dataclasses.replace(suite, models=("tiny_vit",)))
    store.save_failure(cells[-1], {"error": "diverged"})
    rows = collect_rows(store, suite, allow_partial=True)
    text = " ".join(" ".join(Page(make_report(rows, NO_FRAMES)).words).split())
    assert f"Partial: {len(cells) // 2} of {len(cells)} cells are finished" in text
    assert "1 failed, 10 missing" in text


def test_published_values_stand_in_the_page(
    rows: SuiteRows, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def words_of() -> str:
        page = Page(make_report(rows, NO_FRAMES))
        assert page.open == []
        return " ".join(" ".join(page.words).split())

    assert "tiny_vit: no published value of its weights is known." in words_of()
    monkeypatch.setattr(type(MODELS.get("tiny_vit")), "checkpoint", "deit_base_patch16_224.fb_in1k")
    monkeypatch.setattr(type(get_task("fashion_mnist")), "benchmark", "ImageNet-1k")
    words = words_of()
    assert "90.00 +8.15" in words  # the reference of 90 beside 81.85
    assert "78.02 (3.83) -- -- activation ranges published asymmetric, here symmetric" in words


def test_the_command_writes_the_pages(tmp_path: Path, suite: Suite, store: Store, monkeypatch: Any) -> None:
    """The models are not run here; what they would give is tested with the figures."""
    path = tmp_path / "made.toml"
    path.write_text(SUITE)
    rows = fill(store, parse_suite("made", SUITE, str(path)))
    monkeypatch.setattr("benchmark.report.gallery.make_frames", lambda *_: NO_FRAMES)
    results = str(store.root)
    done = CliRunner().invoke(cli, ["report", "--suite", str(path), "--results", results])
    assert done.exit_code == 0, done.output
    written = Path(done.stdout.strip())
    assert written == store.root / "report" / "made" / "index.html"
    report = written.parent / "suites" / "made.html"
    assert report.read_text(encoding="utf-8") == make_report(rows, NO_FRAMES, home="../index.html")
    assert csv_of(comparison_frame(Comparison(rows))).count("\n") == 5


def test_a_choice_on_validation_items_stands_beside_the_best_after_the_fact(
    suite: Suite, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It took mse where min-max is better on the test items, and says so; it never counts as looked up."""
    for label, like in (("best_calibrator", "mse"), ("finetune+best_calibrator", "finetune+mse")):
        monkeypatch.setitem(ACCURACY, label, ACCURACY[like])
    tuned = MethodSpec("finetune", {"calibrator": "best_calibrator"})
    methods = (*suite.methods, MethodSpec("best_calibrator"), tuned)
    rows = fill(store, dataclasses.replace(suite, methods=methods))
    for record in rows.records.values():
        if record.cell.label.endswith("best_calibrator"):
            items = store.items(record.cell.cell_id)
            store.save(dataclasses.replace(record, details={"chosen_calibrator": "mse"}), dict(items))
    rows = collect_rows(store, rows.suite)
    comparison = Comparison(rows)
    assert comparison.rivals(CALIBRATORS) == ["minmax", "mse"]
    assert comparison.rivals(CALIBRATORS, chosen=True) == ["best_calibrator"]
    assert comparison.rivals(CONTROLS) == ["finetune", "finetune+mse"]
    assert comparison.rivals(CONTROLS, chosen=True) == ["finetune+best_calibrator"]
    line = comparison_frame(comparison).iloc[1]
    assert line["precision"] == "W6A6"
    assert (line["best_calibrator"], line["best_calibrator_drop"]) == ("minmax", pytest.approx(70.0))
    assert (line["chosen_calibrator"], line["chosen_calibrator_drop"]) == (
        "best_calibrator (mse)",
        pytest.approx(75.0),
    )
    assert line["gain_over_chosen_calibrator"] == pytest.approx(69.0)
    assert line["chosen_finetune"] == "finetune+best_calibrator (mse)"
    found = claims(rows, comparison, NO_FRAMES)
    chosen = by_statement(found, "The drop shrinks against the calibrator chosen on validation items at W6A6")
    best = by_statement(found, "The drop shrinks against the best calibrator at W6A6, chosen after the fact")
    assert chosen.measured.startswith("69.0 [")
    assert "tiny_vit best_calibrator (mse), tiny_bert best_calibrator (mse)" in chosen.measured
    assert best.measured.startswith("64.0 [")
    assert "on the test items themselves" in best.how
    assert "on the test items" not in chosen.how
    control = by_statement(found, "Control with a calibrator chosen on validation items, at W6A6")
    assert "finetune+best_calibrator (mse)" in control.measured


def test_methods_from_outside_compete_at_once(
    suite: Suite, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A calibrator, a published method and a trained one that no file of the report names."""
    METHODS.names()
    accuracy = {"fresh_rule": 76.0, "fresh_rival": 88.0, "fresh_tuned": 87.0}
    for name, like in (("fresh_rule", "mse"), ("fresh_rival", "fq_vit"), ("fresh_tuned", "quanttune")):
        kind = type(name, (METHODS.get(like),), {"name": name})
        monkeypatch.setitem(METHODS._items, name, kind)
        monkeypatch.setitem(ACCURACY, name, dict.fromkeys(("W8A8", "W6A6"), accuracy[name]))
    methods = (*suite.methods, *(MethodSpec(name) for name in accuracy))
    rows = fill(store, dataclasses.replace(suite, methods=methods))
    comparison = Comparison(rows)
    assert comparison.rivals(CALIBRATORS) == ["minmax", "mse", "fresh_rule"]
    assert comparison.rivals(STATE_OF_THE_ART) == ["fresh_rival", "fresh_tuned"]
    line = comparison_frame(comparison).iloc[0]
    assert (line["best_calibrator"], line["best_state_of_the_art"]) == ("fresh_rule", "fresh_rival")
    assert line["gain_over_state_of_the_art"] == pytest.approx(1.0)
    claim = by_statement(claims(rows, comparison, NO_FRAMES), "More accurate than the state of the art")
    assert "over fresh_rival" in claim.measured
    words = " ".join(" ".join(Page(make_report(rows, NO_FRAMES)).words).split())
    assert "Calibrators on the reference: minmax, mse, fresh_rule." in words
    assert "fresh_rival, drop 2.0" in words
