"""The leaderboard: ranks, tests and pages are of the records, and a browser shows them as they are."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path
from urllib.parse import urldefrag

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from benchmark.cli import cli
from benchmark.grid.suite import Suite, load_suite
from benchmark.keep.publishing import publish
from benchmark.keep.reference_store import ReferenceStore, reference_folder
from benchmark.keep.store import Store
from benchmark.report.figures.figure import FIGURES
from benchmark.report.rows import SuiteRows, collect_rows
from benchmark.report.site.advice import advice_of
from benchmark.report.site.board import EVERY, Group, board_of, recovery_of
from benchmark.report.site.cells import CellPage
from benchmark.report.site.folder import write_site
from benchmark.report.site.links import cell_page, page_of
from benchmark.report.site.pages import Site, SuiteView, p_text
from benchmark.report.site.range_plot import range_plot
from tests.pages import Page
from tests.report.made_rows import ACCURACY, FP32, N, fill, view_of

LABELS = ["minmax", "mse", "finetune", "finetune+mse", "quanttune"]


def find(groups: list[Group], model: str, width: str) -> Group:
    (group,) = (g for g in groups if (g.setting.model, g.setting.width) == (model, width))
    return group


def test_the_best_come_first_and_are_compared_with_the_best_other(rows: SuiteRows) -> None:
    groups = board_of(rows)
    group = find(groups, "tiny_vit", "W8A8")
    assert [line.method for line in group.lines] == sorted(LABELS, key=lambda name: -ACCURACY[name]["W8A8"])
    assert [line.rank for line in group.lines] == [1, 2, 3, 4, 5]
    first, second = group.lines[:2]
    assert (first.method, first.rival, second.rival) == ("quanttune", "finetune+mse", "quanttune")
    assert first.p == second.p  # the same pair, the same correction or a larger one of the smaller
    assert first.recovery == pytest.approx(100 * 89 / FP32)
    assert (first.low, first.high) == (pytest.approx(100 * 89 / 90), pytest.approx(100 * 91 / 90))
    assert (group.items, group.fp32, group.metric) == (N, FP32, "accuracy")
    assert group.smallest is not None
    assert 3 < group.smallest < 10
    assert [line.trained for line in group.lines] == [True, True, True, False, False]


def test_a_mean_ranks_what_was_measured_on_every_model(rows: SuiteRows) -> None:
    records = {
        cell_id: record
        for cell_id, record in rows.records.items()
        if (record.cell.label, record.cell.model) != ("quanttune", "tiny_bert")
    }
    unfinished = {cell_id: "missing" for cell_id in rows.records if cell_id not in records}
    groups = board_of(dataclasses.replace(rows, records=records, unfinished=unfinished))
    group = find(groups, EVERY, "W8A8")
    assert [line.method for line in group.lines] == ["finetune+mse", "finetune", "mse", "minmax", "quanttune"]
    assert [len(line.parts) for line in group.lines] == [2, 2, 2, 2, 1]
    line = group.lines[0]
    assert line.recovery == pytest.approx(100 * 85 / 90)
    assert line.low is not None
    # two models whose interval ends 4 of 90 points away: that of their mean is nearer by the root of two
    assert line.recovery - line.low == pytest.approx(100 * 4 / 90 / 2**0.5)
    (eight, six) = advice_of(groups)
    assert (
        str(eight)
        == "W8A8 full: finetune+mse keeps 94.4 % of FP32; without training mse keeps 83.3 % of FP32"
    )
    assert (six.best.method, six.untrained and six.untrained.method) == ("finetune+mse", "minmax")


def test_the_picture_of_the_leaderboard_is_its_means(rows: SuiteRows) -> None:
    frame = FIGURES.get("leaderboard")("leaderboard").frame(rows)  # type: ignore[call-arg, arg-type]
    assert len(frame) == 2 * 5
    assert list(frame[frame["setting"] == "W8A8"]["method"])[:2] == ["quanttune", "finetune+mse"]
    for group in board_of(rows)[:2]:
        part = frame[frame["setting"] == group.setting.width].set_index("method")
        for line in group.lines:
            assert part.loc[line.method, "recovery"] == line.recovery


def test_recovery_turns_round_where_low_is_good() -> None:
    assert recovery_of(80.0, 100.0, True) == 80.0
    assert recovery_of(125.0, 100.0, False) == 80.0
    assert np.isnan(recovery_of(1.0, 0.0, True))


def test_lost_items_cost_the_test_and_nothing_else(rows: SuiteRows) -> None:
    for record in rows.records.values():
        if record.cell.label == "mse":
            (rows.store.root / "cells" / f"{record.cell.cell_id}.safetensors").unlink()
    group = find(board_of(rows), "tiny_vit", "W8A8")
    by_name = {line.method: line for line in group.lines}
    assert by_name["mse"].p is None
    assert by_name["minmax"].p is not None


@pytest.mark.parametrize("name", ["a/b", "x" * 300, "..", "finetune[steps=3]+mse", "hub:o/n@t", "<b>"])
def test_pages_have_names_that_any_file_system_takes(name: str) -> None:
    path = page_of("methods", name)
    assert re.fullmatch(r"methods/[a-z0-9][a-z0-9._=+-]*\.html", path)
    assert len(path) < 120
    assert page_of("methods", name + " ") != path
    assert page_of("methods", "A") != page_of("methods", "a") == "methods/a.html"


def links_of(pages: dict[str, str]) -> list[tuple[str, str]]:
    """Every link from page to page that leads nowhere."""
    dead = []
    ids = {name: set(Page(text).ids) for name, text in pages.items() if name.endswith(".html")}
    for name in ids:
        for target in Page(pages[name]).targets:
            if target.startswith("data:"):
                continue
            address, fragment = urldefrag(target)
            parts = [*name.split("/")[:-1], *address.split("/")] if address else name.split("/")
            while ".." in parts:
                at = parts.index("..")
                del parts[at - 1 : at + 1]
            path = "/".join(parts)
            if path not in pages or (fragment and fragment not in ids[path]):
                dead.append((name, target))
    return dead


def texts_of(site: Site) -> dict[str, str]:
    return {name: page if isinstance(page, str) else page.text for name, page in site.pages()}


def test_every_link_leads_somewhere_and_text_stays_text(rows: SuiteRows, store: Store) -> None:
    pages = texts_of(Site([view_of(rows)], store, store.root))
    assert links_of(pages) == []
    for record in rows.records.values():
        assert cell_page(record.cell.cell_id) in pages
    for name, text in pages.items():
        if name.endswith(".html"):
            page = Page(text)
            assert page.open == [], name
            assert len(page.ids) == len(set(page.ids)), name
            assert "made<up>" not in text, name
            assert "http:" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", text), name
            assert text.count("<h1") == 1, name
    assert "a &lt;fast&gt; one" in pages[cell_page(next(iter(rows.records)))]
    found = [row for row in Page(pages["index.html"]).rows if "data-method" in row]
    assert len(found) == 2 * 5 + 2 * 2 * 5
    shown = [row for row in found if "hidden" not in row]
    assert {(row["data-model"], row["data-width"]) for row in shown} == {(EVERY, "W6A6")}
    assert [row["data-method"] for row in shown][:2] == ["quanttune", "finetune+mse"]
    assert "saturation" in " ".join(Page(pages["index.html"]).words)
    methods = {name for name in pages if name.startswith("methods/")}
    assert methods == {page_of("methods", label) for label in LABELS}


def test_several_suites_share_cells_and_stand_apart_on_the_board(
    rows: SuiteRows, store: Store, suite: Suite
) -> None:
    one_model = dataclasses.replace(suite, name="second", models=("tiny_vit",), profiles=("full", "matmul"))
    second = fill(store, one_model)
    pages = texts_of(Site([view_of(rows), view_of(second)], store, store.root))
    assert links_of(pages) == []
    found = [row for row in Page(pages["index.html"]).rows if "data-method" in row]
    assert {row["data-suite"] for row in found if "hidden" not in row} == {"made<up>"}
    # one model has no mean over models
    settings = {(row["data-model"], row["data-profile"]) for row in found if row["data-suite"] == "second"}
    assert settings == {("tiny_vit", "full"), ("tiny_vit", "matmul")}
    cells = {name for name in pages if name.startswith("cells/")}
    assert cells == {cell_page(cell_id) for cell_id in (*rows.records, *second.records)}
    shared = set(rows.records) & set(second.records)
    assert len(shared) == 11
    record = next(rows.records[cell_id] for cell_id in shared if rows.records[cell_id].cell.label == "mse")
    words = " ".join(Page(pages[cell_page(record.cell.cell_id)]).words)
    assert "rank in suite made<up>" in words
    assert "rank in suite second" in words


def test_the_page_of_a_cell_gives_it_back(rows: SuiteRows, store: Store) -> None:
    pages = texts_of(Site([view_of(rows)], store, store.root))
    record = next(r for r in rows.records.values() if r.cell.label == "finetune+mse")
    words = " ".join(" ".join(Page(pages[cell_page(record.cell.cell_id)]).words).split())
    command = "python -m benchmark run --overwrite always --suite made --model tiny_vit --method finetune"
    assert f"{command} --precision W8A8 --profile full --seed 0 --results {store.root}" in words
    for expected in ("85.0", "5.0 points [-1.0, 1.0]", "94.4 % of FP32", "torch 2.9", "a" * 64):
        assert expected in words
    # its quantized model was not kept, and so is not offered
    assert "benchmark.load" not in words
    reference = next(r for r in rows.records.values() if r.cell.is_reference)
    words = " ".join(Page(pages[cell_page(reference.cell.cell_id)]).words)
    assert 'benchmark.reference("tiny_vit"' in words


def test_ranges_are_drawn_and_named() -> None:
    sites = [
        {"id": "a<b>", "kind": "linear input", "low": -100.0, "high": 0.5},
        {"id": "w", "kind": "weight", "low": -1.0, "high": 1.0},
        {"id": "off", "kind": "linear input", "low": None, "high": None},
    ]
    drawn = str(range_plot(sites, 'ranges of "x"'))
    assert drawn.count("<rect") == 1
    assert "a&lt;b&gt;: -100 to 0.5" in drawn
    assert 'aria-label="ranges of &#34;x&#34;"' in drawn
    assert Page(drawn).open == []
    assert not range_plot(sites[1:], "")


def test_what_is_gone_leaves_the_folder_and_what_stays_is_not_written_again(tmp_path: Path) -> None:
    folder = tmp_path / "report"
    write_site(folder, [("index.html", "a"), ("cells/1.html", "one"), ("cells/2.html", "two")])
    (folder / "cells" / "notes.txt").write_text("mine")
    before = (folder / "index.html").stat().st_mtime_ns
    assert write_site(folder, [("index.html", "a"), ("cells/2.html", "2")]) == folder / "index.html"
    assert sorted(path.name for path in (folder / "cells").iterdir()) == ["2.html", "notes.txt"]
    assert (folder / "cells" / "2.html").read_text() == "2"
    assert (folder / "index.html").stat().st_mtime_ns == before


def test_a_cell_s_page_is_made_again_where_what_it_shows_is_another(
    rows: SuiteRows, store: Store, tmp_path: Path
) -> None:
    folder, made = tmp_path / "report", list[str]()

    class Counting(Site):
        def _cell(self, page: CellPage) -> str:
            made.append(cell_page(page.record.cell.cell_id))
            return super()._cell(page)

    def write(view: SuiteView) -> set[str]:
        made.clear()
        write_site(folder, Counting([view], store, store.root).pages())
        return set(made)

    assert write(view_of(rows)) == {cell_page(cell_id) for cell_id in rows.records}
    assert write(view_of(rows)) == set()
    cell_id, record = next(iter(rows.records.items()))
    later = {**rows.records, cell_id: dataclasses.replace(record, finished_at="later")}
    assert write(view_of(dataclasses.replace(rows, records=later))) == {cell_page(cell_id)}
    assert "later" in (folder / cell_page(cell_id)).read_text()


def test_suites_of_two_machines_have_a_page_each_for_their_number_of_a_cell(
    rows: SuiteRows, store: Store, suite: Suite, tmp_path: Path
) -> None:
    other = dataclasses.replace(suite, name="other")
    first = list(rows.records.values())
    second = [
        dataclasses.replace(
            record, reference_digest="b" * 64, result=dataclasses.replace(record.result, value=12.34)
        )
        for record in first
        if record.result is not None
    ]
    publish(
        tmp_path / "reference",
        {suite.name: first, other.name: second},
        lambda _, cell_id: store.items(cell_id),
    )
    kept = ReferenceStore(tmp_path / "reference")
    views = [view_of(collect_rows(kept, each)) for each in (suite, other)]
    made = {
        path: page if isinstance(page, str) else page.text
        for path, page in Site(views, kept, kept.root).pages()
    }
    assert links_of(made) == []
    cell = next(cell for cell in rows.cells if cell.label == "quanttune")
    own, others = made[cell_page(cell.cell_id)], made[cell_page(cell.cell_id, "other")]
    assert "12.3" not in own
    assert "12.3" in others
    assert f"verify --suite other --cell {cell.cell_id[:12]}" in others
    # each suite's rows lead to its own
    assert cell_page(cell.cell_id, "other") in made["index.html"]
    assert cell_page(cell.cell_id) in made["index.html"]


def test_a_fresh_clone_shows_every_published_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All suites, with what came with the code alone; how figures are drawn is tested with them."""
    kept = reference_folder()
    assert kept is not None
    shutil.copytree(kept, tmp_path / "reference")
    frames = {name: pd.DataFrame() for name in FIGURES.names()}
    monkeypatch.setattr("benchmark.report.gallery.make_frames", lambda *_: frames)
    made = CliRunner().invoke(cli, ["report", "--all", "--results", str(tmp_path / "reference")])
    assert made.exit_code == 0, made.output
    folder = tmp_path / "report" / "all"
    assert made.stdout.strip() == str(folder / "index.html")
    store = ReferenceStore(kept)
    published = {record.cell.cell_id: cell_page(record.cell.cell_id) for record in store.records()}
    found = {f"cells/{path.name}" for path in (folder / "cells").iterdir()}
    assert set(published.values()) <= found
    assert len(found) == len(list(store.measurements()))
    pages = {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*.*")}
    assert links_of(pages) == []
    rows = collect_rows(store, load_suite("laptop"))
    cell = next(cell for cell in rows.cells if cell.label == "quanttune")
    text = pages[cell_page(cell.cell_id)]
    assert f"python -m benchmark verify --suite laptop --cell {cell.cell_id[:12]}" in text
    assert f"benchmark.load(&#34;{cell.cell_id[:12]}&#34;)" in text
    assert "--overwrite" not in text
    empty = CliRunner().invoke(cli, ["report", "--all", "--results", str(tmp_path / "none")])
    assert empty.exit_code == 2
    assert "no suite has results" in empty.output


def test_small_p_values_are_bounds() -> None:
    assert (p_text(0.5), p_text(0.0123), p_text(1e-9)) == ("p = 0.5", "p = 0.012", "p < 0.0001")
