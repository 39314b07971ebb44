"""Figures say what was measured, measure it once, and refuse what they cannot draw."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner

from baselines.training import FineTuning
from benchmark.cli import cli
from benchmark.engine.runner import CellRunner, Settings
from benchmark.engine.session import Session
from benchmark.grid.expand import expand
from benchmark.grid.suite import load_suite
from benchmark.keep.reference_store import ReferenceStore, reference_folder
from benchmark.keep.store import Store
from benchmark.report.analyses import ModelAnalysis, analyses_of
from benchmark.report.figures.figure import FIGURES, choose
from benchmark.report.figures.histograms import WORST_SITES, coarse_bins
from benchmark.report.figures.outliers import by_layer
from benchmark.report.figures.overview import Overview
from benchmark.report.gallery import svg_of
from benchmark.report.rows import SuiteRows, collect_rows, rows_of
from benchmark.report.site_tables import REACHES, RULES
from benchmark.report.tables import make_table
from quanttune.analysis import SATURATIONS, decompose, infinity_norms
from quanttune.digests import json_digest
from quanttune.errors import StoreError, UnknownNameError
from quanttune.quantization import RANGE_RULES, collect_statistics
from tests.figures.conftest import DRAWN, SUITE, call


def test_the_overview_is_the_table(rows: SuiteRows) -> None:
    frame = Overview("overview").frame(rows)
    measured = [record for record in rows.records.values() if not record.cell.is_reference]
    lines = frame[frame["precision"] != "FP32"]
    assert len(lines) == len(measured)
    for record in measured:
        at = (lines["method"] == record.cell.label) & (lines["precision"] == record.cell.precision)
        (line,) = lines[at].to_dict("records")
        assert record.result is not None
        for column, value in (("drop", "drop"), ("low", "ci_low"), ("high", "ci_high"), ("value", "value")):
            assert line[column] == getattr(record.result, value)
    own = frame[frame["precision"] == "FP32"]
    assert set(own["method"]) == {"finetune", "quanttune"}
    tuned = next(record.result for record in measured if record.cell.method == "quanttune")
    assert tuned is not None
    assert tuned.fp32_own is not None
    (drop,) = own[own["method"] == "quanttune"]["drop"]
    assert drop == pytest.approx(tuned.fp32 - tuned.fp32_own)
    assert list(dict.fromkeys(frame["method"])) == make_table(rows).methods[1:]


def test_own_weights_stand_in_every_panel_of_their_model() -> None:
    """A suite of two profiles has two panels a model, and none for the weights alone."""
    suite = load_suite("rivals_searched")
    store = ReferenceStore(reference_folder()).of_suite(suite.name)
    frame = Overview("overview").frame(rows_of(store, suite, expand(suite)))
    assert list(dict.fromkeys(frame["panel"])) == [
        f"{model} {profile}" for model in suite.models for profile in suite.profiles
    ]
    own = frame[frame["precision"] == "FP32"]
    assert sorted(own["method"]) == ["adaround"] * 4 + ["brecq"] * 4
    assert own.groupby(["method", own["panel"].str.partition(" ")[0]])["drop"].nunique().eq(1).all()


def test_every_site_is_measured_before_and_after(analysis: ModelAnalysis, data: dict[str, Any]) -> None:
    frame = data["outliers"]
    assert list(dict.fromkeys(frame["weights"])) == ["reference", "finetune", "quanttune"]
    session = Session("tiny_vit", analysis._stages, torch.device("cpu"), lambda *_: None)
    context = session.context(analysis.cell)
    reference = session.entry.make_reference(analysis._stages, lambda *_: None)
    tuned = next(weights for weights in analysis.weight_sets if weights.name == "quanttune")
    weights = tuned.cell.make_method().quantize(analysis._session.context(tuned.cell)).weights
    for name, state in (("reference", reference), ("quanttune", weights)):
        model = session.entry.build()
        model.load_state_dict(state)
        batches = [batch.inputs for batch in context.calibration]
        statistics = collect_statistics(model, batches, context.profile_sites)
        norms = infinity_norms(model, batches, context.profile_sites)
        part = frame[frame["weights"] == name].set_index("site")
        assert list(part.index) == list(statistics)
        for site_id, summary in statistics.items():
            line = part.loc[site_id]
            assert line["ratio"] == pytest.approx(summary.ratio)
            assert line["kurtosis"] == pytest.approx(summary.kurtosis)
            assert line["range"] == pytest.approx(summary.high - summary.low)
            assert line["inf_norm"] == pytest.approx(norms[site_id])


def test_layers_take_the_largest_of_their_sites(data: dict[str, Any]) -> None:
    frame = data["outliers"]
    layers = by_layer(frame)
    assert list(dict.fromkeys(layers["layer"])) == ["in", "blocks.0", "blocks.1", "out"]
    part = frame[(frame["weights"] == "reference") & (frame["layer"] == "blocks.1")]
    kept = part[~part["site"].str.contains("softmax")]
    assert len(kept) < len(part)
    line = layers[(layers["weights"] == "reference") & (layers["layer"] == "blocks.1")].iloc[0]
    for column in ("ratio", "kurtosis", "range", "inf_norm"):
        assert line[column] == kept[column].max()


def test_shares_are_means_over_the_sites(analysis: ModelAnalysis, data: dict[str, Any]) -> None:
    frame = data["decomposition"]
    assert len(frame) == 3 * 2 * len(RULES)
    causes = ["ordinary", "amplification", "outliers", "saturation"]
    assert np.allclose(frame[causes].sum(axis=1), 1)
    assert (frame[frame["rule"] == "minmax"]["saturation"] == 0).all()
    statistics = analysis.statistics(analysis.weight_sets[0], [site_id for site_id, _ in analysis.sites])
    for rule in ("minmax", "mse"):
        found = [decompose(summary, 6, RANGE_RULES.get(rule)).shares for summary in statistics.values()]
        shares = [share for share in found if share is not None]
        at = (frame["weights"] == "reference") & (frame["precision"] == "W6A6") & (frame["rule"] == rule)
        (line,) = frame[at].to_dict("records")
        assert line["sites"] == len(shares)
        for cause in causes:
            assert line[cause] == pytest.approx(np.mean([share[cause] for share in shares]))
        if rule == "minmax":
            for reach in REACHES:
                found = [decompose(summary, 6, ordinary=reach).shares for summary in statistics.values()]
                mean = np.mean([share["amplification"] for share in found if share is not None])
                assert line[f"amplification_{reach:g}"] == pytest.approx(mean)


def test_a_sweep_without_saturation_is_the_minmax_cell(rows: SuiteRows, data: dict[str, Any]) -> None:
    frame = data["saturation"]
    assert list(frame["saturation_percent"]) == [100 * value for value in SATURATIONS] * 2
    for precision in ("W8A8", "W6A6"):
        result = next(
            record.result
            for record in rows.records.values()
            if (record.cell.method, record.cell.precision) == ("minmax", precision)
        )
        assert result is not None
        first = frame[frame["precision"] == precision].iloc[0]
        assert first["value"] == result.value
        assert first["fp32"] == result.fp32
        assert first["n"] == 40
    assert frame["value"].nunique() > 2


def test_fewer_items_are_a_sweep_of_their_own(analysis: ModelAnalysis) -> None:
    ids, scores = analysis.sweep("W6A6", 10)
    assert len(ids) == 10
    assert scores.shape == (len(SATURATIONS), 10)
    assert analysis.reference_scores(np.array([-1])) is None


def test_histograms_hold_every_value(analysis: ModelAnalysis, data: dict[str, Any]) -> None:
    frame = data["histograms"]
    outliers = data["outliers"]
    reference = outliers[(outliers["weights"] == "reference") & (outliers["kind"] != "softmax output")]
    worst = reference.sort_values("ratio", ascending=False)["site"].head(WORST_SITES)
    assert list(dict.fromkeys(frame["site"])) == list(worst)
    for _, part in frame.groupby(["site", "weights"]):
        assert (part["density"] * (part["high"] - part["low"])).sum() == pytest.approx(1)
    extremes = reference.set_index("site")
    for site in worst:
        part = frame[(frame["site"] == site) & (frame["weights"] == "reference")]
        assert part["low"].min() <= extremes.loc[site, "low"] < part["low"].min() + abs(part["low"].min())
        assert part["high"].max() >= extremes.loc[site, "high"]


@pytest.mark.parametrize("scale", [1.0, 1e-6, 3e4])
def test_coarse_bins_count_every_value_once(scale: float) -> None:
    values = np.sort(scale * np.array([-200.0, -1.5, -0.2, 0.0, 0.1, 1.0, 7.0]))
    counts = np.arange(1.0, 8.0)
    edges, binned = coarse_bins(values, counts)
    assert (np.diff(edges) > 0).all()
    assert binned.sum() == counts.sum()
    assert edges[0] <= values[0]
    for value in ([0.0], [5.0, 5.0]):
        _, binned = coarse_bins(np.array(value), np.ones(len(value)))
        assert binned.sum() == len(value)


def test_the_csv_beside_a_figure_is_its_data(results: Path, suite_file: Path, data: dict[str, Any]) -> None:
    assert call("figure", suite_file, results, "--items", "40").exit_code == 0
    for figure in choose(DRAWN):
        read = pd.read_csv(results / "figures" / f"drawn-{figure.name}.csv")
        pd.testing.assert_frame_equal(read, data[figure.name], check_dtype=False, rtol=1e-8)
        svg_of(figure, read)  # what is kept is enough to draw it again


def test_weights_that_were_not_measured_are_refused(rows: SuiteRows, results: Path) -> None:
    (other,) = analyses_of(rows, Store(results), torch.device("cpu"), lambda *_: None)
    other._reference_digest = "0" * 64
    with pytest.raises(StoreError, match="reference weights of tiny_vit are not those that were measured"):
        other.metrics(other.weight_sets[0])
    (tuned,) = analyses_of(rows, Store(results), torch.device("cpu"), lambda *_: None)
    strange = dataclasses.replace(tuned.weight_sets[1], digest="0" * 64)
    with pytest.raises(StoreError, match="finetune weights of tiny_vit are not those that were measured"):
        tuned.metrics(strange)


def test_tuned_weights_are_known_by_their_content(
    rows: SuiteRows, results: Path, tmp_path: Path, data: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later version may ask for them under another key; they need not be trained again for that."""
    copied = tmp_path / "results"
    shutil.copytree(results, copied)
    shutil.rmtree(copied / "stages" / "site_analysis")
    for sidecar in (copied / "stages" / "tuning").glob("*.json"):
        about = json.loads(sidecar.read_text())
        about["key"]["version"] = -1
        other = json_digest({"stage": "tuning", "scope": about["scope"], "key": about["key"]})
        sidecar.unlink()
        sidecar.with_name(f"{other}.json").write_text(json.dumps(about))
        weights = sidecar.with_suffix(".safetensors")
        weights.rename(weights.with_name(f"{other}.safetensors"))

    def tuned(self: FineTuning, *arguments: object) -> None:
        raise InterruptedError(self.name)

    monkeypatch.setattr(FineTuning, "_tune", tuned)
    (again,) = analyses_of(rows, Store(copied), torch.device("cpu"), lambda *_: None)
    for weights in again.weight_sets:
        part = data["outliers"][data["outliers"]["weights"] == weights.name].set_index("site")
        for site_id, metrics in again.metrics(weights).items():
            assert metrics["ratio"] == part.loc[site_id, "ratio"]
    shutil.rmtree(copied / "stages" / "tuning")
    shutil.rmtree(copied / "stages" / "site_analysis")
    with pytest.raises(InterruptedError, match="quanttune"):  # what is gone is made again
        again.metrics(again.weight_sets[2])


