"""Results that are removed, that can only be read, and names that a format or a terminal reads otherwise."""

from __future__ import annotations

import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from benchmark.cli import cli
from benchmark.engine.events import Events
from benchmark.engine.plan import Request, make_plan
from benchmark.engine.runner import Outcome, Settings
from benchmark.grid.cells import Cell
from benchmark.keep import atomic
from benchmark.keep.store import Store
from benchmark.report.latex import label_of
from benchmark.report.tables import Entry, Table, to_markdown
from quanttune.errors import StoreError

TINY = (
    'models = ["tiny_bert"]\nprecisions = ["W8A8"]\ncalibration_items = 8\nlimit = 16\n'
    '[[methods]]\nname = "fp32"\n[[methods]]\nname = "percentile"\np = [99.0]\n'
)


def call(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments)


def test_a_folder_that_is_removed_in_the_middle_is_noticed(suite_file: str, tmp_path: Path) -> None:
    """Found: "8 cells: 8 done" with 5 on the disk."""
    results = tmp_path / "results"
    finished: list[Outcome] = []

    class Removing(Events):
        def finished(self, outcome: Outcome) -> None:
            finished.append(outcome)
            if len(finished) == 3:
                shutil.rmtree(results)

    plan = make_plan(Request(suite_file), Settings(results))
    with pytest.raises(StoreError, match="3 of the 5 cells that this run finished are no longer in"):
        for _ in plan.outcomes(Removing()):
            pass
    assert [outcome.status for outcome in plan.outcomes()].count("done") == 3


@pytest.fixture
def read_only(suite_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Results in which no file can be made, whoever runs the test."""
    results = tmp_path / "results"
    arguments = ("--suite", suite_file, "--results", str(results))
    assert call("run", "--all", "--no-tracking", *arguments).exit_code == 0

    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(atomic.tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr("quanttune.files.tempfile.mkstemp", refuse)
    return str(results)


def test_results_that_can_only_be_read_can_be_looked_at(read_only: str, suite_file: str) -> None:
    where = ("--suite", suite_file, "--results", read_only)
    for arguments in (("list", "cells"), ("table",), ("table", "--format", "csv")):
        result = call(*arguments, *where)
        assert result.exit_code == 0, arguments
        assert "minmax" in result.stdout
    assert "warning: printed only: cannot write" in result.stderr
    cell_id = next(Store(Path(read_only)).records()).cell.cell_id
    assert call("show", cell_id[:12], "--results", read_only).exit_code == 0


@pytest.mark.parametrize(
    "arguments", [("run", "--all", "--overwrite", "always", "--no-tracking"), ("figure",), ("report",)]
)
def test_what_writes_refuses_results_that_can_only_be_read(
    arguments: tuple[str, ...], read_only: str, suite_file: str
) -> None:
    result = call(*arguments, "--suite", suite_file, "--results", read_only)
    assert result.exit_code == 2
    refusal = result.stderr.splitlines()[-1]
    assert refusal.startswith(f"error: cannot write {read_only}: ")
    assert "Read-only file system" in refusal
    assert "choose another folder" in refusal


def test_a_label_holds_nothing_that_latex_reads_otherwise() -> None:
    assert label_of("threshold_search") == "tab:threshold_search"
    for name in ("50% #1 {a", "a\\b~c^d", "a & b$", "ünï"):
        assert re.fullmatch(r"tab:[\w:.+/-]+", label_of(name), re.ASCII), name


def test_a_pipe_is_a_part_of_a_name_in_markdown(cells: list[Cell]) -> None:
    entry = Entry(70.0, 5.0, 2.0, 8.0, None, "accuracy", True)
    row = ("folder:a|b\nc@toy", "W8A8")
    text = to_markdown(Table("caption", ["m|n"], [row], {(row, "m|n"): entry}, {}))
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 3
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert r"folder:a\|b<br>c@toy" in text


def on_terminal(*arguments: str) -> tuple[int, str]:
    """A command on a wide terminal: its exit code and all that it drew."""
    parent, child = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmark", *arguments],
        stdin=child,
        stdout=child,
        stderr=child,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "400"},
    )
    os.close(child)
    drawn = b""
    while True:
        try:
            piece = os.read(parent, 65536)
        except OSError:
            break
        if not piece:
            break
        drawn += piece
    os.close(parent)
    return process.wait(60), drawn.decode("utf-8", "replace")


def test_brackets_stay_and_end_nothing_on_a_terminal(tmp_path: Path) -> None:
    """Found: parameters in brackets eaten, and a path that reads like markup ended the run."""
    suite = tmp_path / "s.toml"
    folder = tmp_path / "v1 [/final] x.csv"
    folder.parent.mkdir()
    folder.write_text("text,label\n" + "".join(f"film {n},{'ab'[n % 2]}\n" for n in range(200)))
    suite.write_text(TINY.replace('"tiny_bert"', f'"tiny_bert@data:{folder}"'))
    code, drawn = on_terminal(
        "run", "--all", "--suite", str(suite), "--no-tracking", "--results", str(tmp_path / "results")
    )
    assert code == 0, drawn
    assert "[/final]" in drawn
    bars = [line for line in re.split(r"[\r\n]", drawn) if "percentile" in line and "done" not in line]
    assert all("percentile[p=99.0]" in line for line in bars)


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "ascii", "utf-8"])
def test_a_table_prints_in_any_encoding(encoding: str, tmp_path: Path) -> None:
    suite = tmp_path / "s.toml"
    suite.write_text(TINY, encoding="utf-8")
    command = [sys.executable, "-m", "benchmark", "table", "--allow-partial"]
    done = subprocess.run(
        [*command, "--suite", str(suite), "--results", str(tmp_path / "results")],
        env=os.environ | {"PYTHONIOENCODING": encoding},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "---" in done.stdout.decode(encoding)
    assert "missing" in done.stdout.decode(encoding)


def test_what_cannot_be_printed_is_said_in_a_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmark", "table", "--allow-partial", "--format", "csv", "--suite"]
    (tmp_path / "ł.toml").write_text(TINY, encoding="utf-8")
    done = subprocess.run(
        [*command, str(tmp_path / "ł.toml"), "--results", str(tmp_path / "results")],
        env=os.environ | {"PYTHONIOENCODING": "latin-1"},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.decode("latin-1").splitlines() == [
        "error: '\\u0142' cannot be printed in latin-1; set PYTHONIOENCODING=utf-8"
    ]
