"""Figures and reports read; what only the models can tell is measured by ``analyse``, once."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch

from benchmark.engine.session import Session
from benchmark.keep.store import Store
from benchmark.report.analyses import ModelAnalysis, NotMeasuredError, analyses_of
from benchmark.report.figures.figure import FIGURES, ModelFigure, choose
from benchmark.report.gallery import make_frames
from benchmark.report.rows import SuiteRows, collect_rows
from benchmark.report.site.site_errors import CAUSES, ErrorsBySite
from tests.figures.conftest import DRAWN, call

MODEL_FIGURES = {name for name, kind in FIGURES.items() if issubclass(kind, ModelFigure)}


@pytest.fixture
def bare(results: Path, tmp_path: Path) -> Path:
    """The finished suite with none of its models analysed."""
    copied = tmp_path / "results"
    shutil.copytree(results, copied)
    for stage in ("site_analysis", "histograms", "saturation"):
        shutil.rmtree(copied / "stages" / stage, ignore_errors=True)
    shutil.rmtree(copied / "figures", ignore_errors=True)
    return copied


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("a model was made")

    monkeypatch.setattr("benchmark.report.analyses.Session", refuse)


def test_what_is_not_measured_is_named_with_its_remedy(suite_file: Path, bare: Path, no_model: None) -> None:
    drawn = call("figure", suite_file, bare, "--items", "40")
    assert drawn.exit_code == 0, drawn.output
    written = {path.name for path in (bare / "figures").iterdir()}
    assert not any(name in file for name in MODEL_FIGURES for file in written)
    assert "drawn-overview.svg" in written
    (line,) = (line for line in drawn.stderr.splitlines() if line.startswith("not measured: "))
    assert set(line.removeprefix("not measured: ").split(" (")[0].split(", ")) >= MODEL_FIGURES
    assert "(tiny_vit)" in line
    command = line.partition("`python -m benchmark ")[2].rstrip("`").split()
    assert command == ["analyse", "--suite", str(suite_file), "--items", "40", "--results", str(bare)]
    reported = call("report", suite_file, bare, "--items", "40")
    assert reported.exit_code == 0, reported.output
    assert line in reported.stderr.splitlines()


def test_an_analysis_is_measured_once_and_read_to_the_bit(
    suite_file: Path, bare: Path, data: dict[str, pd.DataFrame], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = call("analyse", suite_file, bare, "--items", "40")
    assert first.exit_code == 0, first.output
    assert first.stdout == "models of suite drawn analysed: 1\n"
    assert not (bare / "figures").exists()

    def refuse(*arguments: object) -> None:
        raise AssertionError("a model was made")

    monkeypatch.setattr("benchmark.report.analyses.Session", refuse)
    assert call("analyse", suite_file, bare, "--items", "40").exit_code == 0
    # 500 items are all of the limit's 40, and so what is kept already
    again = call("run", suite_file, bare, "--all", "--analyse", "--no-tracking")
    assert again.exit_code == 0, again.output
    assert again.stdout.endswith("models of suite drawn analysed: 1\n")
    part = call("run", suite_file, bare, "--method", "mse", "--analyse")
    assert part.exit_code == 2
    assert "--analyse needs a whole suite" in part.output
    drawn = call("figure", suite_file, bare, "--items", "40")
    assert drawn.exit_code == 0, drawn.output
    assert "not measured" not in drawn.stderr
    written = {path.name: path.read_bytes() for path in (bare / "figures").iterdir()}
    names = {f"drawn-{name}.{form}" for name in DRAWN for form in ("pdf", "svg", "csv")}
    previews = {f"drawn-{name}.png" for name, kind in FIGURES.items() if kind.preview and name in DRAWN}
    assert set(written) == names | previews
    assert sorted(drawn.stdout.split()) == sorted(str(bare / "figures" / name) for name in written)
    for figure in choose(DRAWN):
        read = pd.read_csv(bare / "figures" / f"drawn-{figure.name}.csv")
        pd.testing.assert_frame_equal(read, data[figure.name], check_dtype=False, rtol=1e-8)
    assert call("figure", suite_file, bare, "--items", "40").exit_code == 0
    assert {path.name: path.read_bytes() for path in (bare / "figures").iterdir()} == written
    assert len(call("figure", suite_file, bare, "--only", "overview").stdout.split()) == 4


def test_a_part_is_measured_by_name_and_the_rest_stays_named(suite_file: Path, bare: Path) -> None:
    assert call("analyse", suite_file, bare, "--items", "40", "--only", "outliers").exit_code == 0
    assert not (bare / "stages" / "saturation").exists()
    drawn = call("figure", suite_file, bare, "--items", "40")
    (line,) = (line for line in drawn.stderr.splitlines() if line.startswith("not measured: "))
    assert "saturation" in line
    assert "outliers" not in line
    assert (bare / "figures" / "drawn-outliers.svg").exists()


def test_a_stopped_analysis_goes_on_where_it_was(
    suite_file: Path, bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmark.report import analyses

    sweep = analyses.saturation_scores
    calls: list[str] = []

    def stopped(session: Session, cell: object, precision: str, *rest: object) -> dict[str, torch.Tensor]:
        calls.append(precision)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return sweep(session, cell, precision, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(analyses, "saturation_scores", stopped)
    interrupted = call("analyse", suite_file, bare, "--items", "20")
    assert interrupted.exit_code == 130
    assert "the same command goes on" in interrupted.stderr
    assert call("analyse", suite_file, bare, "--items", "20").exit_code == 0
    assert calls == ["W8A8", "W6A6", "W6A6"]


def test_the_errors_of_a_cells_sites_are_those_of_its_rule_and_weights(
    rows: SuiteRows, analysis: ModelAnalysis, data: dict[str, pd.DataFrame]
) -> None:
    errors = ErrorsBySite([analysis])
    sites = [site for site, _ in analysis.sites]
    for method, rule, weights in (("mse", "mse", 0), ("quanttune", "minmax", 2)):
        record = next(
            found
            for found in rows.records.values()
            if (found.cell.method, found.cell.precision) == (method, "W6A6")
        )
        told = errors.of(record)
        assert list(told) == sites
        lines = analysis.errors(analysis.weight_sets[weights])
        parts = [parts for precision, other, parts in lines if (precision, other) == ("W6A6", rule)]
        for site, kept in zip(sites, parts, strict=True):
            error = sum(kept[name] for name in CAUSES)
            if error:
                assert 10 ** (told[site]["snr"] / 10) == pytest.approx(kept["energy"] / error)
                largest = max(CAUSES, key=lambda name: kept[name])
                assert told[site]["cause"].startswith(CAUSES[largest])
            assert told[site]["clipped"] == 100 * kept["clipped"]
    (reference,) = (found for found in rows.records.values() if found.cell.is_reference)
    assert errors.of(reference) == {}
    other = dataclasses.replace(record, cell=dataclasses.replace(record.cell, seed=7))
    assert errors.of(other) == {}


def test_a_reader_measures_nothing_and_is_told_by_figure(rows: SuiteRows, bare: Path) -> None:
    store = Store(bare)
    rows = collect_rows(store, rows.suite)
    (reader,) = analyses_of(rows, store, torch.device("cpu"), None)
    with pytest.raises(NotMeasuredError, match="site_analysis of tiny_vit"):
        reader.metrics(reader.weight_sets[0])
    absent: dict[str, list[str]] = {}
    frames = make_frames(choose(), rows, [reader], 40, absent)
    assert absent == {figure.name: ["tiny_vit"] for figure in choose() if isinstance(figure, ModelFigure)}
    assert all(not len(frames[name]) for name in absent)
    assert not list((bare / "stages").glob("site_analysis/*"))
    (measurer,) = analyses_of(rows, store, torch.device("cpu"), lambda *_: None)
    assert isinstance(measurer, ModelAnalysis)
    assert measurer.metrics(measurer.weight_sets[0]) == reader.metrics(reader.weight_sets[0])
