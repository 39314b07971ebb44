"""What does not fit is done in halves, to the same scores, and a record says how large batches were."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmark.engine.measure import Items, evaluate
from benchmark.engine.memory import OutOfMemoryError, in_fitting_batches, is_out_of_memory
from benchmark.engine.runner import CellRunner, Settings
from benchmark.grid.cells import Cell
from benchmark.keep.store import Store
from benchmark.subject.lookup import get_model
from benchmark.subject.tasks.task import get_task
from quanttune.quantization import UniformQuantizer, discover_sites, simulate
from tests.engine.conftest import Block, ToyModel

CPU_MESSAGE = "[enforce fail at alloc_cpu.cpp:119] err == 0. DefaultCPUAllocator: can't allocate memory"


class Tight(nn.Module):
    """Refuses batches above a size, like a device whose memory is full."""

    def __init__(self, most: int, error: Exception) -> None:
        super().__init__()
        self.block = Block().eval()
        self.most, self.error = most, error
        self.sizes: list[int] = []

    def forward(self, inputs: Tensor) -> Tensor:
        self.sizes.append(len(inputs))
        hidden = self.block(inputs)
        if len(inputs) > self.most:
            raise self.error
        return hidden


def items_of(model: nn.Module) -> Items:
    task, entry = get_task("toy_task"), get_model("toy")
    return evaluate(model, task, entry, device=torch.device("cpu"), progress=lambda *_: None)


@pytest.fixture
def roomy() -> Tight:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Tight(1000, RuntimeError(CPU_MESSAGE))


@pytest.mark.parametrize(
    "error", [RuntimeError(CPU_MESSAGE), torch.OutOfMemoryError("CUDA out of memory"), MemoryError()]
)
def test_batches_are_halved_until_they_fit(roomy: Tight, error: Exception) -> None:
    tight = Tight(11, error)
    tight.block = roomy.block
    plain, halved = items_of(roomy), items_of(tight)
    assert roomy.sizes == [40]  # 40 items, at most 50 a batch
    assert tight.sizes == [40, 25, 12, 6, 6, 6, 6, 6, 6, 4]
    assert (plain.batch_size, halved.batch_size) == (50, 6)
    for name, expected in plain.arrays().items():
        # logits of smaller batches differ in their last bits, and with them probabilities
        tolerance = 1e-5 if name in plain.quantities else 0.0
        np.testing.assert_allclose(halved.arrays()[name], expected, rtol=tolerance)


def test_what_is_done_is_not_done_again() -> None:
    seen: list[int] = []

    def run(items: Sequence[int], batch_size: int) -> Iterator[int]:
        for start in range(0, len(items), batch_size):
            part = items[start : start + batch_size]
            if 7 in part and len(part) > 2:  # a long item
                raise MemoryError
            seen.extend(part)
            yield len(part)

    found = list(in_fitting_batches(run, range(16), 4, "a model"))
    assert seen == list(range(16))
    assert found == [(4, 4), *[(2, 2)] * 6]


def test_a_simulation_survives_a_batch_that_does_not_fit(roomy: Tight) -> None:
    sites = discover_sites(roomy, torch.randn(2, 8)).profile("full")
    quantizers = {site: UniformQuantizer.symmetric(3.0, 4) for site in sites.activations()}
    tight = Tight(11, torch.OutOfMemoryError("CUDA out of memory"))
    tight.block = roomy.block
    with simulate(roomy, quantizers):
        plain = items_of(roomy)
    with simulate(tight, quantizers):
        halved = items_of(tight)
    np.testing.assert_array_equal(plain.scores, halved.scores)


def test_a_single_item_that_does_not_fit_is_an_error_with_a_remedy() -> None:
    with pytest.raises(OutOfMemoryError, match=r"model toy: a single item .* --device"):
        items_of(Tight(0, RuntimeError(CPU_MESSAGE)))


def test_other_errors_pass_through() -> None:
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert not is_out_of_memory(ValueError(CPU_MESSAGE))
    tight = Tight(11, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes"):
        items_of(tight)
    assert tight.sizes == [40]


def test_a_record_says_how_large_batches_were(
    cells: list[Cell], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refusing(Block):
        def forward(self, inputs: Tensor) -> Tensor:
            if len(inputs) > 30:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().forward(inputs)

    found = []
    for kind, folder in ((Block, "roomy"), (Refusing, "tight")):
        monkeypatch.setattr(ToyModel, "build", lambda self, kind=kind: kind().eval())
        store = Store(tmp_path / folder)
        runner = CellRunner(Settings(store.root), lambda *_: None)
        for cell in cells[:2]:
            assert runner.run(cell).status == "done"
            record = store.load(cell)
            assert record is not None
            found.append((record.details["evaluation_batch"], record.result, record.items_sha256))
    assert [size for size, *_ in found] == [50, 50, 25, 25]
    assert [rest for _, *rest in found[:2]] == [rest for _, *rest in found[2:]]


def test_the_batch_size_is_kept_with_the_items_but_is_no_array_of_the_store() -> None:
    items = Items(np.arange(3), np.ones(3), None, 25)
    assert Items.from_tensors(items.tensors()).batch_size == 25
    assert set(items.arrays()) == {"ids", "scores"}
    assert Items.from_tensors(dataclasses.replace(items, batch_size=None).tensors()).batch_size is None
