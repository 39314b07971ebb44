"""What is true of every registered method, model and task, also of one added tomorrow."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from baselines import METHODS
from benchmark.engine.runner import CellRunner, Settings
from benchmark.grid.cells import Cell
from benchmark.grid.expand import expand
from benchmark.grid.suite import MethodSpec, Suite
from benchmark.keep.store import Store
from benchmark.subject.assets.catalogue import get_asset
from benchmark.subject.models.entry import MODELS
from benchmark.subject.tasks.task import TASKS
from quanttune.digests import canonical_json, tensor_digest

METHOD_NAMES = METHODS.names()
MODEL_NAMES = MODELS.names()


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_methods_describe_themselves(name: str) -> None:
    kind = METHODS.get(name)
    method = kind()
    assert kind.name == name
    assert kind.variant in ("paper", "reference-code", "ours")
    assert isinstance(kind.version, int)
    assert kind.version >= 1
    assert kind.__doc__
    assert canonical_json(method.parameters())
    assert kind(**method.parameters()) == method
    assert method.label == name


def cells_of(name: str, suite: Suite) -> list[Cell]:
    return expand(dataclasses.replace(suite, methods=(MethodSpec(name),)))


def reference_of(runner: CellRunner) -> str:
    assert runner._session is not None
    return runner._session.reference_digest


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_methods_run_or_decline_repeatably_and_leave_the_reference_alone(
    name: str, suite: Suite, tmp_path: Path
) -> None:
    found = []
    for folder in ("one", "two"):
        store = Store(tmp_path / folder)
        runner = CellRunner(Settings(store.root), lambda *_: None)
        for cell in cells_of(name, suite):
            outcome = runner.run(cell)
            assert outcome.status in ("done", "skipped"), outcome.message
            assert (outcome.status == "skipped") == bool(outcome.message)
            record = store.load(cell)
            assert record is not None
            found.append(
                (cell.cell_id, record.result, record.items_sha256, record.weights_digest, record.sites)
            )
            if record.result is not None:
                # Weights of their own are measured in float, too, whether training or a fold made them.
                own = record.weights_digest != reference_of(runner)
                assert (record.result.fp32_own is not None) == own
                assert own or not METHODS.get(name).trains
        session = runner._session
        assert session is not None
        assert tensor_digest(session.model.state_dict()) == session.reference_digest
    half = len(found) // 2
    assert found[:half] == found[half:]


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_models_describe_themselves(name: str) -> None:
    entry = MODELS.get(name)
    assert entry.name == name
    assert entry.task in TASKS
    assert canonical_json(entry.identity()) == canonical_json(entry.identity())
    assert canonical_json(dict(entry.recipe))
    for asset in entry.needs():
        assert get_asset(asset).tensor_digest
    assert entry.tolerance > 0


def test_no_two_models_share_an_identity() -> None:
    identities = [canonical_json(MODELS.get(name).identity()) for name in MODEL_NAMES]
    assert len(set(identities)) == len(identities)
