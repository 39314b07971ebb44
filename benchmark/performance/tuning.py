"""A fine-tuning step with the outlier-driven loss, or with quantizers, over a plain one: time and memory."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from benchmark.performance.measurement import Line, NotMeasurableError, Setup, row

STEPS = 8
_WARM = 2  # steps that do not count
_RATE = 1e-7
METHODS_OF_STEPS = {"QuantTune": "quanttune", "quantization-aware": "qat", "learned steps (LSQ)": "lsq"}


@row("training_step", "A step of QuantTune, of quantization-aware training and of LSQ, over a plain one")
def training_step(setup: Setup) -> Sequence[Line]:
    """Short trainings in turns, by the methods themselves; each counts with its median step."""
    from baselines.method import METHODS

    if not setup.session.entry.recipe:
        raise NotMeasurableError(f"{setup.model} has no recipe to fine-tune by")

    def step(name: str) -> float:
        ends: list[float] = []

        def progress(stage: str, done: int, total: int) -> None:
            if "fine-tuning" in stage:
                ends.append(time.perf_counter())

        context = setup.context("W8A8", "full", items=32, progress=progress)
        made: Any = METHODS.get(name)
        # So few steps at the recipe's rate would be refused for what they do to the loss.
        made(steps=STEPS, learning_rate=_RATE).quantize(context)
        taken = sorted(later - earlier for earlier, later in itertools.pairwise(ends))[: STEPS - _WARM]
        if not taken:
            raise NotMeasurableError(f"{name} tells nothing of its steps")
        return taken[len(taken) // 2]

    names = {"plain": "finetune", **METHODS_OF_STEPS}
    rounds = [[step(name) for name in names.values()] for _ in range(min(setup.repeats, 3))]
    lines = [Line("plain step", tuple(times[0] for times in rounds))]
    for number, title in enumerate(METHODS_OF_STEPS, 1):
        taken = tuple(times[number] for times in rounds)
        ratios = tuple(times[number] / times[0] for times in rounds)
        lines.append(Line(title, taken, ratios, goal=1.15 if title == "QuantTune" else None))
    without, pulled = (_kept_for_backward(setup, with_loss) for with_loss in (False, True))
    note = f"{pulled / 2**20:.0f} MiB of activations, {without / 2**20:.0f} without the loss"
    return [*lines, Line("QuantTune: memory for the backward pass", (), (pulled / without,), note)]


def _kept_for_backward(setup: Setup, with_loss: bool) -> float:
    """Bytes of distinct tensors that one training step keeps for its backward pass."""
    import torch

    from quanttune import OutlierLoss
    from quanttune.inputs import call_model, logits_of, to_device

    session = setup.session
    data = session.task.training_data(session.entry)
    batch = next(iter(data.batches(32, torch.Generator().manual_seed(0))))
    inputs, targets = to_device(batch.inputs, setup.device), batch.targets.to(setup.device)
    model = copy.deepcopy(session.model).train()
    kept: dict[int, int] = {}
    alive: list[Any] = []  # an address is told apart from another only while its tensor lives

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        alive.append(tensor)
        return tensor

    outliers = OutlierLoss(model, session.sites, STEPS) if with_loss else None
    with outliers or nullcontext():
        logits_of(call_model(model, inputs))  # the first pass of the loss only measures
        if outliers is not None:
            outliers.step()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = data.loss(logits_of(call_model(model, inputs)), targets)
            if outliers is not None:
                _ = loss + outliers.penalty().to(loss.device)
    return float(sum(kept.values()))
