"""A fine-tuning goes on from its own checkpoint or starts over, whatever lies in the place of one."""

from __future__ import annotations

import copy
import itertools
import json
import random
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import cross_entropy

from quanttune import OutlierLoss, OutlierLossConfig, Schedule, tune
from quanttune.checkpoint import Checkpoint
from quanttune.digests import tensor_digest
from tests.faults.fuzzing import TRIES, fuzzed
from tests.faults.mutations import damaged, mutated

with torch.random.fork_rng():
    torch.manual_seed(0)
    NETWORK = nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 3))
SCHEDULE = Schedule(steps=6, learning_rate=1e-3, batch_size=4)
CONFIG = OutlierLossConfig(threshold=1.5, kinds=None)


def tuned(checkpoint: Path | None, stop: int | None = None) -> str:
    """Digest of a small network's weights after a fine-tuning; each begins with the same."""
    generator = torch.Generator().manual_seed(0)
    model = copy.deepcopy(NETWORK)
    batches = ((torch.randn(4, 5, generator=generator), torch.arange(4) % 3) for _ in itertools.count())
    outliers = OutlierLoss(
        model, torch.ones(4, 5), SCHEDULE.steps, OutlierLossConfig(threshold=1.5, kinds=None)
    )

    def progress(done: int, total: int, loss: float) -> None:
        if done == stop:
            raise KeyboardInterrupt

    tune(
        model,
        batches,
        cross_entropy,
        SCHEDULE,
        outliers=outliers,
        checkpoint=checkpoint,
        checkpoint_every=2,
        progress=progress,
    )
    return tensor_digest(model.state_dict())


@TRIES
def test_a_checkpoint_of_any_shape(tries: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights of an undisturbed fine-tuning, whatever lies where one was interrupted."""
    path = tmp_path / "run.safetensors"
    with pytest.raises(KeyboardInterrupt):
        tuned(path, stop=5)
    whole, rng, expected = path.read_bytes(), random.Random(0), tuned(None)
    with safe_open(path, framework="pt") as stream:
        state = json.loads(stream.metadata()["state"])
        digest = stream.metadata()["digest"]
    tensors = load_file(path)

    def changed() -> bytes:
        if rng.random() < 0.5:
            return damaged(whole, rng)
        text = json.dumps(mutated(state, rng), ensure_ascii=True)
        save_file(tensors, path, metadata={"state": text, "digest": digest})
        return path.read_bytes()

    def attempt() -> str:
        return "right" if tuned(path) == expected else "wrong"

    path.write_bytes(whole)
    assert attempt() == "right"
    assert fuzzed(path, tries, attempt, changed)["right"] == tries


@TRIES
def test_a_checkpoint_that_somebody_sealed(
    tries: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who knows the format can write any state; it is taken, or the run starts over, and nothing breaks."""
    path = tmp_path / "run.safetensors"
    with pytest.raises(KeyboardInterrupt):
        tuned(path, stop=5)
    rng, expected = random.Random(0), tuned(None)
    with safe_open(path, framework="pt") as stream:
        state = json.loads(stream.metadata()["state"])
    tensors = load_file(path)
    # a seal that fits whatever is sealed
    monkeypatch.setattr(Checkpoint, "_digest", lambda self, text, tensors: "sealed")

    def changed() -> bytes:
        found = dict(tensors)
        if rng.random() < 0.3:
            name = rng.choice(sorted(found))
            tensor = found.pop(name)
            found[rng.choice([name, name + "x", "optimizer|99|step", "optimizer|a|step", "x"])] = rng.choice(
                [tensor, torch.zeros(2, 3), tensor.to(torch.int64), torch.zeros(0)]
            ).clone()
        text = json.dumps(mutated(state, rng), ensure_ascii=True)
        save_file(found, path, metadata={"state": text, "digest": "sealed"})
        return path.read_bytes()

    def attempt() -> str:
        return "right" if tuned(path) == expected else "taken as it is"

    ends = fuzzed(path, tries, attempt, changed)
    assert ends["right"] > tries / 3
