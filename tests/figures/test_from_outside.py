"""A figure of a user's own, and methods that the report has never heard of, take part everywhere."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from baselines.method import METHODS
from benchmark.report.analyses import ModelAnalysis
from benchmark.report.figures.figure import FIGURES, ModelFigure, SuiteFigure, choose
from benchmark.report.figures.overview import Overview
from benchmark.report.gallery import make_frames
from benchmark.report.html import make_report
from benchmark.report.roles import role_of, role_of_label
from benchmark.report.rows import SuiteRows
from benchmark.report.site_tables import RULES, rules_of
from benchmark.report.weight_sets import weight_sets
from tests.figures.conftest import call

OWN = '''
from benchmark.report.canvas import new_figure
from benchmark.report.figures.figure import FIGURES, SuiteFigure


@FIGURES.register("seconds")
class Seconds(SuiteFigure):
    """How long cells took."""

    title = "Where the time goes"
    caption = "Seconds of each cell."

    def frame(self, rows):
        import pandas as pd

        return pd.DataFrame({"cell": [str(cell) for cell in rows.cells], "count": range(len(rows.cells))})

    def draw(self, frame):
        figure = new_figure(2.0)
        figure.subplots().bar(frame["cell"], frame["count"])
        return figure
'''


@pytest.fixture
def own(tmp_path: Path) -> Iterator[str]:
    """A file of the user, imported; the registry is as before afterwards."""
    path = tmp_path / "own_figure.py"
    path.write_text(OWN)
    FIGURES.names()
    spec = importlib.util.spec_from_file_location("own_figure", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["own_figure"] = module
    spec.loader.exec_module(module)
    yield "seconds"
    FIGURES._items.pop("seconds")
    del sys.modules["own_figure"]


def test_it_is_drawn_with_the_others_and_by_name(own: str, suite_file: Path, results: Path) -> None:
    one = call("figure", suite_file, results, "--only", own)
    assert one.exit_code == 0, one.output
    names = {Path(line).name for line in one.stdout.split()}
    assert names == {f"drawn-seconds.{form}" for form in ("pdf", "svg", "csv")}
    assert len(pd.read_csv(results / "figures" / "drawn-seconds.csv")) == 9
    everything = call("figure", suite_file, results, "--items", "40")
    assert names < {Path(line).name for line in everything.stdout.split()}
    for path in results.glob("figures/drawn-seconds.*"):
        path.unlink()


def test_it_stands_in_the_report(
    own: str, rows: SuiteRows, results: Path, data: dict[str, pd.DataFrame]
) -> None:
    frames = data | make_frames(choose([own]), rows, [], 40)
    text = make_report(rows, frames)
    assert text.index("What is lost at each precision") < text.index("Where the time goes")
    assert 'download="drawn-seconds.csv"' in text


def test_every_figure_keeps_the_contract() -> None:
    places = [(figure.place, figure.name) for figure in choose()]
    assert places == sorted(places)
    for name, kind in FIGURES.items():
        assert issubclass(kind, SuiteFigure | ModelFigure)
        figure = kind(name)
        assert figure.name == name
        assert figure.title
        assert figure.caption.endswith(".")


def test_a_label_tells_the_role() -> None:
    assert role_of_label("quanttune") == "trained"
    assert role_of_label("quanttune+mse") == "trained"
    assert role_of_label("finetune[steps=3]+omse") == "control"
    assert role_of_label("fq_vit[attention=integer]") == "rival"
    assert role_of_label("ema") == "calibrator"
    assert role_of_label("gone") is None


@pytest.fixture
def stranger(monkeypatch: pytest.MonkeyPatch) -> str:
    """QuantTune's twin under a name that the report does not know."""
    METHODS.names()
    kind = type("Stranger", (METHODS.get("quanttune"),), {"name": "stranger"})
    monkeypatch.setitem(METHODS._items, "stranger", kind)
    return "stranger"


def test_weights_of_any_trained_method_are_set_beside_the_references(
    stranger: str, analysis: ModelAnalysis
) -> None:
    def renamed(record: Any) -> Any:
        if record.cell.method != "quanttune":
            return record
        return dataclasses.replace(record, cell=dataclasses.replace(record.cell, method=stranger))

    # the control comes first wherever the suite has it
    records = [renamed(record) for record in reversed(analysis._done)]
    found = weight_sets(records, analysis.cell, "r")
    assert [weights.name for weights in found] == ["reference", "finetune", stranger]
    assert found[2].cell.method == stranger
    assert role_of(stranger) == "trained"


def test_the_overview_shades_what_is_trained(stranger: str, data: dict[str, pd.DataFrame]) -> None:
    def shaded(frame: pd.DataFrame) -> int:
        axes = Overview("overview").draw(frame).axes[0]
        return sum(tuple(patch.get_facecolor())[:3] == (0xEC / 255,) * 3 for patch in axes.patches)

    frame = data["overview"]
    assert shaded(frame) == 1
    assert shaded(frame.assign(method=frame["method"].replace("quanttune", f"{stranger}[p=1]+mse"))) == 1
    assert shaded(frame.assign(method=frame["method"].replace("quanttune", "ema"))) == 0


def test_a_further_calibrators_rule_has_its_error_split() -> None:
    kinds = [METHODS.get(name) for name in ("mse", "ema", "quanttune", "base_ptq", "ema", "fp32")]
    assert rules_of(kinds) == (*RULES, "ema")
    assert rules_of([]) == RULES
