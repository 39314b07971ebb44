"""The fine-tuning loop: deterministic, resumable after an interruption, and it refuses broken models."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from quanttune import OutlierLoss, OutlierLossConfig, Schedule, tune
from quanttune.digests import tensor_digest
from quanttune.errors import ConfigError, QuantTuneError, StoreError, TuningDivergedError
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


def test_the_course_is_told_step_by_step_and_changes_nothing(vit: nn.Module, tmp_path: Path) -> None:
    course: list[dict[str, float]] = []
    assert tuned(vit, course=course) == tuned(vit)
    assert [row["step"] for row in course] == list(range(1, SCHEDULE.steps + 1))
    assert all(set(row) == {"step", "loss", "outlier_loss", "largest_ratio"} for row in course)
    # the first step only measures
    assert course[0]["outlier_loss"] == 0 < course[1]["outlier_loss"]
    assert all(row["largest_ratio"] > 1 for row in course)
    plain: list[dict[str, float]] = []
    tuned(vit, outliers=False, course=plain)
    assert all(set(row) == {"step", "loss"} for row in plain)
    assert plain[0]["loss"] == course[0]["loss"]

    def stop(done: int, total: int, loss: float) -> None:
        if done == 5:
            raise KeyboardInterrupt

    again: list[dict[str, float]] = []
    kept = {"checkpoint": tmp_path / "state", "checkpoint_every": 2}
    with pytest.raises(KeyboardInterrupt):
        tuned(vit, progress=stop, course=[], **kept)
    tuned(vit, course=again, **kept)
    assert again == course


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


@pytest.fixture(scope="module")
def interrupted(vit: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a run that was stopped after its second step."""
    return stopped(vit, tmp_path_factory.mktemp("interrupted") / "run.safetensors")


def stopped(model: nn.Module, checkpoint: Path, **more: object) -> Path:
    def stop(done: int, total: int, loss: float) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tuned(model, checkpoint=checkpoint, checkpoint_every=2, progress=stop, **more)
    return checkpoint


def first_step(model: nn.Module, checkpoint: Path, **more: object) -> int:
    """The first step that a run does with a checkpoint there; 3 if it goes on from it."""
    steps: list[int] = []

    def stop(done: int, total: int, loss: float) -> None:
        steps.append(done)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tuned(model, checkpoint=checkpoint, progress=stop, **more)
    return steps[0]


def test_any_flipped_bit_of_a_checkpoint_is_noticed(
    vit: nn.Module, interrupted: Path, tmp_path: Path
) -> None:
    whole = interrupted.read_bytes()
    checkpoint = tmp_path / interrupted.name
    checkpoint.write_bytes(whole)
    assert first_step(vit, checkpoint) == 3
    header = 8 + int.from_bytes(whole[:8], "little")
    for at in (3, header // 2, header - 40, *range(header, len(whole), (len(whole) - header) // 8)):
        checkpoint.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert first_step(vit, checkpoint) == 1, at


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b'"{\\"progress\\": {\\"step\\": 2', b'"{\\"progress\\": {\\"step\\": 7'),
        (b"model|head.bias", b"model|head.bios"),
        (b'"digest"', b'"dibest"'),
    ],
)
def test_an_edited_checkpoint_is_ignored(
    vit: nn.Module, interrupted: Path, tmp_path: Path, before: bytes, after: bytes
) -> None:
    whole = interrupted.read_bytes()
    assert whole.count(before) == 1
    checkpoint = tmp_path / interrupted.name
    checkpoint.write_bytes(whole.replace(before, after))
    assert first_step(vit, checkpoint) == 1


def test_a_checkpoint_copied_over_another_runs_is_ignored(
    vit: nn.Module, interrupted: Path, tmp_path: Path
) -> None:
    """Another name says other data; other first weights another reference."""
    other = copy.deepcopy(vit)
    with torch.no_grad():
        next(other.parameters()).add_(1.0)
    for model, name, step in (
        (vit, "run.safetensors", 3),
        (vit, "another.safetensors", 1),
        (other, "run.safetensors", 1),
    ):
        (tmp_path / name).write_bytes(interrupted.read_bytes())
        assert first_step(model, tmp_path / name) == step


def test_what_a_batch_normalisation_has_seen_comes_back(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 900, 3))
    checkpoint = stopped(model, tmp_path / "run.safetensors", outliers=False)
    assert tuned(model, outliers=False, checkpoint=checkpoint) == tuned(model, outliers=False)


def test_a_full_disk_is_said_and_the_last_checkpoint_stays(
    vit: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found: a raw SafetensorError."""
    checkpoint = tmp_path / "run.safetensors"
    writes: list[int] = []

    def filling(tensors: object, path: Path, metadata: object) -> None:
        writes.append(1)
        if len(writes) == 2:
            raise SafetensorError('I/O error: Os { code: 28, message: "No space left on device" }')
        save_file(tensors, path, metadata)

    monkeypatch.setattr("quanttune.checkpoint.save_file", filling)
    with pytest.raises(StoreError, match=r"no space left on the disk for .*run\.safetensors; free some"):
        tuned(vit, checkpoint=checkpoint, checkpoint_every=2)
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.name]
    assert first_step(vit, checkpoint) == 3


def test_a_run_that_breaks_the_model_is_refused(vit: nn.Module) -> None:
    wild = Schedule(steps=30, learning_rate=10.0, batch_size=4, clip=1e9)
    with pytest.raises(TuningDivergedError, match="lower the learning rate"):
        tuned(vit, wild, outliers=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_reference_that_is_not_finite_is_said_to_be_that(vit: nn.Module, value: float) -> None:
    broken = copy.deepcopy(vit)
    broken.head.bias.data[1] = value
    with pytest.raises(
        QuantTuneError, match=r"reference is not finite: 1 of 3 values of parameter head\.bias"
    ):
        tuned(broken, outliers=False)
    large = copy.deepcopy(vit)
    large.head.weight.data.fill_(3e38)
    with pytest.raises(
        TuningDivergedError, match="reference is not finite: its loss is nan on the first batch"
    ):
        tuned(large, outliers=False)


def test_a_loss_on_activations_that_is_no_number_is_said_to_be_that(
    vit: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At its own step, and not as a task loss a step later."""
    plain = OutlierLoss.penalty
    monkeypatch.setattr(OutlierLoss, "penalty", lambda self: plain(self) * float("nan"))
    with pytest.raises(TuningDivergedError, match="loss on activations is nan at step 1; lower its weight"):
        tuned(vit)


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


def test_one_easy_first_batch_does_not_make_a_run_useless() -> None:
    """Of small batches the first may have hardly any loss; where a run began is the mean of the first ten."""
    layer = nn.Linear(1, 2, bias=False)
    nn.init.zeros_(layer.weight)
    with torch.no_grad():
        layer.weight[0] = 2.0
    right = (torch.full((4, 1), 2.0), torch.zeros(4, dtype=torch.long))
    half = (torch.full((4, 1), 2.0), torch.tensor([0, 1, 0, 1]))
    data = itertools.chain([right], itertools.repeat(half))
    report = tune(layer, data, cross_entropy, Schedule(steps=100, learning_rate=1e-6, batch_size=4))
    low, high = np.log1p(np.exp(-4.0)), (np.log1p(np.exp(-4.0)) + 4 + np.log1p(np.exp(-4.0))) / 2
    assert report["first_loss"] == pytest.approx((low + 9 * high) / 10, rel=1e-3)
    assert report["last_loss"] == pytest.approx(high, rel=1e-2)
