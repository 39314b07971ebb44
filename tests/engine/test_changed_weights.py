"""Methods that return weights without training: kept, reopened, and held to what they claim."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import benchmark
from baselines.method import METHODS, Context, Method
from benchmark.engine.runner import CellRunner, Outcome, Settings
from benchmark.grid.expand import expand
from benchmark.grid.suite import parse_suite
from benchmark.keep.store import Store
from benchmark.subject.models.entry import MODELS
from quanttune.errors import StoreError
from quanttune.inputs import call_model, logits_of
from quanttune.quantization import Quantized
from tests.engine.conftest import Block, ToyModel, ToyTask

FACTORS = torch.tensor([0.5, 1.0, 2.0, 3.0, 0.25, 7.0, 1.0, 1.5])


class Folds(Method):
    """Moves factors of the normalisation into the layer that reads it, and calibrates what comes of it."""

    name = "toy_folds"
    error = 0.0
    untied: tuple[str, ...] = ()

    def quantize(self, context: Context) -> Quantized:
        weights = {name: tensor.clone() for name, tensor in context.model.state_dict().items()}
        for name in ("norm.weight", "norm.bias"):
            weights[name] /= FACTORS
        weights["head.weight"] *= FACTORS + self.error
        changed = context.changed(weights)
        plain = METHODS.get("minmax")().quantize(changed)
        return Quantized(
            plain.quantizers, weights, scheme=context.scheme, same_function=True, untied=self.untied
        )


@pytest.fixture(autouse=True)
def folds(toy: ToyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS._items, "toy_folds", Folds)


def run(store: Store, model: str = "toy") -> Outcome:
    text = (
        f'models = ["{model}"]\nprecisions = ["W8A8"]\ncalibration_items = 8\n'
        '[[methods]]\nname = "toy_folds"\n'
    )
    (cell,) = expand(parse_suite("s", text, "s"))
    return CellRunner(Settings(store.root), lambda *_: None).run(cell)


def test_a_method_that_trains_nothing_may_change_weights(store: Store) -> None:
    outcome = run(store)
    assert outcome.status == "done"
    record = store.load(outcome.cell)
    assert record is not None
    assert record.weights_digest != record.reference_digest
    assert 0 <= record.details["function_difference"] < 1e-5
    assert record.cell.recipe_json == "{}"


def test_the_kept_model_computes_what_the_cell_measured(store: Store) -> None:
    outcome = run(store)
    quantized = benchmark.load(outcome.cell.cell_id[:12], results=store.root)
    assert quantized.weights is not None
    reference = Block().eval()
    reference.load_state_dict(ToyModel().make_reference(_NoStages(), lambda *_: None))
    model = quantized.apply(reference)
    items = store.items(outcome.cell.cell_id)
    batch = ToyTask().collate(ToyModel(), items["ids"].tolist())
    with torch.no_grad():
        found = logits_of(call_model(model, batch.inputs)).argmax(dim=-1)
    np.testing.assert_array_equal(found.numpy(), items["predictions"])


def test_a_claim_that_does_not_hold_fails_the_cell(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Folds, "error", 0.05)
    outcome = run(store)
    assert outcome.status == "failed"
    assert "said to compute what the reference computes, but logits differ by" in outcome.message
    assert store.load(outcome.cell) is None


class TiedBlock(Block):
    """The same, with a second name for the head's matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.twin = nn.Linear(8, 3, bias=False)
        self.twin.weight = self.head.weight


class TiedModel(ToyModel):
    name = "toy_tied"

    def build(self) -> nn.Module:
        return TiedBlock().eval()

    def _reference(self, progress: object, device: torch.device) -> dict[str, Tensor]:
        made = super()._reference(progress, device)  # type: ignore[arg-type]
        return made | {"twin.weight": made["head.weight"].clone()}


def test_tied_weights_changed_apart_are_refused(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS._items, "toy_tied", TiedModel())
    outcome = run(store, "toy_tied")
    assert outcome.status == "failed"
    assert "head.weight and twin.weight are one tensor in TiedBlock" in outcome.message


def test_tied_weights_may_become_two_where_the_method_says_so(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MODELS._items, "toy_tied", TiedModel())
    monkeypatch.setattr(Folds, "untied", ("twin.weight",))
    outcome = run(store, "toy_tied")
    assert outcome.status == "done"
    record = store.load(outcome.cell)
    assert record is not None
    assert 0 <= record.details["function_difference"] < 1e-5
    quantized = benchmark.load(outcome.cell.cell_id[:12], results=store.root)
    assert quantized.weights is not None
    assert quantized.untied == ("twin.weight",)
    model = quantized.apply(TiedBlock().eval()).model
    for layer in ("head", "twin"):
        assert torch.equal(getattr(model, layer).weight, quantized.weights[f"{layer}.weight"])


def test_lost_weights_are_said_with_the_remedy(store: Store) -> None:
    outcome = run(store)
    for path in Path(store.root / "stages").rglob("*.safetensors"):
        if path.parent.name == "weights":
            path.unlink()
    message = r"cannot be reopened: the weights .* are no longer kept.*measure it again"
    with pytest.raises(StoreError, match=message):
        benchmark.load(outcome.cell.cell_id[:12], results=store.root)


class _NoStages:
    def tensors(self, stage: str, key: object, make):  # type: ignore[no-untyped-def]
        return make()
