"""Where and in what precision a cell computes: mixed precision makes another cell, a device does not."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from baselines import METHODS
from benchmark.cli import cli
from benchmark.engine.measure import evaluate
from benchmark.engine.runner import CellRunner, Settings
from benchmark.engine.session import Session
from benchmark.grid.autocast import AUTOCAST, autocast_type
from benchmark.grid.cells import Cell
from benchmark.grid.expand import expand
from benchmark.grid.suite import MethodSpec, Suite, parse_suite
from benchmark.keep.record import Record
from benchmark.keep.stages import Stages
from benchmark.keep.store import Store
from benchmark.subject.lookup import get_model
from quanttune.errors import UnknownNameError
from quanttune.inputs import call_model, logits_of, to_device
from tests.engine.conftest import SUITE

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def run(store: Store, cells: list[Cell], device: str = "cpu") -> list[Record]:
    runner = CellRunner(Settings(store.root, device=device), lambda *_: None)
    records = []
    for cell in cells:
        outcome = runner.run(cell)
        assert outcome.status == "done", outcome.message
        record = store.load(cell)
        assert record is not None
        records.append(record)
    return records


def test_full_precision_needs_no_saying(suite: Suite) -> None:
    for cell, mixed in zip(expand(suite), expand(suite, autocast="bf16"), strict=True):
        assert "autocast" not in cell.identity()
        assert mixed.identity() == {**cell.identity(), "autocast": "bf16"}
        assert Cell.from_identity(mixed.identity()) == mixed
        assert "bf16" in str(mixed) or mixed.is_reference


def test_a_suite_may_ask_for_it(suite: Suite) -> None:
    asking = parse_suite("toys", SUITE.replace("[[", 'autocast = "bf16"\n[[', 1), "the test")
    assert [cell.cell_id for cell in expand(asking)] == [
        cell.cell_id for cell in expand(suite, autocast="bf16")
    ]
    assert [cell.cell_id for cell in expand(asking, autocast="none")] == [
        cell.cell_id for cell in expand(suite)
    ]


def test_unknown_precisions_are_refused(suite: Suite, suite_file: str, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="bf16"):
        expand(suite, autocast="bf61")
    assert {name: autocast_type(name) for name in AUTOCAST} == {"none": None, "bf16": torch.bfloat16}
    arguments = ["run", "--all", "--suite", suite_file, "--results", str(tmp_path / "r")]
    assert CliRunner().invoke(cli, [*arguments, "--autocast", "fp8"]).exit_code == 2


def test_the_reference_runs_in_mixed_precision_and_the_simulation_does_not(
    store: Store, suite: Suite
) -> None:
    session = Session("toy", Stages(store.root / "stages"), torch.device("cpu"), lambda *_: None)
    seen: list[tuple[bool, torch.dtype]] = []

    def watch(module: torch.nn.Module, args: object, output: torch.Tensor) -> None:
        seen.append((torch.is_autocast_enabled("cpu"), output.dtype))

    session.model.up.register_forward_hook(watch)
    session.fp32_items(session.model, session.reference_digest, None, autocast="bf16")
    assert seen == [(True, torch.bfloat16)]
    session.fp32_items(session.model, session.reference_digest, None)
    assert seen[1:] == [(False, torch.float32)]  # kept apart from the first
    session.fp32_items(session.model, session.reference_digest, None, autocast="bf16")
    assert len(seen) == 2
    full, mixed = (run(store, expand(suite, autocast=name)) for name in AUTOCAST)
    assert [record.sites for record in full] == [record.sites for record in mixed]
    for one, other in zip(full[1:], mixed[1:], strict=True):
        assert one.items_sha256 == other.items_sha256


def test_mixed_precision_logits_are_those_of_autocast(store: Store) -> None:
    session = Session("toy", Stages(store.root / "stages"), torch.device("cpu"), lambda *_: None)
    kept: list[torch.Tensor] = []
    task = session.task

    class Keeping(type(task)):
        def item_scores(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            kept.append(logits)
            return super().item_scores(logits, targets)

    evaluate(
        session.model,
        Keeping(),
        get_model("toy"),
        device=torch.device("cpu"),
        progress=lambda *_: None,
        autocast=torch.bfloat16,
    )
    (batch,) = task.batches("test", session.entry, batch_size=50)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = logits_of(call_model(session.model, batch.inputs))
    assert expected.dtype == torch.bfloat16
    assert torch.equal(kept[0], expected.float())
    with torch.no_grad():
        assert not torch.equal(kept[0], logits_of(call_model(session.model, batch.inputs)))


def test_fine_tuning_in_mixed_precision_gives_other_weights(store: Store, suite: Suite) -> None:
    tuned = dataclasses.replace(suite, methods=(MethodSpec("quanttune"),))
    full, mixed = (run(store, expand(tuned, autocast=name)) for name in AUTOCAST)
    assert {record.weights_digest for record in full}.isdisjoint({record.weights_digest for record in mixed})
    assert len({record.weights_digest for record in mixed}) == 1  # one tuning for all widths


def test_calibration_items_stay_off_the_device(store: Store) -> None:
    session = Session("toy", Stages(store.root / "stages"), torch.device("meta"), lambda *_: None)
    assert {batch.inputs.device.type for batch in session.calibration(8, 0)} == {"cpu"}
    assert session.model.up.weight.device.type == "meta"
    moved = to_device(session.calibration(8, 0)[0].inputs, session.device)
    assert logits_of(call_model(session.model, moved)).device.type == "meta"


@needs_cuda
@pytest.mark.parametrize("method", METHODS.names())
def test_cells_run_on_a_gpu(method: str, tmp_path: Path, suite: Suite) -> None:
    cells = expand(dataclasses.replace(suite, methods=(MethodSpec(method),)))
    if method.startswith("toy_"):
        pytest.skip("made for other tests")
    if method == "rotation":
        pytest.skip("the toy has no attention to rotate")
    cpu, cuda = (run(Store(tmp_path / device), cells, device) for device in ("cpu", "cuda"))
    for one, other in zip(cpu, cuda, strict=True):
        assert one.result is not None
        assert other.result is not None
        assert other.provenance["device"] == "cuda"
        assert np.isclose(one.result.value, other.result.value, atol=10)
