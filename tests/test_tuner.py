"""The fine-tuning loop: deterministic, resumable after an interruption, and it refuses broken models."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from quanttune import OutlierLoss, OutlierLossConfig, Schedule, tune
from quanttune.digests import tensor_digest
from quanttune.errors import ConfigError, TuningDivergedError
from quanttune.seeds import torch_generator

SCHEDULE = Schedule(steps=8, learning_rate=1e-3, batch_size=4)


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return timm.create_model(
            "vit_tiny_patch16_224",
            img_size=32,
            depth=2,
            embed_dim=24,
            num_heads=2,
            num_classes=3,
            drop_rate=0.1,
        )


def batches(start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch_generator(0, "batches")
    for _ in itertools.count():
        yield torch.randn(4, 3, 32, 32, generator=generator), torch.randint(3, (4,), generator=generator)


def tuned(model: nn.Module, schedule: Schedule = SCHEDULE, outliers: bool = True, **more: object) -> str:
    model = copy.deepcopy(model)
    example = next(batches())[0]
    loss = OutlierLoss(model, example, schedule.steps, OutlierLossConfig(threshold=2.0)) if outliers else None
    tune(model, batches(), cross_entropy, schedule, outliers=loss, seed=5, **more)  # type: ignore[arg-type]
    return tensor_digest(model.state_dict())


def test_same_seed_same_weights_and_global_state_untouched(vit: nn.Module) -> None:
    before = torch.random.get_rng_state()
    assert tuned(vit) == tuned(vit)
    assert torch.equal(before, torch.random.get_rng_state())


def test_weight_zero_is_plain_fine_tuning(vit: nn.Module) -> None:
    """The control and QuantTune differ in the loss alone, to the bit."""
    model = copy.deepcopy(vit)
    example = next(batches())[0]
    silent = OutlierLoss(model, example, SCHEDULE.steps, OutlierLossConfig(weight=0.0))
    tune(model, batches(), cross_entropy, SCHEDULE, outliers=silent, seed=5)
    assert tensor_digest(model.state_dict()) == tuned(vit, outliers=False)
    assert tuned(vit) != tuned(vit, outliers=False)


@pytest.mark.parametrize("outliers", [True, False])
def test_an_interrupted_run_ends_with_the_same_weights(
    vit: nn.Module, tmp_path: Path, outliers: bool
) -> None:
    checkpoint = tmp_path / "run.safetensors"

    def stop_at_five(done: int, total: int, loss: float) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tuned(vit, outliers=outliers, checkpoint=checkpoint, checkpoint_every=2, progress=stop_at_five)
    assert checkpoint.is_file()
    steps: list[int] = []
    resumed = tuned(
        vit,
        outliers=outliers,
        checkpoint=checkpoint,
        checkpoint_every=2,
        progress=lambda done, *_: steps.append(done),
    )
    assert steps[0] == 5  # four steps were saved, the fifth is done again
    assert resumed == tuned(vit, outliers=outliers)
    assert not checkpoint.exists()


def test_a_damaged_or_foreign_checkpoint_is_ignored(vit: nn.Module, tmp_path: Path) -> None:
    checkpoint = tmp_path / "run.safetensors"
    checkpoint.write_bytes(b"not safetensors")
    assert tuned(vit, checkpoint=checkpoint) == tuned(vit)

    def stop(done: int, total: int, loss: float) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tuned(vit, checkpoint=checkpoint, checkpoint_every=2, progress=stop)
    other = Schedule(steps=8, learning_rate=2e-3, batch_size=4)
    assert tuned(vit, other, checkpoint=checkpoint) == tuned(vit, other)


def test_a_run_that_breaks_the_model_is_refused(vit: nn.Module) -> None:
    wild = Schedule(steps=30, learning_rate=10.0, batch_size=4, clip=1e9)
    with pytest.raises(TuningDivergedError, match="lower the learning rate"):
        tuned(vit, wild, outliers=False)


def test_accumulation_equals_one_large_batch() -> None:
    """Two half batches make the gradient of the whole one, for the task and for the penalty."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3))
    inputs = torch.randn(8, 6, generator=torch_generator(0, "inputs"))
    targets = torch.randint(3, (8,), generator=torch_generator(0, "targets"))
    results = []
    for accumulation, size in ((1, 8), (2, 4)):
        copied = copy.deepcopy(model)
        schedule = Schedule(steps=3, learning_rate=1e-2, accumulation=accumulation)
        data = itertools.cycle(list(zip(inputs.split(size), targets.split(size), strict=True)))
        tune(copied, data, cross_entropy, schedule)
        results.append(copied.state_dict())
    for name, tensor in results[0].items():
        torch.testing.assert_close(tensor, results[1][name], rtol=1e-4, atol=1e-5)


def test_mixed_precision_keeps_float32_weights(vit: nn.Module) -> None:
    model = copy.deepcopy(vit)
    outliers = OutlierLoss(model, next(batches())[0], 4, OutlierLossConfig(threshold=2.0))
    report = tune(
        model,
        batches(),
        cross_entropy,
        Schedule(steps=4, learning_rate=1e-3, batch_size=4),
        outliers=outliers,
        autocast=torch.bfloat16,
    )
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert report["last_loss"] == pytest.approx(report["first_loss"], rel=0.5)


def test_bad_schedules_are_refused() -> None:
    for settings in (
        {"steps": 0},
        {"learning_rate": -1.0},
        {"batch_size": 0},
        {"accumulation": 0},
        {"norm_rate": -1.0},
    ):
        with pytest.raises(ConfigError):
            Schedule(**{"steps": 1, "learning_rate": 1e-3, **settings})


def test_norms_and_biases_step_at_their_own_rate(vit: nn.Module) -> None:
    """The first step of Adam has the size of the rate wherever there is a gradient."""
    model = copy.deepcopy(vit)
    schedule = Schedule(steps=1, learning_rate=1e-3, weight_decay=0.0, norm_rate=5.0)
    tune(model, batches(), cross_entropy, schedule)
    before = dict(vit.named_parameters())
    for name, parameter in model.named_parameters():
        moved = float((parameter - before[name]).detach().abs().max())
        assert moved == pytest.approx(5e-3 if parameter.dim() == 1 else 1e-3, rel=0.05), name


def test_the_rate_rises_then_falls_to_zero() -> None:
    schedule = Schedule(steps=100, learning_rate=1.0, warmup=0.1)
    rates = [schedule.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert rates.index(max(rates)) == 9
    assert rates[-1] == pytest.approx(1 / 90)
