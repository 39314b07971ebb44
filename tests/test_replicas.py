"""Several processes take the steps of one: same weights, same thresholds, checkpoints by the main process."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu

from quanttune import OutlierLoss, OutlierLossConfig, Schedule, tune
from quanttune.errors import ConfigError, QuantTuneError
from quanttune.quantization import (
    RANGE_RULES,
    Scheme,
    build_quantizers,
    collect_statistics,
    discover_sites,
)
from quanttune.quantization.quantized_training import STEPS, QuantizedTraining
from quanttune.replicas import Replicas, _told, merged_moments, run_replicated
from quanttune.seeds import numpy_generator, torch_generator
from tests.sockets import LOOPBACK, listening

SCHEDULE = Schedule(steps=6, learning_rate=1e-2, batch_size=5, accumulation=2)
LOSS = OutlierLossConfig(weight=1.0, threshold=1.5, parameter_threshold=2.0)


class Network(nn.Module):
    """A residual sum with outliers in it; no dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm, self.head = (
            nn.Linear(8, 16),
            nn.Linear(16, 8),
            nn.LayerNorm(8),
            nn.Linear(8, 3),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = tokens + self.down(gelu(self.up(tokens)))
        return self.head(self.norm(hidden).mean(dim=1))


def network(seed: int = 0) -> Network:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Network()


def batches(size: int = 5) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch_generator(0, "batches")
    for _ in itertools.count():
        tokens = torch.randn(size, 4, 8, generator=generator)
        tokens[0, 0, 3] *= 9  # an outlier in the first item, so that the processes count differently many
        yield tokens, torch.randint(3, (size,), generator=generator)


class Alone:
    """Stands for an accelerator: the given one of several processes, for what needs no communication."""

    device = torch.device("cpu")

    def __init__(self, rank: int, count: int) -> None:
        self.process_index, self.num_processes = rank, count


def tuned(
    accelerator: Any = None,
    report: Callable[[int], None] = lambda done: None,
    tensors: dict[str, Tensor] | None = None,
    checkpoint: str | None = None,
    stop: int | None = None,
    size: int = 5,
    penalty: str = "outlier",
) -> dict[str, Tensor]:
    """Weights, the loss's state and, with processes, how far theirs are apart."""
    rank = 0 if accelerator is None else accelerator.process_index
    model = network(seed=rank)  # the main process's weights are those that count
    config = OutlierLossConfig(**{**vars(LOSS), "penalty": penalty})
    outliers = OutlierLoss(model, next(batches(size))[0], SCHEDULE.steps, config)

    def progress(done: int, total: int, loss: float) -> None:
        report(done)
        if done == stop:
            raise QuantTuneError("stopped")

    losses = tune(
        model,
        batches(size),
        cross_entropy,
        SCHEDULE,
        outliers=outliers,
        checkpoint=None if checkpoint is None else Path(checkpoint),
        checkpoint_every=2,
        progress=progress,
        accelerator=accelerator,
    )
    state = outliers.state_dict()
    moments = [list(state[kind][name].values()) for kind in ("sites", "parameters") for name in state[kind]]
    found = {f"weight {name}": tensor.clone() for name, tensor in model.state_dict().items()}
    found |= {"moments": torch.tensor(moments, dtype=torch.float64)}
    found["losses"] = torch.tensor(list(losses.values()), dtype=torch.float64)
    if accelerator is not None:
        replicas = Replicas(accelerator)
        flat = torch.cat([tensor.double().flatten() for tensor in found.values()])
        found["apart"] = (replicas.gather(flat) - flat).abs().amax()
    return found


def assert_like_one_process(found: dict[str, Tensor]) -> None:
    apart = found.pop("apart")
    assert float(apart) == 0  # to the bit: thresholds and ratios included
    for name, expected in tuned().items():
        torch.testing.assert_close(
            found[name], expected, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_two_processes_take_the_steps_of_one() -> None:
    steps: list[int] = []
    assert_like_one_process(run_replicated(tuned, {}, 2, "cpu", steps.append))
    before = network().state_dict()
    plain = {name.removeprefix("weight "): tensor for name, tensor in tuned().items() if "weight " in name}
    assert all(not torch.equal(before[name], tensor) for name, tensor in plain.items())


def with_learned_steps(
    accelerator: Any = None, report: Any = None, tensors: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Weights and logarithms of steps after a training under quantization."""
    model, inputs = network(), next(batches())[0]
    table, scheme = discover_sites(model, inputs), Scheme.parse("W4A4", "full")
    chosen = scheme.sites(table)
    statistics = collect_statistics(model, [inputs], chosen)
    quantizers = build_quantizers(model, chosen, statistics, scheme, RANGE_RULES.get("minmax"))
    training = QuantizedTraining(model, table, quantizers)
    rates = {STEPS: 1e-2}
    tune(training, batches(), cross_entropy, SCHEDULE, around=training, rates=rates, accelerator=accelerator)
    return dict(training.state_dict())


@pytest.mark.slow
def test_learned_steps_are_shared_as_weights_are() -> None:
    alone = with_learned_steps()
    assert any(float(alone[name].abs().max()) > 0.01 for name in alone if name.endswith("log_ratio"))
    for name, tensor in run_replicated(with_learned_steps, {}, 2, "cpu").items():
        torch.testing.assert_close(
            tensor, alone[name], rtol=1e-3, atol=2e-4, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.slow
def test_an_interrupted_run_goes_on_with_another_number_of_processes(tmp_path: Path) -> None:
    checkpoint = tmp_path / "run.safetensors"
    with pytest.raises(QuantTuneError, match="stopped"):
        run_replicated(tuned, {"checkpoint": str(checkpoint), "stop": 5}, 2, "cpu")
    assert checkpoint.is_file()
    steps: list[int] = []
    alone = tuned(report=steps.append, checkpoint=str(checkpoint))
    assert steps == [5, 6]  # four steps were kept
    alone["apart"] = torch.zeros(())
    assert_like_one_process(alone)
    assert not checkpoint.exists()
    with pytest.raises(QuantTuneError, match="stopped"):
        tuned(checkpoint=str(checkpoint), stop=5)
    assert_like_one_process(run_replicated(tuned, {"checkpoint": str(checkpoint)}, 2, "cpu"))
    assert not checkpoint.exists()


def test_errors_come_back_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a batch of 1 items cannot be shared by 2 processes"):
        run_replicated(tuned, {"size": 1}, 2, "cpu")
    unknown = _told(tmp_path, "process 1 ended with code -9")
    assert type(unknown) is QuantTuneError
    assert str(unknown).startswith("a process of the fine-tuning failed: process 1 ended with code -9")


def talk(accelerator: Any, report: Callable[[int], None], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    replicas = Replicas(accelerator)
    for step in range(1, 40):
        report(step)
        replicas.sum(tensors["a"])
        time.sleep(0.1)
    return {"sum": replicas.sum(tensors["a"]), "tied": tensors["b"]}


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_nobody_else_on_the_network_can_join() -> None:
    """Found: the main process listened on every interface, for whoever came first."""
    found: list[str] = []
    steps: list[int] = []

    def look(step: int) -> None:
        steps.append(step)
        found.extend(listening())

    shared = torch.arange(3.0)
    made = run_replicated(talk, {}, 2, "cpu", look, {"a": shared, "b": shared})
    assert torch.equal(made["sum"], 2 * shared)
    assert torch.equal(made["tied"], shared)
    assert max(steps) > 1
    assert found
    assert all(address.startswith(LOOPBACK) for address in found), found


def test_only_plain_values_travel() -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        run_replicated(talk, {"x": Path()}, 2, "cpu")


@pytest.mark.parametrize("penalty", ["range", "kurtosis"])
def test_penalties_that_do_not_add_up_are_refused(penalty: str) -> None:
    outliers = OutlierLoss(network(), next(batches())[0], 1, OutlierLossConfig(penalty=penalty))
    with pytest.raises(ConfigError, match=f"'{penalty}' does not add up"):
        outliers.share_over(Replicas(Alone(0, 2)))
    outliers.share_over(Replicas(Alone(0, 1)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without a GPU")
def test_more_processes_than_gpus_are_refused() -> None:
    with pytest.raises(ConfigError, match="2 processes need as many GPUs; there are 0"):
        run_replicated(tuned, {}, 2, "cuda")


@pytest.mark.parametrize("sizes", [[(40, 40)], [(40, 7), (3, 1000)]])
def test_merged_moments_are_those_of_all_values(sizes: list[tuple[int, int]]) -> None:
    generator = numpy_generator(0, "moments")
    samples = [[generator.normal(3 * i, 1 + i, size=n) for n in pair] for i, pair in enumerate(sizes)]
    rows = [
        [[part.mean(), part.std(ddof=1), part.min(), part.max()] for part in parts]
        for parts in zip(*samples, strict=True)
    ]
    merged = merged_moments(torch.tensor(np.array(rows)), torch.tensor(np.array(sizes).T)).numpy()
    for row, parts in zip(merged, samples, strict=True):
        whole = np.concatenate(parts)
        np.testing.assert_allclose(row, [whole.mean(), whole.std(ddof=1), whole.min(), whole.max()])


@pytest.mark.parametrize(("items", "count"), [(8, 2), (5, 2), (7, 3), (3, 3)])
@pytest.mark.parametrize("named", [False, True])
def test_parts_make_the_batch(items: int, count: int, named: bool) -> None:
    ids, targets = torch.arange(items), torch.arange(items) + 100
    inputs = {"ids": ids, "mask": ids} if named else ids
    parts = [Replicas(Alone(rank, count)).part(inputs, targets) for rank in range(count)]
    assert torch.equal(torch.cat([part["ids"] if named else part for part, _, _ in parts]), ids)
    assert torch.equal(torch.cat([part for _, part, _ in parts]), targets)
    assert [share for *_, share in parts] == [len(part) / items for _, part, _ in parts]
    assert sum(share for *_, share in parts) == pytest.approx(1)
