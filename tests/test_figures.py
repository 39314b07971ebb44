"""Figures say what was measured, measure it once, and look the same every time."""

from __future__ import annotations

import dataclasses
import re
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner, Result
from matplotlib.figure import Figure

import benchmark.session
from baselines.training import FineTuning
from benchmark.cells import expand
from benchmark.cli import cli
from benchmark.report import canvas, frames, panels
from benchmark.report.analyses import ModelAnalysis, analyses_of
from benchmark.report.figures import FIGURES, SPECS, choose, csv_of, svg_of
from benchmark.report.overview import draw_overview, overview_frame
from benchmark.report.rows import SuiteRows, collect_rows
from benchmark.report.site_tables import REACHES, RULES
from benchmark.report.tables import make_table
from benchmark.runner import CellRunner, Settings
from benchmark.store import Store
from benchmark.suite import load_suite
from quanttune.analysis import SATURATIONS, decompose, infinity_norms
from quanttune.errors import ConfigError, StoreError, UnknownNameError
from quanttune.quantization import RANGE_RULES, collect_statistics

SUITE = """
models = ["tiny_vit"]
precisions = ["W8A8", "W6A6"]
calibration_items = 8
limit = 40
methods = [{name = "fp32"}, {name = "minmax"}, {name = "mse"}, {name = "finetune"}, {name = "quanttune"}]
"""


@pytest.fixture(scope="module")
def suite_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("suite") / "drawn.toml"
    path.write_text(SUITE)
    return path


