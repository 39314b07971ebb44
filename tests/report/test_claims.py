"""The paper's claims: what is measured of each, and the verdict that follows."""

from __future__ import annotations

import dataclasses

import pytest

from benchmark.keep.store import Store
from benchmark.report.claims import ABSENT, _verdict, claims
from benchmark.report.comparison import Comparison, Estimate, comparison_frame
from benchmark.report.rows import SuiteRows
from tests.report.made_rows import NO_FRAMES, by_statement, frames_of_figures


@pytest.mark.parametrize(
    ("gain", "stated", "before", "verdict"),
    [
        (Estimate(30.0, 25.0, 35.0), 12.09, 40.0, "reached"),
        (Estimate(13.0, 11.0, 15.0), 12.09, 40.0, "open: the interval holds the stated value"),
        (Estimate(5.0, 4.0, 6.0), 12.09, 40.0, "not reached"),
        (Estimate(5.0, 4.0, 6.0), 12.09, 6.0, "not reached; the rival loses only 6.0 points"),
        (Estimate(2.0, 0.5, 3.0), None, 9.0, "better"),
        (Estimate(0.0, -1.0, 1.0), None, 9.0, "no difference shown"),
        (Estimate(-2.0, -3.0, -1.0), None, 9.0, "worse"),
    ],
)
def test_verdicts(gain: Estimate, stated: float | None, before: float, verdict: str) -> None:
    assert _verdict(gain, stated, before).startswith(verdict)


def test_claims_of_the_store(rows: SuiteRows, store: Store) -> None:
    found = claims(rows, Comparison(rows), NO_FRAMES)
    first = by_statement(found, "The drop shrinks against the best calibrator at W8A8")
    assert first.stated == "12.09"
    assert first.measured.startswith("14.0 [")
    assert "from 15.0 to 1.0" in first.measured
    assert first.verdict == "open: the interval holds the stated value"
    six = by_statement(found, "The drop shrinks against the best calibrator at W6A6")
    assert (six.stated, six.verdict) == ("-", "better")
    kept = by_statement(found, "Accuracy is kept at 6 bits")
    assert kept.measured == "tiny_vit 7.0 points, tiny_bert 7.0 points"  # against training's 91
    assert kept.verdict == "kept on 0 of 2 models"
    assert by_statement(found, "Inference needs no extra operation").verdict == "holds"
    control = by_statement(found, "Control: the outlier loss does it, not the fine-tuning, at W8A8")
    assert "finetune+mse" in control.measured
    for start in (
        "The drop shrinks against the calibrator chosen on validation items at W8A8",
        "Control with a calibrator chosen on validation items, at W6A6",
        "Share of the",
        "Precision loss",
        "How far ranges",
        "The range grows",
        "More accurate than",
    ):
        assert by_statement(found, start).verdict == ABSENT


def test_claims_of_the_figures(rows: SuiteRows, store: Store) -> None:
    found = claims(rows, Comparison(rows), frames_of_figures())
    share = by_statement(found, "Share of the")
    assert share.stated == "65 %"
    assert share.measured == (
        "60 % (W8A8 70 %, W6A6 50 %; one 60 %, two 60 %; with another limit of the ordinary: "
        "60 % at 4, 60 % at 5, 10 % at 8 deviations)"
    )
    assert share.verdict == "agrees"
    assert by_statement(found, "Precision loss").measured == "minmax 100 %, mse 40 %"
    assert by_statement(found, "Precision loss").verdict == "does not hold with mse"
    sweep = by_statement(found, "How far ranges")
    assert sweep.measured == "one W8A8 50.0 to 80.0 at 10 %"
    assert sweep.verdict == "clipping helps in 1 of 1 cases"
    depth = by_statement(found, "The range grows")
    assert depth.measured == "one 1.00, two -1.00"
    assert depth.verdict == "holds for 1 of 2 models"


def test_points_are_compared_of_models_measured_in_accuracy_alone(rows: SuiteRows, store: Store) -> None:
    records = {
        cell_id: record
        if record.cell.model == "tiny_vit" or record.result is None
        else dataclasses.replace(record, result=dataclasses.replace(record.result, metric="perplexity"))
        for cell_id, record in rows.records.items()
    }
    mixed = dataclasses.replace(rows, records=records)
    comparison = Comparison(mixed)
    assert comparison.models == ["tiny_vit"]
    assert set(comparison_frame(comparison)["model"]) == {"tiny_vit"}
    kept = by_statement(claims(mixed, comparison, NO_FRAMES), "Accuracy is kept")
    assert "tiny_vit" in kept.measured
    assert "tiny_bert" not in kept.measured
