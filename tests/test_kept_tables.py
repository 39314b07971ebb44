"""The tables and overviews kept in ``results/`` come out of the published records, byte for byte.

Those of suites that are not published come out of their own rows. Ids alone may differ there: some fine-tuned
cells were measured before their methods had all of today's parameters.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmark.engine.noise import COPIES, RELATIVE
from benchmark.grid.expand import expand
from benchmark.grid.suite import DEFAULT_SUITE, load_suite, suite_names
from benchmark.keep.record import Noise, Record, Result
from benchmark.keep.reference_store import ReferenceStore, reference_folder
from benchmark.keep.store import Store
from benchmark.report.figures.overview import Overview
from benchmark.report.gallery import csv_of
from benchmark.report.latex import to_latex
from benchmark.report.rows import SuiteRows, collect_rows
from benchmark.report.tables import make_table, to_frame, to_markdown
from benchmark.views import suites_with_results
from quanttune.digests import json_digest

ENGINE_OF = {"rivals": 3}
"""What measured them, where it was not the first engine; raised when they are measured again."""
RAISED_SINCE = frozenset({"base_ptq", "fq_vit", "ptq4vit"})
"""Methods whose versions are others than when the first engine measured."""

ROOT = Path(__file__).parents[1]
TABLES = ROOT / "results" / "tables"
KEPT = sorted(path.stem for path in TABLES.glob("*.json") if not path.stem.endswith(("-cost", "-published")))
OVERVIEWS = [name for name in KEPT if (ROOT / "results" / "figures" / f"{name}-overview.csv").exists()]


def without_ids(text: str) -> str:
    return re.sub(r"\b[0-9a-f]{64}\b", "ID", text)


def kept_rows(name: str) -> SuiteRows:
    """The rows of a suite as its kept JSON has them; searches are suites of :mod:`benchmark.studies`."""
    suite = load_suite(
        name if name in suite_names() else str(ROOT / "benchmark" / "studies" / f"{name}.toml")
    )
    folder = reference_folder()
    published = None if folder is None else ReferenceStore(folder)
    if published is not None and name in published.suites:
        return collect_rows(published, suite)
    cells = expand(suite)
    records = {}
    for cell, line in zip(cells, json.loads((TABLES / f"{name}.json").read_text()), strict=True):
        engine = ENGINE_OF.get(name, 1)
        kept_id = json_digest(cell.identity() | {"engine": engine})
        changed = cell.make_method().trains or (engine == 1 and cell.method in RAISED_SINCE)
        assert changed or kept_id == line["cell_id"]
        result = None
        if line["value"] is not None:
            # the sign of every metric of these tables that should be low
            higher = line["metric"] != "perplexity"
            numbers = {
                field: line[field]
                for field in ("value", "fp32", "fp32_own", "drop", "ci_low", "ci_high", "n")
            }
            noise = None
            if line.get("noise_items") is not None:
                kept = {part: line[f"noise_{part}"] for part in ("mean", "deviation", "common", "items")}
                noise = Noise(copies=COPIES, relative=RELATIVE, flips=line["flips"], **kept)
            result = Result(metric=line["metric"], higher_is_better=higher, noise=noise, **numbers)
        records[cell.cell_id] = Record(
            cell, line["status"], "", line["duration_s"], result, weights_digest=cell.training_group
        )
    return SuiteRows(suite, cells, records, {}, Store(ROOT / "results"))


@pytest.mark.parametrize("name", KEPT)
def test_every_form_of_a_kept_table_is_of_its_rows(name: str) -> None:
    rows = kept_rows(name)
    table = make_table(rows)
    made = {
        "json": json.dumps(rows.to_json(), indent=1) + "\n",
        "csv": to_frame(rows).to_csv(index=False, lineterminator="\n"),
        "md": to_markdown(table),
        "tex": to_latex(table, f"tab:{name}"),
    }
    for ending, text in made.items():
        kept = (TABLES / f"{name}.{ending}").read_text(encoding="utf-8")
        assert without_ids(text) == without_ids(kept), ending


@pytest.mark.parametrize("name", OVERVIEWS)
def test_a_kept_overview_is_of_its_rows(name: str) -> None:
    kept = ROOT / "results" / "figures" / f"{name}-overview.csv"
    assert csv_of(Overview("overview").frame(kept_rows(name))) == kept.read_text(encoding="utf-8")


def test_the_leaderboard_of_what_is_published_begins_with_the_main_job() -> None:
    folder = reference_folder()
    assert folder is not None
    published = ReferenceStore(folder)
    first, *others = suites_with_results(published)
    assert first == DEFAULT_SUITE
    assert sorted([first, *others]) == sorted(published.suites)
