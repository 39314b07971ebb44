"""A model and a task of milliseconds, registered for these tests only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from baselines.method import METHODS, Batch, Context, Method
from benchmark.grid.cells import Cell
from benchmark.grid.expand import expand
from benchmark.grid.suite import Suite, parse_suite
from benchmark.keep.store import Store
from benchmark.subject.models.entry import MODELS, ModelEntry, Progress
from benchmark.subject.tasks.task import TASKS, ClassificationTask
from quanttune.quantization import Quantized
from quanttune.registry import Registry

SUITE = """
models = ["toy"]
precisions = ["W8A8", "W4A4"]
calibration_items = 8
[[methods]]
name = "fp32"
[[methods]]
name = "minmax"
[[methods]]
name = "mse"
"""


class ToyTask(ClassificationTask):
    name = "toy_task"
    title = "three classes of random vectors"
    dataset = "none"
    n_classes = 3

    def fingerprint(self) -> str:
        return "f" * 64

    def split_ids(self, split: str, limit: int | None = None) -> list[int]:
        ids = {"train": range(0, 40), "validation": range(40, 50), "test": range(50, 90)}[split]
        return list(ids)[:limit]

    def collate(self, entry: ModelEntry, ids: Sequence[int]) -> Batch:
        rows = [torch.randn(8, generator=torch.Generator().manual_seed(item)) for item in ids]
        return Batch(torch.stack(rows), torch.tensor([item % 3 for item in ids]))


class Block(nn.Module):
    """What makes a Transformer hard to quantize, in small: a residual sum, a normalisation, an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm, self.head = (
            nn.Linear(8, 16),
            nn.Linear(16, 8),
            nn.LayerNorm(8),
            nn.Linear(8, 3),
        )

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = inputs + self.down(torch.nn.functional.gelu(self.up(inputs)))
        return self.head(self.norm(hidden))


class ToyModel(ModelEntry):
    name = "toy"
    title = "one block"
    family = "toy"
    task = "toy_task"
    source = "random"
    recipe: Mapping[str, Any] = {"steps": 2, "learning_rate": 1e-3, "batch_size": 4}
    weight = 1.0
    made = 0

    def identity(self) -> dict[str, Any]:
        return {"model": "toy"}

    def build(self) -> nn.Module:
        return Block().eval()

    def _reference(self, progress: Progress, device: torch.device) -> dict[str, Tensor]:
        type(self).made += 1
        generator = torch.Generator().manual_seed(0)
        shapes = {name: tensor.shape for name, tensor in self.build().state_dict().items()}
        return {name: self.weight * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


class Trained(Method):
    """Changes the weights and leaves the activations alone."""

    name = "toy_trained"
    trains = True
    calls = 0

    def quantize(self, context: Context) -> Quantized:
        def make() -> dict[str, Tensor]:
            type(self).calls += 1
            return {name: tensor * 0.5 for name, tensor in context.model.state_dict().items()}

        details = {"steps": 2, "largest_ratio": 21.5}
        return Quantized({}, context.stages.tensors("tuned", {"seed": context.seed}, make), details)


class Declines(Method):
    name = "toy_declines"

    def skip(self, sites: Any, profile: str) -> str | None:
        return "the toy has no softmax"

    def quantize(self, context: Context) -> Quantized:
        raise AssertionError("a skipped method must not run")


class Breaks(Method):
    name = "toy_breaks"

    def quantize(self, context: Context) -> Quantized:
        raise ValueError("no range for site 3")


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[ToyModel]:
    """Register the toys; the registries are as before afterwards."""
    entry = ToyModel()
    additions: list[tuple[Registry[Any], str, Any]] = [
        (MODELS, "toy", entry),
        (TASKS, "toy_task", ToyTask()),
        *((METHODS, kind.name, kind) for kind in (Trained, Declines, Breaks)),
    ]
    for registry, name, item in additions:
        registry.names()  # load the real ones first
        monkeypatch.setitem(registry._items, name, item)
    ToyModel.made = Trained.calls = 0
    threads = torch.get_num_threads()
    yield entry
    torch.set_num_threads(threads)


@pytest.fixture
def suite() -> Suite:
    return parse_suite("toys", SUITE, "the test")


@pytest.fixture
def cells(suite: Suite) -> list[Cell]:
    return expand(suite)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "results")


@pytest.fixture
def suite_file(tmp_path: Path) -> str:
    path = tmp_path / "toys.toml"
    path.write_text(SUITE)
    return str(path)


@pytest.fixture
def tracked(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A results folder with MLflow's database, which takes seconds to make, in it."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "mlflow.db").write_bytes(empty_database.read_bytes())
    return folder


@pytest.fixture
def client(tracked: Path) -> Any:
    """What reads MLflow's database of the results folder `tracked`."""
    mlflow = pytest.importorskip("mlflow")
    return mlflow.MlflowClient(tracking_uri=f"sqlite:///{tracked / 'mlflow.db'}")
