"""A cell gives its quantized model back, and that model measures what the cell measured."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

import benchmark
from benchmark.cli import cli
from benchmark.engine.measure import evaluate
from benchmark.engine.reopen import measure_again
from benchmark.engine.runner import CellRunner, Settings
from benchmark.grid.cells import Cell
from benchmark.grid.expand import expand
from benchmark.grid.suite import MethodSpec, Suite, load_suite
from benchmark.keep.record import Record
from benchmark.keep.store import Store
from benchmark.subject.lookup import get_model
from benchmark.subject.tasks.task import get_task
from quanttune.digests import json_digest
from quanttune.errors import ConfigError, StoreError, UnknownNameError


def cells_of(suite: Suite, *methods: str) -> list[Cell]:
    return expand(dataclasses.replace(suite, methods=tuple(MethodSpec(name) for name in methods)))


@pytest.fixture
def measured(store: Store, suite: Suite) -> list[Cell]:
    """Cells with the reference's weights, with weights of a stage of their own, and with tuned ones."""
    cells = cells_of(suite, "fp32", "minmax", "toy_trained", "finetune")
    runner = CellRunner(Settings(store.root), lambda *_: None)
    for cell in cells:
        outcome = runner.run(cell)
        assert outcome.status == "done", outcome.message
    return cells


def measure(model: nn.Module, cell: Cell) -> dict[str, np.ndarray]:
    task, entry = get_task(cell.task), get_model(cell.model)
    device = torch.device("cpu")
    return evaluate(model, task, entry, device=device, progress=lambda *_: None).arrays()


def test_the_reopened_model_gives_every_item_of_the_cell(store: Store, measured: list[Cell]) -> None:
    reference = benchmark.reference("toy", results=store.root)
    before = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    for cell in measured:
        model = benchmark.load(cell.cell_id[:16], results=store.root).apply(reference)
        found, kept = measure(model, cell), store.items(cell.cell_id)
        assert found.keys() == kept.keys()
        for name, array in kept.items():
            assert np.array_equal(found[name], array), f"{cell}: {name}"
    assert all(torch.equal(tensor, before[name]) for name, tensor in reference.state_dict().items())


def test_a_reopened_model_knows_its_reference(store: Store, measured: list[Cell]) -> None:
    (minmax, *_) = (cell for cell in measured if cell.method == "minmax")
    reference = benchmark.reference("toy", results=store.root)
    with torch.no_grad():
        next(reference.parameters()).mul_(1.5)
    with pytest.raises(ConfigError, match="has other weights"):
        benchmark.load(minmax.cell_id[:16], results=store.root).apply(reference)


def test_weights_are_kept_once_and_named(store: Store, measured: list[Cell]) -> None:
    kept = {cell: store.load(cell).quantized for cell in measured}  # type: ignore[union-attr]
    named = {
        method: {where and where.weights for cell, where in kept.items() if cell.method == method}
        for method in ("fp32", "minmax", "toy_trained", "finetune")
    }
    assert named["fp32"] == named["minmax"] == {None}
    for method, stage in (("toy_trained", "weights"), ("finetune", "tuning")):
        (reference,) = named[method]  # both precisions share one file
        assert reference is not None
        assert reference.partition("/")[0] == stage
        assert (store.root / "stages" / f"{reference}.safetensors").exists()
    for cell, where in kept.items():
        assert (where is None) == cell.is_reference
        if where is not None:  # the model itself is not in it
            path = store.root / "cells" / f"{cell.cell_id}.quantized.safetensors"
            assert path.stat().st_size < 20_000


def old(record: Record, store: Store) -> None:
    """Turn a record into one of an older version."""
    path = store.root / "cells" / f"{record.cell.cell_id}.json"
    body = {name: value for name, value in json.loads(path.read_text()).items() if name != "digest"}
    del body["quantized"]
    path.write_text(json.dumps(body | {"digest": json_digest(body)}))
    path.with_suffix(".quantized.safetensors").unlink()