def test_names_are_suggested(suite_file: Path, results: Path) -> None:
    with pytest.raises(UnknownNameError, match="did you mean saturation"):
        choose(["saturtion"])
    assert [figure.name for figure in choose(["histograms", "overview"])] == ["overview", "histograms"]
    assert [figure.name for figure in choose()][:3] == ["overview", "pareto", "outliers"]
    assert {figure.name for figure in choose()} == set(FIGURES.names())
    refused = call("figure", suite_file, results, "--only", "overvew")
    assert refused.exit_code == 2
    assert "did you mean overview" in refused.output
    for command in ("figure", "report"):
        refused = CliRunner().invoke(cli, [command, "--suite", "lapto", "--results", str(results)])
        assert refused.exit_code == 2
        assert "did you mean laptop" in refused.output


@pytest.mark.parametrize("command", ["figure", "report"])
def test_a_partial_grid_is_refused_unless_asked_for(
    command: str, results: Path, suite_file: Path, tmp_path: Path
) -> None:
    wide = tmp_path / "wide.toml"
    wide.write_text(SUITE.replace("limit = 40", "limit = 40\nseeds = [0, 1]"))
    refused = call(command, wide, results)
    assert refused.exit_code == 2
    assert "9 of 17 cells of suite wide are finished" in refused.output
    assert "--allow-partial" in refused.output
    assert call("analyse", wide, results, "--allow-partial", "--items", "40").exit_code == 0
    partial = call(command, wide, results, "--allow-partial", "--items", "40")
    assert partial.exit_code == 0, partial.output
    assert "partial: 9 of 17 cells" in partial.stderr
    empty = call(command, wide, tmp_path / "empty", "--allow-partial")
    assert empty.exit_code == 2
    assert "nothing to draw" in empty.output
    assert not (tmp_path / "empty").exists()


