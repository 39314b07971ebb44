"""The document of all kept tables: made by one command, and nothing in it sticks out of the page."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmark.cli import cli
from benchmark.keep.reference_store import reference_folder
from benchmark.report.costs import cost_latex, make_cost_table
from benchmark.report.latex import made_here
from tests.engine.test_tables import check_latex, compile_latex
from tests.test_kept_tables import kept_rows


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tables of what came with the code."""
    kept = reference_folder()
    assert kept is not None
    folder = tmp_path_factory.mktemp("document")
    shutil.copytree(kept, folder / "reference")
    arguments = ["table", "--all", "--format", "latex", "--results", str(folder / "reference")]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[-1] == str(folder / "tables" / "all.tex")
    return folder / "tables"


def test_the_document_shows_every_table_beside_it(tables: Path) -> None:
    names = made_here(tables)
    assert {"laptop", "laptop-cost"} <= set(names)
    text = (tables / "all.tex").read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if "input" in line] == [
        f"\\input{{{name}.tex}}" for name in names
    ]
    for name in names:
        check_latex((tables / f"{name}.tex").read_text(encoding="utf-8"))
    table = (tables / "laptop.tex").read_text(encoding="utf-8")
    notes = table.partition("\\end{longtable}")[2]
    for expected in ("n = 2000", "profile full", "seed 0", "torch 2."):
        assert expected in notes


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
def test_the_document_compiles_without_overfull_boxes(tables: Path) -> None:
    compile_latex(tables, "all.tex")


def test_costs_are_aligned(tables: Path) -> None:
    text = cost_latex(make_cost_table(kept_rows("laptop")), "tab:x")
    check_latex(text)
    assert text.count("S[table-format=") == 9
    assert "outlier\\_suppression & 3 & 0.0 & " in text


def test_all_goes_with_latex_alone() -> None:
    for more in (
        [],
        ["--format", "csv"],
        ["--format", "latex", "--cost"],
        ["--format", "latex", "--suite", "x"],
    ):
        refused = CliRunner().invoke(cli, ["table", "--all", *more])
        assert refused.exit_code == 2
        assert "give --format latex alone with it" in refused.output
