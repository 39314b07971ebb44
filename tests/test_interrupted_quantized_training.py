"""Training under quantization that is interrupted ends as one that is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from baselines import quantization_aware
from baselines.method import METHODS, MemoryStages
from quanttune.digests import tensor_digest
from quanttune.quantization import Quantized
from quanttune.quantization.quantized_training import QuantizedTraining
from quanttune.tuner import tune
from tests.method_contexts import context_for
from tests.quantization.models import one_thread
from tests.quantized_trainings import scales, under_quantization


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.mark.parametrize("symmetric", [True, False])
def test_an_interrupted_training_ends_with_the_same_weights_and_steps(
    tmp_path: Path, symmetric: bool
) -> None:
    def digest(training: QuantizedTraining) -> str:
        assert training.steps[0].log_ratio.abs().max() > 0
        return tensor_digest(training.state_dict())

    checkpoint = tmp_path / "run.safetensors"
    steps: list[int] = []

    def stop_at_five(done: int, total: int, loss: float) -> None:
        steps.append(done)
        if len(steps) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        under_quantization(
            symmetric=symmetric, checkpoint=checkpoint, checkpoint_every=2, progress=stop_at_five
        )
    assert checkpoint.is_file()
    resumed = under_quantization(
        symmetric=symmetric, checkpoint=checkpoint, checkpoint_every=2, progress=stop_at_five
    )
    assert steps == [1, 2, 3, 4, 5, 5, 6]
    assert digest(resumed) == digest(under_quantization(symmetric=symmetric))


def test_a_checkpoint_of_other_steps_or_rates_is_not_taken(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run.safetensors"

    def first(**more: Any) -> int:
        steps: list[int] = []

        def stop(done: int, total: int, loss: float) -> None:
            steps.append(done)
            if done == 3 or checkpoint.is_file():
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            under_quantization(checkpoint=checkpoint, checkpoint_every=3, progress=stop, **more)
        return steps[0]

    with pytest.raises(KeyboardInterrupt):
        under_quantization(checkpoint=checkpoint, checkpoint_every=2, progress=stop_after(3))
    assert first() == 3
    assert first(rate=2e-2) == 1
    assert first(precision="W6A6") == 1


def stop_after(step: int) -> Callable[[int, int, float], None]:
    def stop(done: int, total: int, loss: float) -> None:
        if done == step:
            raise KeyboardInterrupt

    return stop


class Kept(MemoryStages):
    """Stages whose checkpoints lie in a folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def checkpoint(self, stage: str, key: Any) -> Path:
        return self._folder / f"{tensor_digest({'': torch.tensor(list(repr(key).encode()))})}"


def test_the_method_goes_on_where_it_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization_aware, "tune", partial(tune, checkpoint_every=1))
    done: list[int] = []

    def interrupt(stage: str, step: int, total: int) -> None:
        if "fine-tuning" in stage:
            done.append(step)
            if done == [1, 2, 3]:
                raise KeyboardInterrupt

    def run(progress: Any = lambda *_: None) -> Quantized:
        context = context_for("vit", precision="W4A4", stages=Kept(tmp_path), progress=progress)
        return METHODS.get("lsq")().quantize(context)

    with pytest.raises(KeyboardInterrupt):
        run(interrupt)
    resumed = run(interrupt)
    assert done == [1, 2, 3, 3, 4]
    assert list(tmp_path.iterdir()) == []
    whole = run()
    assert tensor_digest(resumed.weights or {}) == tensor_digest(whole.weights or {})
    assert tensor_digest(scales(resumed)) == tensor_digest(scales(whole))