@pytest.fixture(scope="module")
def results(suite_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished suite of a tiny model of a real class."""
    folder = tmp_path_factory.mktemp("drawn") / "results"
    threads = torch.get_num_threads()
    runner = CellRunner(Settings(folder), lambda *_: None)
    for cell in expand(load_suite(str(suite_file))):
        assert runner.run(cell).status == "done"
    torch.set_num_threads(threads)
    return folder


@pytest.fixture(scope="module")
def rows(results: Path, suite_file: Path) -> SuiteRows:
    return collect_rows(Store(results), load_suite(str(suite_file)))


@pytest.fixture(scope="module")
def analysis(rows: SuiteRows, results: Path) -> ModelAnalysis:
    (found,) = analyses_of(rows, Store(results), torch.device("cpu"), lambda *_: None)
    return found


@pytest.fixture(scope="module")
def data(rows: SuiteRows, analysis: ModelAnalysis) -> dict[str, pd.DataFrame]:
    return {
        spec.name: spec.of_suite(rows) if spec.of_suite else spec.of_model(analysis, 40)  # type: ignore[misc]
        for spec in SPECS
    }


def call(command: str, suite_file: Path, results: Path, *more: str) -> Result:
    threads = torch.get_num_threads()
    try:
        return CliRunner().invoke(
            cli, [command, "--suite", str(suite_file), "--results", str(results), *more]
        )
    finally:
        torch.set_num_threads(threads)


# --- what the figures say


def test_the_overview_is_the_table(rows: SuiteRows) -> None:
    frame = overview_frame(rows)
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


def test_every_site_is_measured_before_and_after(analysis: ModelAnalysis, data: dict[str, Any]) -> None:
    frame = data["outliers"]
    assert list(dict.fromkeys(frame["weights"])) == ["reference", "finetune", "quanttune"]
    session = benchmark.session.Session("tiny_vit", analysis._stages, torch.device("cpu"), lambda *_: None)
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
    layers = frames.by_layer(frame)
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
    worst = reference.sort_values("ratio", ascending=False)["site"].head(frames.WORST_SITES)
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
    edges, binned = frames.coarse_bins(values, counts)
    assert (np.diff(edges) > 0).all()
    assert binned.sum() == counts.sum()
    assert edges[0] <= values[0]
    for value in ([0.0], [5.0, 5.0]):
        _, binned = frames.coarse_bins(np.array(value), np.ones(len(value)))
        assert binned.sum() == len(value)


# --- measured once


def test_a_second_call_needs_no_model_and_writes_the_same_bytes(
    results: Path, suite_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = call("figure", suite_file, results, "--items", "40")
    assert first.exit_code == 0, first.output
    written = {path.name: path.read_bytes() for path in (results / "figures").iterdir()}
    names = {f"drawn-{spec.name}.{form}" for spec in SPECS for form in ("pdf", "svg", "csv")}
    assert set(written) == names | {"drawn-overview.png"}
    assert sorted(first.stdout.split()) == sorted(str(results / "figures" / name) for name in written)

    def refuse(*arguments: object) -> None:
        raise AssertionError("a model was made")

    monkeypatch.setattr(benchmark.session, "Session", refuse)
    for path in (results / "figures").iterdir():
        path.unlink()
    second = call("figure", suite_file, results, "--items", "40")
    assert second.exit_code == 0, second.output
    assert {path.name: path.read_bytes() for path in (results / "figures").iterdir()} == written
    one = call("figure", suite_file, results, "--only", "overview")
    assert len(one.stdout.split()) == 4


def test_the_csv_beside_a_figure_is_its_data(results: Path, suite_file: Path, data: dict[str, Any]) -> None:
    assert call("figure", suite_file, results, "--items", "40").exit_code == 0
    for spec in SPECS:
        read = pd.read_csv(results / "figures" / f"drawn-{spec.name}.csv")
        pd.testing.assert_frame_equal(read, data[spec.name], check_dtype=False, rtol=1e-8)
        svg_of(spec, read)  # what is kept is enough to draw it again


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
    for path in (copied / "stages" / "tuning").iterdir():
        path.rename(path.with_name(path.stem[::-1] + path.suffix))

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


# --- how they look


def drawn(name: str, data: dict[str, Any]) -> Figure:
    with canvas.style():
        return FIGURES[name].draw(data[name])


@pytest.mark.parametrize("name", FIGURES)
def test_files_are_whole_and_carry_no_date(name: str, data: dict[str, Any]) -> None:
    with canvas.style():
        figure = FIGURES[name].draw(data[name])
        contents = {form: canvas.rendered(figure, form) for form in ("svg", "pdf", "png")}
    root = ElementTree.fromstring(contents["svg"])  # noqa: S314 - our own file
    assert root.tag.endswith("svg")
    assert contents["pdf"].startswith(b"%PDF")
    assert contents["png"].startswith(b"\x89PNG")
    for content in contents.values():
        assert b"CreationDate" not in content
        assert not re.search(rb"20\d\d-\d\d-\d\dT", content)
        assert b"matplotlib" not in content.lower() or b"Matplotlib v" not in content
    with pytest.raises(ConfigError, match="pdf"):
        canvas.rendered(figure, "bmp")


def test_lines_differ_without_colour(data: dict[str, Any]) -> None:
    for name in ("outliers", "saturation"):
        for axes in drawn(name, data).axes:
            looks = [(str(line._dash_pattern), line.get_marker()) for line in axes.get_lines()]
            assert len(set(looks)) == len(looks) >= 3
    for axes in drawn("histograms", data).axes:
        looks = [str(patch._dash_pattern) for patch in axes.patches]
        assert len(set(looks)) == len(looks) == 3
    seven = [(str(panels._line(index)["linestyle"]), panels._line(index)["marker"]) for index in range(7)]
    assert len(set(seven)) == 7


def test_bars_differ_without_colour(data: dict[str, Any]) -> None:
    looks = {}
    for bars in drawn("decomposition", data).axes[0].containers:
        face = bars.patches[0].get_facecolor()
        looks[bars.get_label()] = (
            round(0.3 * face[0] + 0.59 * face[1] + 0.11 * face[2], 2),
            bars.patches[0].get_hatch(),
        )
    named = {label: look for label, look in looks.items() if not label.startswith("_")}
    assert len(named) == len(set(named.values())) == 4


def test_markers_of_the_overview_differ_without_colour(data: dict[str, Any]) -> None:
    (legend,) = drawn("overview", data).legends
    assert [text.get_text() for text in legend.get_texts()] == ["W8A8", "W6A6", "own weights, unquantized"]
    assert len({handle.get_marker() for handle in legend.legend_handles}) == 3  # type: ignore[union-attr]


def test_every_method_and_model_has_its_place_in_the_overview(data: dict[str, Any]) -> None:
    frame = data["overview"]
    twice = pd.concat([frame, frame.assign(panel="other model", drop=0.0, low=0.0, high=0.0)])
    with canvas.style():
        figure = draw_overview(twice)
    assert [axes.get_title(loc="left").partition(":")[0] for axes in figure.axes] == [
        "tiny_vit",
        "other model",
    ]
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == list(
        dict.fromkeys(frame["method"])
    )
    low, high = figure.axes[1].get_xlim()
    assert high - low >= 2  # no difference does not look like one


@pytest.mark.parametrize(("count", "shape"), [(1, (1, 1)), (2, (1, 2)), (3, (2, 2)), (5, (3, 2))])
def test_two_panels_of_the_overview_stand_side_by_side(count: int, shape: tuple[int, int]) -> None:
    line = {"method": "minmax", "precision": "W8A8", "drop": 1.0, "low": 0.5, "high": 1.5, "value": 84.0}
    rest = {"fp32": 85.0, "metric": "accuracy", "higher_is_better": True}
    frame = pd.DataFrame([{"panel": f"model {index}", **line, **rest} for index in range(count)])
    with canvas.style():
        figure = draw_overview(frame)
    drawn = [axes for axes in figure.axes if axes.get_title(loc="left")]
    assert len(drawn) == count
    assert figure.axes[0].get_gridspec().get_geometry() == shape


def test_a_rise_of_perplexity_is_drawn_to_the_right_and_by_powers_if_it_explodes(
    data: dict[str, Any],
) -> None:
    frame = data["overview"].assign(metric="perplexity", higher_is_better=False, fp32=30.0)
    frame = frame.assign(drop=-5.0, low=-6.0, high=-4.0)
    exploded = frame.assign(panel="exploded", drop=-40_000.0, low=-41_000.0, high=-39_000.0)
    with canvas.style():
        figure = draw_overview(pd.concat([frame, exploded]))
    first, second = figure.axes
    assert first.get_xlabel() == "rise (perplexity); left is better"
    assert first.get_title(loc="left") == "tiny_vit: FP32 perplexity 30.00"
    points = {float(x) for line in first.lines if line.get_marker() != "None" for x in line.get_xdata()}
    assert points == {5.0}
    assert (first.get_xscale(), second.get_xscale()) == ("linear", "symlog")


def test_drawing_leaves_the_users_settings_alone(data: dict[str, Any]) -> None:
    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context({"font.size": 30, "svg.hashsalt": None, "lines.linewidth": 9}):
        mine = dict(matplotlib.rcParams)
        changed = svg_of(FIGURES["outliers"], data["outliers"])
        assert dict(matplotlib.rcParams) == mine
    assert dict(matplotlib.rcParams) == before
    assert changed == svg_of(FIGURES["outliers"], data["outliers"])
    from matplotlib import _pylab_helpers

    assert not _pylab_helpers.Gcf.figs


def test_numbers_are_written_short() -> None:
    assert csv_of(pd.DataFrame({"a": [1 / 3, 2.0], "b": ["x,y", None]})) == 'a,b\n0.333333333,"x,y"\n2,\n'


# --- what is refused


def test_names_are_suggested(suite_file: Path, results: Path) -> None:
    with pytest.raises(UnknownNameError, match="did you mean saturation"):
        choose(["saturtion"])
    assert [spec.name for spec in choose(["histograms", "overview"])] == ["overview", "histograms"]
    assert choose([]) == list(SPECS)
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
    partial = call(command, wide, results, "--allow-partial", "--items", "40")
    assert partial.exit_code == 0, partial.output
    assert "partial: 9 of 17 cells" in partial.stderr
    empty = call(command, wide, tmp_path / "empty", "--allow-partial")
    assert empty.exit_code == 2
    assert "nothing to draw" in empty.output
    assert not (tmp_path / "empty").exists()
