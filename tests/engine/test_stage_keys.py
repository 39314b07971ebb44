"""What the engine keeps of a cell is taken by no cell that would measure something else."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmark.engine import noise, session
from benchmark.engine.noise import measure_copies
from benchmark.engine.session import Session
from benchmark.grid.cells import Cell
from benchmark.keep.stages import Stages
from benchmark.subject.models.entry import MODELS
from benchmark.subject.tasks.task import TASKS
from tests.engine.conftest import Block, ToyModel, ToyTask


class Recorded(Stages):
    """Notes what was asked for, and what had to be made."""

    asked: list[str]
    made: list[str]

    def scoped(self, **scope: Any) -> Recorded:
        scoped = Recorded(self.folder, {**self.scope, **scope})
        scoped.asked, scoped.made = self.asked, self.made
        return scoped

    def tensors(self, stage: str, key: Any, make: Any) -> dict[str, Tensor]:
        def noted() -> dict[str, Tensor]:
            self.made.append(stage)
            found: dict[str, Tensor] = make()
            return found

        self.asked.append(stage)
        return super().tensors(stage, key, noted)


class OtherBlock(Block):
    """The same weights, and another activation function."""

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = inputs + self.down(torch.nn.functional.relu(self.up(inputs)))
        return self.head(self.norm(hidden))


class OtherModel(ToyModel):
    """As one gets by changing a line of a checkpoint's configuration."""

    def identity(self) -> dict[str, Any]:
        return {"model": "toy", "activation": "relu"}

    def build(self) -> nn.Module:
        return OtherBlock().eval()


class OtherTask(ToyTask):
    def fingerprint(self) -> str:
        return "e" * 64


CHANGES: dict[str, dict[str, Any]] = {
    "limit": {"limit": 20},
    "split": {"split": "validation"},
    "autocast": {"autocast": "bf16"},
    "precision": {"precision": "W4A8"},
    "activations": {"precision": "W8A4"},
    "granularity": {"weight_granularity": "per_tensor"},
    "symmetry": {"symmetric": False},
    "profile": {"profile": "matmul"},
    "seed": {"seed": 1},
    "calibration items": {"calibration_items": 4},
    "noise": {"noise": "all"},
    "method": {"method": "mse"},
}


def measured(stages: Recorded, cell: Cell, device: str = "cpu") -> list[Any]:
    """What is kept of a cell: the FP32 items of its weights, and those of the perturbed copies."""
    here = Session("toy", stages, torch.device(device), lambda *_: None)
    items = here.fp32_items(here.model, here.reference_digest, cell.limit, cell.split, cell.autocast)
    quantized = cell.make_method().quantize(here.context(cell))
    copies = measure_copies(here, cell, quantized, here.model, here.reference_digest)
    return [{name: tensor.tolist() for name, tensor in each.tensors().items()} for each in (items, *copies)]


def recorded(folder: Path) -> Recorded:
    stages = Recorded(folder / "stages")
    stages.asked, stages.made = [], []
    return stages


@pytest.fixture
def cell(cells: list[Cell]) -> Cell:
    return next(cell for cell in cells if cell.method == "minmax" and cell.precision == "W8A8")


@pytest.mark.parametrize("name", CHANGES)
def test_a_cell_that_differs_finds_what_it_would_make(name: str, cell: Cell, tmp_path: Path) -> None:
    changed = dataclasses.replace(cell, **CHANGES[name])
    stages = recorded(tmp_path / "shared")
    first = measured(stages, cell)
    assert measured(stages, changed) == (alone := measured(recorded(tmp_path / "alone"), changed))
    assert alone != first
    before = len(stages.made)
    assert measured(stages, cell) == first
    assert len(stages.made) == before


@pytest.mark.parametrize(
    "subject", [(MODELS, "toy", OtherModel()), (TASKS, "toy_task", OtherTask())], ids=["model", "task"]
)
def test_another_model_of_the_same_weights_finds_nothing(
    subject: Any, cell: Cell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found: a folder whose configuration was changed had the FP32 accuracy from before the change."""
    stages = recorded(tmp_path)
    first = measured(stages, cell)
    registry, name, other = subject
    monkeypatch.setitem(registry._items, name, other)
    stages.asked.clear()
    stages.made.clear()
    assert (measured(stages, cell) == first) == (name == "toy_task")
    assert [stage for stage in stages.asked if stage not in stages.made] in ([], ["reference"])


@pytest.mark.parametrize("where", [session, noise])
def test_another_engine_finds_nothing_of_this_one(
    where: Any, cell: Cell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = recorded(tmp_path)
    measured(stages, cell)
    monkeypatch.setattr(where, "ENGINE_VERSION", where.ENGINE_VERSION + 1)
    stages.made.clear()
    measured(stages, cell)
    assert stages.made == ["fp32_items" if where is session else "rounding"]


def test_other_weights_and_another_kind_of_device_find_nothing(cell: Cell, tmp_path: Path) -> None:
    stages = recorded(tmp_path)
    here = Session("toy", stages, torch.device("cpu"), lambda *_: None)
    items = here.fp32_items(here.model, here.reference_digest, None)
    weights = {name: 0.5 * tensor for name, tensor in here.model.state_dict().items()}
    other = here.fp32_items(*here.with_weights(weights), None)
    assert items.scores.tolist() != other.scores.tolist()
    quantized = cell.make_method().quantize(here.context(cell))
    for model, digest in ((here.model, here.reference_digest), here.with_weights(weights)):
        measure_copies(here, cell, quantized, model, digest)
    assert stages.made.count("rounding") == 2
    scopes = [
        Session("toy", stages, torch.device(kind), lambda *_: None).stages.scope for kind in ("cpu", "cuda")
    ]
    assert scopes[0] != scopes[1]