def test_an_old_cell_says_how_to_get_its_model(store: Store, measured: list[Cell]) -> None:
    cell = measured[1]
    record = store.load(cell)
    assert record is not None
    old(record, store)
    again = store.load(cell)
    assert again is not None
    assert again.result == record.result
    text = (store.root / "cells" / f"{cell.cell_id}.json").read_text()
    assert again.to_json()["digest"] == json.loads(text)["digest"]  # views made of it stay up to date
    with pytest.raises(StoreError, match=r"before quantized models were kept; .*--overwrite always --suite"):
        benchmark.load(cell.cell_id[:16], results=store.root)
    shown = CliRunner().invoke(cli, ["show", cell.cell_id[:16], "--results", str(store.root)])
    assert json.loads(shown.stdout)["cell_id"] == cell.cell_id
    assert "python -m benchmark run --overwrite always" in shown.stderr


@pytest.mark.parametrize("harm", ["quantizers", "no quantizers", "weights"])
def test_damage_is_said_with_the_remedy(harm: str, store: Store, measured: list[Cell]) -> None:
    cell = measured[-1]
    path = store.root / "cells" / f"{cell.cell_id}.quantized.safetensors"
    record = store.load(cell)
    assert record is not None
    assert record.quantized is not None
    if harm == "quantizers":
        path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    elif harm == "no quantizers":
        path.unlink()
    else:
        (store.root / "stages" / f"{record.quantized.weights}.safetensors").write_bytes(b"")
    with pytest.raises(StoreError, match=r"cannot be reopened: .* measure it again: `python -m"):
        benchmark.load(cell.cell_id, results=store.root)
    assert store.load(cell) is not None  # the number is as good as before


def test_the_command_that_measures_again_names_the_suite_that_holds_the_cell(tmp_path: Path) -> None:
    cell = next(cell for cell in expand(load_suite("smoke")) if not cell.is_reference)
    words = measure_again(cell, " --results mine").strip("`").split()[3:]
    assert words[0] == "run"
    assert words[words.index("--suite") + 1] == "smoke"
    assert words[-2:] == ["--results", "mine"]
    listed = CliRunner().invoke(cli, [*words, "--dry-run", "--results", str(tmp_path)])
    assert cell.cell_id[:12] in listed.stdout


def test_and_it_measures_in_the_same_precision_of_the_reference() -> None:
    cell = expand(load_suite("smoke"), autocast="bf16")[0]
    assert "--autocast bf16 --results mine`" in measure_again(cell, " --results mine")


def test_skipped_cells_and_unknown_ones_are_refused(store: Store, suite: Suite) -> None:
    (cell, _) = cells_of(suite, "toy_declines")
    CellRunner(Settings(store.root), lambda *_: None).run(cell)
    with pytest.raises(StoreError, match=r"was skipped.*no softmax"):
        benchmark.load(cell.cell_id, results=store.root)
    with pytest.raises(StoreError, match="no finished cell"):
        benchmark.load("abc", results=store.root)
    with pytest.raises(UnknownNameError, match="did you mean toy"):
        benchmark.reference("toyy", results=store.root)


def test_show_prints_the_lines_that_reopen_it(store: Store, measured: list[Cell]) -> None:
    for cell in measured[:2]:
        shown = CliRunner().invoke(cli, ["show", cell.cell_id[:16], "--results", str(store.root)])
        assert json.loads(shown.stdout)["cell_id"] == cell.cell_id
        space: dict[str, Any] = {}
        exec(shown.stderr, space)  # noqa: S102 - what is printed is what works
        found = measure(space["model"], cell)
        assert np.array_equal(found["scores"], store.items(cell.cell_id)["scores"])


def test_a_reference_that_changed_does_not_fit_the_cell(
    store: Store, measured: list[Cell], toy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in (store.root / "stages" / "reference").iterdir():
        path.unlink()
    monkeypatch.setattr(toy, "weight", 2.0)
    CellRunner(Settings(store.root, overwrite="always"), lambda *_: None).run(measured[0])
    with pytest.raises(StoreError, match="other reference weights"):
        benchmark.load(measured[1].cell_id, results=store.root)
