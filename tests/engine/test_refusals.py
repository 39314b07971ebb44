"""What a component or a caller may not do, said in one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import benchmark
from baselines.method import METHODS, Context, Method
from benchmark.engine.runner import CellRunner, Settings
from benchmark.grid.expand import expand
from benchmark.grid.suite import Suite, parse_suite
from benchmark.keep.store import Store
from quanttune.errors import ConfigError, NameTakenError, QuantTuneError
from quanttune.quantization import Quantized, quantize
from quanttune.registry import Registry


class Mutates(Method):
    name = "toy_mutates"

    def quantize(self, context: Context) -> Quantized:
        with torch.no_grad():
            for parameter in context.model.parameters():
                parameter.data.mul_(3)
        return Quantized({})


class Nothing(Method):
    name = "toy_nothing"

    def quantize(self, context: Context) -> Quantized:
        return None  # type: ignore[return-value]


class Exits(Method):
    name = "toy_exits"

    def quantize(self, context: Context) -> Quantized:
        raise SystemExit(5)


SUITE = """
models = ["toy"]
precisions = ["W8A8"]
calibration_items = 8
[[methods]]
name = "minmax"
"""


def suite_with(method: str) -> Suite:
    return parse_suite("s", SUITE.replace("[[methods]]", f'[[methods]]\nname = "{method}"\n[[methods]]'), "s")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Mutates, "method toy_mutates changed context.model in place"),
        (Nothing, "method toy_nothing returned NoneType, not a Quantized"),
        (Exits, "SystemExit: 5"),
    ],
)
def test_a_method_that_misbehaves_fails_its_own_cell_and_no_other(
    kind: type[Method], message: str, store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(METHODS._items, kind.name, kind)
    (plain,) = expand(parse_suite("s", SUITE, "s"))
    alone = CellRunner(Settings(tmp_path / "alone"), lambda *_: None).run(plain)
    runner = CellRunner(Settings(store.root), lambda *_: None)
    outcomes = {cell.method: runner.run(cell) for cell in expand(suite_with(kind.name))}
    assert outcomes[kind.name].status == "failed"
    assert message in outcomes[kind.name].message
    assert (outcomes["minmax"].status, outcomes["minmax"].value) == ("done", alone.value)


def test_a_component_has_one_name() -> None:
    registry: Registry[type[Method]] = Registry("method")
    with pytest.raises(
        NameTakenError, match="is registered as method 'other' and calls itself 'toy_nothing'"
    ):
        registry.register("other")(Nothing)
    assert registry.register("toy_nothing")(Nothing) is Nothing


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"precisions": 8}, "precisions = 8: give a str"),
        ({"seeds": "0"}, "seeds = '0': give a int"),
        ({"models": None}, "models = None: give a str"),
        ({"limit": 1.5}, "limit = 1.5: give a whole number"),
        ({"limit": "16"}, "limit = '16': give a whole number"),
    ],
)
def test_values_of_another_type_are_named(given: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        benchmark.run("smoke", results=tmp_path, **given)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="123 is no cell id"):
        benchmark.load(123)  # type: ignore[arg-type]


def test_quantizing_says_what_it_cannot_take() -> None:
    model, batch = nn.Linear(2, 2), torch.ones(1, 2)
    with pytest.raises(ConfigError, match="scheme 8 is neither a text such as W8A8 nor a Scheme"):
        quantize(model, [batch], 8)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="a batch is a tuple; give the model's inputs alone"):
        quantize(model, [(batch, batch)])
    with pytest.raises(ConfigError, match=r"is a tensor; give a list of batches, \[batch\] for a single one"):
        quantize(model, batch)
    with pytest.raises(QuantTuneError, match="profile matmul of ReLU has nothing to quantize"):
        quantize(nn.ReLU(), [batch], profile="matmul")


def test_a_users_file_that_fails_in_a_view_is_named(tmp_path: Path) -> None:
    """One line with the file and the line, no traceback; ours would be a fault of the suite and is shown."""
    path = tmp_path / "boom.py"
    path.write_text(
        "from benchmark.report.figures.figure import FIGURES, SuiteFigure\n"
        "@FIGURES.register('boom')\n"
        "class Boom(SuiteFigure):\n"
        "    title = caption = 'x'\n"
        "    def frame(self, rows):\n"
        "        raise ValueError('no data')\n"
        "    def draw(self, frame):\n"
        "        raise ValueError('no data')\n"
    )
    suite = tmp_path / "one.toml"
    suite.write_text(
        'models = ["tiny_vit"]\nprecisions = ["W8A8"]\ncalibration_items = 16\nlimit = 16\n'
        '[[methods]]\nname = "fp32"\n[[methods]]\nname = "minmax"\n'
    )
    for _ in benchmark.run(suite, results=tmp_path / "results", track=False):
        pass
    command = [sys.executable, "-m", "benchmark", "figure", "--only", "boom", "--include", str(path)]
    command += ["--suite", str(suite), "--results", str(tmp_path / "results")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == [f"error: {path}: it failed in line 6: ValueError: no data"]
