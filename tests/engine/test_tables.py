"""Tables say what the records say, in every form."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmark.grid.cells import Cell
from benchmark.grid.expand import expand
from benchmark.grid.suite import MethodSpec, Suite
from benchmark.keep.record import Record, Result
from benchmark.keep.store import Store
from benchmark.report.latex import column_format, document, made_here, number_cell, to_latex
from benchmark.report.published.reader import load_published, published_names
from benchmark.report.rows import SuiteRows, collect_rows
from benchmark.report.tables import OWN_ROW, Table, arrange, make_table, text_of, to_frame, to_markdown
from benchmark.subject.metrics.display import as_shown, number
from quanttune.errors import ConfigError, UnknownNameError

VALUES = {("fp32", "FP32"): 80.0, ("minmax", "W8A8"): 71.26, ("mse", "W8A8"): 71.34, ("minmax", "W4A4"): 20.0}
VALUES |= {("mse", "W4A4"): 33.3, ("toy_trained", "W8A8"): 71.3, ("toy_trained", "W4A4"): 60.0}


def record(cell: Cell, value: float, own: float | None = None) -> Record:
    drop = 80.0 - value
    result = Result("accuracy", True, value, 80.0, own, drop, drop - 1.5, drop + 1.5, 1000)
    return Record(cell, "done", "2026-01-01T00:00:00+00:00", 1.0, result, weights_digest=cell.method)


@pytest.fixture
def full(suite: Suite, store: Store) -> SuiteRows:
    methods = tuple(MethodSpec(name) for name in ("fp32", "minmax", "mse", "toy_trained"))
    wide = dataclasses.replace(suite, methods=methods, name="toys_a&b")
    for cell in expand(wide):
        own = 79.5 if cell.method == "toy_trained" else None
        store.save(record(cell, VALUES[cell.method, cell.precision], own))
    return collect_rows(store, wide)


def test_layout(full: SuiteRows) -> None:
    table = make_table(full)
    assert table.methods == ["fp32", "minmax", "mse", "toy_trained"]
    assert table.rows == [("toy", OWN_ROW), ("toy", "W8A8"), ("toy", "W4A4")]
    assert table.entries[("toy", "W8A8"), "fp32"].value == 80.0
    assert table.entries[("toy", OWN_ROW), "toy_trained"].value == 79.5
    assert (("toy", OWN_ROW), "mse") not in table.entries


def test_the_best_as_printed_is_bold(full: SuiteRows) -> None:
    table = make_table(full)
    # 71.26, 71.34 and 71.3 all print as 71.3: no false winner
    assert table.best(("toy", "W8A8")) == {"minmax", "mse", "toy_trained"}
    assert table.best(("toy", "W4A4")) == {"toy_trained"}
    assert table.best(("toy", OWN_ROW)) == set()


def test_a_lower_metric_can_be_the_better(full: SuiteRows) -> None:
    table = make_table(full)
    entries = {
        key: dataclasses.replace(entry, higher_is_better=False) for key, entry in table.entries.items()
    }
    assert dataclasses.replace(table, entries=entries).best(("toy", "W4A4")) == {"minmax"}


def test_perplexity_rises_and_the_lowest_as_printed_is_best(suite: Suite, store: Store) -> None:
    found = {"minmax": 31.504, "mse": 31.496}
    for cell in expand(suite):
        value = 25.25 if cell.is_reference else found[cell.method] * (1 if cell.precision == "W8A8" else 2000)
        drop = 25.25 - value
        result = Result("perplexity", False, value, 25.25, None, drop, drop - 0.5, drop + 0.25, 180)
        store.save(Record(cell, "done", "2026-01-01T00:00:00+00:00", 1.0, result, weights_digest="w"))
    rows = collect_rows(store, suite)
    table = make_table(rows)
    w8, w4 = ("toy", "W8A8"), ("toy", "W4A4")
    assert text_of(table, w8, "minmax") == ("31.50", "6.25 [6.00, 6.75]")
    assert text_of(table, w4, "minmax") == ("63,008", "62,983 [62,982, 62,983]")
    assert table.best(w8) == {"minmax", "mse"}  # both print as 31.50
    assert table.best(w4) == {"mse"}
    assert "perplexity on the test split and, below, the rise of perplexity against FP32" in table.caption
    assert "points" not in table.caption
    assert all(row["drop"] == 25.25 - row["value"] for row in rows.to_json())  # what is kept is a drop
    check_latex(to_latex(table, "x"))


def test_a_caption_tells_a_drop_in_points_from_a_rise(full: SuiteRows) -> None:
    assert "accuracy (%) on the test split and, below, the drop against FP32 in points" in (
        make_table(full).caption
    )
    records = dict(full.records)
    cell, old = next(iter(records.items()))
    assert old.result is not None
    result = dataclasses.replace(old.result, metric="perplexity", higher_is_better=False)
    records[cell] = dataclasses.replace(old, result=result)
    caption = make_table(dataclasses.replace(full, records=records)).caption
    assert "accuracy (%) and perplexity on the test split" in caption
    assert "the drop of accuracy in points or the rise of perplexity against FP32" in caption


@pytest.mark.parametrize(
    ("value", "metric", "shown"),
    [
        (84.449, "accuracy", "84.4"),
        (-0.04, "accuracy", "0.0"),
        (29.306, "perplexity", "29.31"),
        (-0.001, "perplexity", "0.00"),
        (412.34, "perplexity", "412.3"),
        (-49689.4, "perplexity", "-49,689"),
        (3.21e9, "perplexity", "3.2e+09"),
    ],
)
def test_numbers_have_the_digits_of_their_metric(value: float, metric: str, shown: str) -> None:
    assert number(value, metric) == shown
    assert as_shown(value, metric) == float(shown.replace(",", ""))


def check_latex(text: str) -> None:
    """The checks a compiler would make first, so that they are made on every machine."""
    for rule in ("\\toprule", "\\midrule", "\\bottomrule", "\\endfirsthead", "\\endhead", "\\endfoot"):
        assert rule in text
    assert text.count("{") - text.count("\\{") == text.count("}") - text.count("\\}")
    for name in ("longtable", "minipage"):
        assert text.count(f"\\begin{{{name}}}") == text.count(f"\\end{{{name}}}") == 1
    body = text[text.index("\\toprule") : text.index("\\end{longtable}")]
    (columns,) = re.findall(r"\\begin\{longtable\}\{l(.*)\}$", text, re.MULTILINE)
    count = len(re.findall(r"S\[table-format=-?\d+(?:\.\d+)?(?:\(\d+\))?\]|r", columns))
    assert re.sub(r"S\[[^]]*\]|r", "", columns) == ""
    # what is inside \\shortstack has its own line breaks
    flat = re.sub(r"\\shortstack\[[lr]\]\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\}", "x", body)
    lines = [line for line in flat.splitlines() if line.rstrip("*").endswith("\\\\")]
    assert lines
    data = [line for line in lines if not line.startswith("\\multicolumn")]
    assert {len(re.findall(r"(?<!\\)&", line)) for line in data} == {count}
    caption = text.partition("\\caption")[2].partition("\\label")[0]
    assert not re.search(r"(?<!\\)[_%#$&]", caption)
    assert "cline" not in text
    assert all(ord(character) < 128 for character in text)


def compile_latex(folder: Path, name: str) -> None:
    """Compile a document, and refuse what sticks out of the page."""
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", name]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    if "siunitx.sty' not found" in done.stdout:
        pytest.skip("the LaTeX here has no siunitx")
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Overfull" not in done.stdout
    assert (folder / name).with_suffix(".pdf").stat().st_size > 1000


def test_latex(full: SuiteRows) -> None:
    text = to_latex(make_table(full), "tab:toys")
    check_latex(text)
    lines = text.splitlines()
    at = next(index for index, line in enumerate(lines) if "\\bfseries 60.0" in line)
    assert lines[at].startswith("W4A4 & 80.0 & 20.0 & 33.3 & \\bfseries 60.0")
    assert lines[at + 1].startswith(" &  & 60.0 & 46.7 & 20.0")
    assert "{\\scriptsize [18.5, 21.5]}" in lines[at + 2]
    assert "{l" + "S[table-format=2.1]" * 4 + "}" in text
    assert "toy\\_trained" in text
    assert "toys\\_a\\&b" in text
    assert "n = 1000" in text.partition("\\end{longtable}")[2]
    assert "profile full" in text
    assert "95\\%" in text


def test_a_note_says_where_and_with_what(full: SuiteRows) -> None:
    about = {"cpu": "a CPU", "python": "3.12", "threads": 1, "versions": {"torch": "2.9", "numpy": "2.0"}}
    records = {
        cell_id: dataclasses.replace(record, provenance=about) for cell_id, record in full.records.items()
    }
    text = to_latex(make_table(dataclasses.replace(full, records=records)), "x")
    assert text.count("Measured on a CPU with torch 2.9, Python 3.12, 1 thread.") == 1
    check_latex(text)


@pytest.mark.parametrize(
    ("texts", "column"),
    [
        (["84.7 ± 0.3", "7.7", "-3.6", "--"], "S[table-format=-2.1(1)]"),
        (["101.0 ± 1.46", "97.24"], "S[table-format=3.2(3)]"),
        (["12,345", "3.2e+09"], "S[table-format=5]"),
        # room for 274 before the point, which the column has for others
        (["74.20", "49,310 ± 274", "112.2 ± 0.77"], "S[table-format=5.2(5)]"),
        (["87.1 ± 12.5", "7.7 ± 0.3"], "S[table-format=2.1(3)]"),
        (["failed", "--"], "r"),
    ],
)
def test_a_column_has_room_for_its_numbers(texts: list[str], column: str) -> None:
    assert column_format(texts) == column


def test_numbers_are_written_as_siunitx_reads_them() -> None:
    found = [number_cell(text) for text in ("101.0 ± 0.06", "-12,345", "3.2e+09", "n/a", "")]
    assert found == ["101.0 +- 0.1", "-12345", "{3.2e+09}", "{n/a}", ""]


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
def test_latex_compiles_and_seven_methods_fit_a_page(full: SuiteRows, tmp_path: Path) -> None:
    table = make_table(full)
    names = ("fp32", "minmax", "mse", "toy_trained", "percentile", "finetune", "quanttune")
    rows = [(model, name) for model in ("dinov2_vits14", "minilm_l6") for _, name in table.rows]
    entries = {
        ((model, name), method): table.entries[("toy", name), "minmax" if method != "fp32" else "fp32"]
        for model, name in rows
        for method in names
        if name != OWN_ROW
    }
    wide = dataclasses.replace(table, methods=list(names), rows=rows, entries=entries)
    # as wide as a decoder that is destroyed makes it: methods go one below the other
    huge = {
        place: dataclasses.replace(
            entry, value=49_123.0, drop=-49_000.0, low=-50_123.0, high=-48_123.0, metric="perplexity"
        )
        for place, entry in entries.items()
    }
    wider = to_latex(dataclasses.replace(wide, entries=huge), "tab:huge")
    assert "quanttune & " in wider
    assert "quanttune & " not in to_latex(wide, "tab:toys")
    (tmp_path / "toys.tex").write_text(to_latex(wide, "tab:toys"))
    (tmp_path / "huge.tex").write_text(wider)
    (tmp_path / "mine.tex").write_text("not a table\n")
    assert made_here(tmp_path) == ["huge", "toys"]
    (tmp_path / "all.tex").write_text(document(made_here(tmp_path)))
    assert made_here(tmp_path) == ["huge", "toys"]
    compile_latex(tmp_path, "all.tex")


def test_many_methods_stand_one_below_the_other(full: SuiteRows) -> None:
    table = make_table(full)
    many = dataclasses.replace(table, methods=[*table.methods, *(f"other {i}" for i in range(8))])
    assert arrange(table).stub == "precision"
    layout = arrange(many)
    assert (layout.stub, layout.columns) == ("method", [name for _, name in table.rows])
    (places,) = (places for _, name, places in layout.lines if name == "minmax")
    assert places == [(row, "minmax") for row in table.rows]
    check_latex(to_latex(many, "x"))
    named = dataclasses.replace(many, methods=[*many.methods[:-1], "mse[p_q=0.5,twin=False]+omse"])
    lines = to_latex(named, "x").splitlines()
    at = next(index for index, line in enumerate(lines) if line.startswith("mse+omse & "))
    assert lines[at + 1].startswith("{\\scriptsize p\\_q=0.5} & ")
    assert lines[at + 2].startswith("{\\scriptsize twin=False} & ")
    check_latex(to_latex(named, "x"))
    grid = to_markdown(many)
    (line,) = (line for line in grid.splitlines() if line.startswith("| toy") and "| minmax" in line)
    assert all(text_of(many, row, "minmax")[0] in line for row in table.rows)
    (best,) = (line for line in grid.splitlines() if "| toy_trained" in line)
    assert "**60.0**" in best


def test_markdown(full: SuiteRows) -> None:
    text = to_markdown(make_table(full))
    assert "**60.0**<br>20.0 [18.5, 21.5]" in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1


def test_several_seeds_become_mean_and_deviation(suite: Suite, store: Store) -> None:
    seeded = dataclasses.replace(suite, seeds=(0, 1, 2))
    for cell in expand(seeded):
        store.save(record(cell, 80.0 if cell.is_reference else 70.0 + 2 * cell.seed))
    table = make_table(collect_rows(store, seeded))
    entry = table.entries[("toy", "W8A8"), "minmax"]
    assert (entry.value, entry.drop, entry.deviation, entry.low) == (72.0, 8.0, 2.0, None)
    assert "3 seeds" in table.caption
    assert "72.0 +- 2.0" in to_latex(table, "x")
    check_latex(to_latex(table, "x"))


def test_axes_that_vary_are_named(suite: Suite, store: Store) -> None:
    wide = dataclasses.replace(
        suite, profiles=("full", "matmul"), weight_granularity=("per_channel", "per_tensor")
    )
    for cell in expand(wide):
        store.save(record(cell, 70.0))
    rows = make_table(collect_rows(store, wide)).rows
    assert ("toy", "W8A8 matmul per tensor") in rows
    assert len(rows) == len(set(rows)) == 8


def test_a_scheme_that_differs_in_what_the_precision_leaves_open_has_a_row_of_its_own(
    suite: Suite, store: Store
) -> None:
    """Two schemes are never taken for two seeds of one."""
    schemes = ("W8A8", "W8tA8", "W8A8-asym", "W4g2A8", "W4")
    wide = dataclasses.replace(suite, precisions=schemes)
    cells = expand(wide)
    for step, cell in enumerate(cells):
        store.save(record(cell, 70.0 + step))
    collected = collect_rows(store, wide)
    table = make_table(collected)
    assert [name for _, name in table.rows] == list(schemes)
    assert all(entry.deviation is None for entry in table.entries.values())
    found = {row["precision"]: row["value"] for row in collected.to_json() if row["method"] == "minmax"}
    assert list(found) == list(schemes)
    assert len(set(found.values())) == len(schemes)


def test_the_caption_names_the_split(suite: Suite, store: Store) -> None:
    searched = dataclasses.replace(suite, split="validation")
    for cell in expand(searched):
        store.save(record(cell, 70.0))
    assert "on the validation split" in make_table(collect_rows(store, searched)).caption
    assert collect_rows(store, suite, allow_partial=True).finished == 0  # its cells are not a test table's


def test_partial_tables(suite: Suite, store: Store) -> None:
    cells = expand(suite)
    store.save(record(cells[1], 70.0))
    store.save_failure(cells[2], {"error": "diverged"})
    with pytest.raises(ConfigError, match=r"1 of 5 cells of suite toys are finished, 1 failed"):
        collect_rows(store, suite)
    table = make_table(collect_rows(store, suite, allow_partial=True))
    assert "1 of 5 cells" in table.caption
    assert set(table.notes.values()) == {"failed", "missing"}
    check_latex(to_latex(table, "x"))
    statuses = [row["status"] for row in collect_rows(store, suite, allow_partial=True).to_json()]
    assert sorted(statuses) == ["done", "failed", "missing", "missing", "missing"]


def test_an_empty_partial_table_prints(suite: Suite, store: Store) -> None:
    table = make_table(collect_rows(store, suite, allow_partial=True))
    check_latex(to_latex(table, "x"))
    assert "0 of 5" in to_markdown(table)


def test_csv_has_a_line_a_cell(full: SuiteRows) -> None:
    frame = to_frame(full)
    assert len(frame) == 7
    assert frame["drop"].notna().all()


def test_negative_zero_is_zero() -> None:
    table = Table("", [], [], {}, {})
    from benchmark.report.tables import Entry

    entry = Entry(80.0, -0.01, -0.04, 0.02, None, "accuracy", True)
    assert entry.lines() == ("80.0", "0.0 [0.0, 0.0]")
    assert table.best(("toy", "W8A8")) == set()


@pytest.mark.parametrize("name", published_names())
def test_published_values_name_their_source(name: str) -> None:
    frame = load_published(name)
    assert len(frame) > 0
    assert frame.columns[0] == "source"
    assert frame["source"].notna().all()


def test_published_values_are_the_known_ones() -> None:
    assert len(published_names()) == 18
    fq_vit = load_published("imagenet_fqvit")
    base = fq_vit[fq_vit["timm_model"].str.startswith("vit_base") & (fq_vit["method"] == "fp32")]
    assert base["top1"].tolist() == [84.53]
    headline = load_published("quanttune_headline")
    assert set(headline["value"]) >= {65.0, 12.09, 33.8, 18.84}
    with pytest.raises(UnknownNameError, match="did you mean imagenet_fqvit"):
        load_published("imagenet_fqvi")


def test_trainings_of_each_precision_have_no_deviation_of_seeds(suite: Suite, store: Store) -> None:
    """Found: their FP32 values over precisions were printed as noise of rounding."""
    methods = tuple(MethodSpec(name) for name in ("fp32", "toy_trained"))
    wide = dataclasses.replace(suite, methods=methods)
    for cell in expand(wide):
        own = None if cell.method == "fp32" else {"W8A8": 80.0, "W4A4": 77.0}[cell.precision]
        made = record(cell, 70.0, own)
        store.save(dataclasses.replace(made, weights_digest=f"{cell.method} {cell.precision}"))
    table = make_table(collect_rows(store, wide))
    entry = table.entries[("toy", OWN_ROW), "toy_trained"]
    assert (entry.value, entry.deviation) == (78.5, None)
    assert "of those that make others for each precision the mean over these" in table.caption
