"""The tables and overviews kept in ``results/`` come out of the published records, byte for byte."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmark.grid.suite import DEFAULT_SUITE, load_suite
from benchmark.keep.reference_store import ReferenceStore, reference_folder
from benchmark.report.figures.overview import Overview
from benchmark.report.gallery import csv_of
from benchmark.report.latex import to_latex
from benchmark.report.rows import SuiteRows, collect_rows
from benchmark.report.tables import make_table, to_frame, to_markdown
from benchmark.views import suites_with_results

ROOT = Path(__file__).parents[1]
TABLES = ROOT / "results" / "tables"
KEPT = sorted(path.stem for path in TABLES.glob("*.json") if not path.stem.endswith(("-cost", "-published")))
OVERVIEWS = [name for name in KEPT if (ROOT / "results" / "figures" / f"{name}-overview.csv").exists()]


def published() -> ReferenceStore:
    folder = reference_folder()
    assert folder is not None
    return ReferenceStore(folder)


def kept_rows(name: str) -> SuiteRows:
    return collect_rows(published(), load_suite(name))


def test_every_kept_table_can_be_opened_number_by_number() -> None:
    assert sorted(published().suites) == KEPT


@pytest.mark.parametrize("name", KEPT)
def test_every_form_of_a_kept_table_is_of_its_records(name: str) -> None:
    rows = kept_rows(name)
    table = make_table(rows)
    made = {
        "json": json.dumps(rows.to_json(), indent=1) + "\n",
        "csv": to_frame(rows).to_csv(index=False, lineterminator="\n"),
        "md": to_markdown(table),
        "tex": to_latex(table, f"tab:{name}"),
    }
    for ending, text in made.items():
        assert text == (TABLES / f"{name}.{ending}").read_text(encoding="utf-8"), ending


@pytest.mark.parametrize("name", OVERVIEWS)
def test_a_kept_overview_is_of_its_records(name: str) -> None:
    kept = ROOT / "results" / "figures" / f"{name}-overview.csv"
    assert csv_of(Overview("overview").frame(kept_rows(name))) == kept.read_text(encoding="utf-8")


def test_the_leaderboard_of_what_is_published_begins_with_the_main_job() -> None:
    first, *others = suites_with_results(published())
    assert first == DEFAULT_SUITE
    assert sorted([first, *others]) == sorted(published().suites)
