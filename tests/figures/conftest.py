"""One small suite, measured once, that all tests of figures read."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
from click.testing import CliRunner, Result

from benchmark.cli import cli
from benchmark.engine.runner import CellRunner, Settings
from benchmark.engine.sensitivity import UNITS, measured
from benchmark.engine.session import Session
from benchmark.grid.expand import expand
from benchmark.grid.suite import load_suite
from benchmark.keep.store import Store
from benchmark.report.analyses import ModelAnalysis, analyses_of
from benchmark.report.figures.figure import FIGURES, choose
from benchmark.report.gallery import make_frames
from benchmark.report.rows import SuiteRows, collect_rows

SUITE = """
models = ["tiny_vit"]
precisions = ["W8A8", "W6A6"]
calibration_items = 8
limit = 40
methods = [{name = "fp32"}, {name = "minmax"}, {name = "mse"}, {name = "finetune"}, {name = "quanttune"}]
"""

DRAWN = FIGURES.names()
"""The figures that the suite below has data of: all of them, sensitivities of one cell among them."""


@pytest.fixture(scope="package")
def suite_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("suite") / "drawn.toml"
    path.write_text(SUITE)
    return path


@pytest.fixture(scope="package")
def results(suite_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished suite of a tiny model of a real class."""
    folder = tmp_path_factory.mktemp("drawn") / "results"
    threads = torch.get_num_threads()
    runner = CellRunner(Settings(folder), lambda *_: None)
    for cell in expand(load_suite(str(suite_file))):
        assert runner.run(cell).status == "done"
        if (cell.method, cell.precision) == ("minmax", "W6A6"):
            record = Store(folder).load(cell)
            assert record is not None
            session = Session(cell.model, Store(folder).stages, torch.device("cpu"), lambda *_: None)
            for unit in UNITS:
                measured(session, Store(folder), record, unit, 4)
    torch.set_num_threads(threads)
    return folder


@pytest.fixture(scope="package")
def rows(results: Path, suite_file: Path) -> SuiteRows:
    return collect_rows(Store(results), load_suite(str(suite_file)))


@pytest.fixture(scope="package")
def analysis(rows: SuiteRows, results: Path) -> ModelAnalysis:
    (found,) = analyses_of(rows, Store(results), torch.device("cpu"), lambda *_: None)
    return found


@pytest.fixture(scope="package")
def data(rows: SuiteRows, analysis: ModelAnalysis) -> dict[str, pd.DataFrame]:
    return make_frames(choose(), rows, [analysis], 40)


def call(command: str, suite_file: Path, results: Path, *more: str) -> Result:
    threads = torch.get_num_threads()
    try:
        return CliRunner().invoke(
            cli, [command, "--suite", str(suite_file), "--results", str(results), *more]
        )
    finally:
        torch.set_num_threads(threads)