def test_precisions_without_static_activation_ranges_take_no_part(tmp_path: Path) -> None:
    """Weights alone, or a range for every token: there is no range to analyse, and the others are as ever."""
    path = tmp_path / "mixed.toml"
    text = SUITE.replace('"W8A8", "W6A6"', '"W4", "W8A8-token", "W8A8"')
    path.write_text(text.replace(', {name = "mse"}', "").replace(', {name = "quanttune"}', ""))
    suite = load_suite(str(path))
    runner = CellRunner(Settings(tmp_path / "results"), lambda *_: None)
    threads = torch.get_num_threads()
    for cell in expand(suite):
        assert runner.run(cell).status == "done"
    torch.set_num_threads(threads)
    store = Store(tmp_path / "results")
    rows = collect_rows(store, suite)
    (found,) = analyses_of(rows, store, torch.device("cpu"), lambda *_: None)
    assert (found.precisions, found.cell.precision) == (("W8A8",), "W8A8")
    assert {weights.cell.precision for weights in found.weight_sets} == {"W8A8"}
    frame = FIGURES.get("decomposition")("decomposition").frame(found, 40)  # type: ignore[call-arg, arg-type]
    assert set(frame["precision"]) == {"W8A8"}
    assert "per tensor where the precision does not say otherwise;" in make_table(rows).caption
    none = dataclasses.replace(suite, precisions=("W4", "W8A8-token"))
    assert analyses_of(collect_rows(store, none), store, torch.device("cpu"), lambda *_: None) == []
