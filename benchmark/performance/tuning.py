"""A fine-tuning step with the outlier-driven loss over a plain one, in time and in memory."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from contextlib import nullcontext

from benchmark.performance.measurement import MEASUREMENTS, Row, Setup, interleaved

STEPS = 20


@MEASUREMENTS.register("tuning")
def tuning(setup: Setup) -> Sequence[Row]:
    """Steps of 32 items on the same batches; memory is what the backward pass finds saved for it."""
    import torch

    from quanttune import OutlierLoss, Schedule, tune
    from quanttune.inputs import call_model, logits_of, to_device

    session = setup.session
    data = session.task.training_data(session.entry)
    schedule = Schedule(steps=STEPS, learning_rate=1e-6)
    order = torch.Generator().manual_seed(0)
    batches = [
        (to_device(batch.inputs, setup.device), batch.targets.to(setup.device))
        for batch in itertools.islice(data.batches(32, order), STEPS)
    ]

    def steps(with_loss: bool) -> None:
        model = copy.deepcopy(session.model)
        outliers = OutlierLoss(model, session.sites, STEPS) if with_loss else None
        tune(model, itertools.cycle(batches), data.loss, schedule, outliers=outliers, device=setup.device)

    def saved_bytes(with_loss: bool) -> float:
        """Bytes of distinct tensors that one training step keeps for its backward pass."""
        model = copy.deepcopy(session.model).train()
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        inputs, targets = batches[0]
        outliers = OutlierLoss(model, session.sites, STEPS) if with_loss else None
        with outliers or nullcontext():
            logits_of(call_model(model, inputs))  # the first pass of the loss only measures
            if outliers is not None:
                outliers.step()
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                loss = data.loss(logits_of(call_model(model, inputs)), targets)
                if outliers is not None:
                    loss = loss + outliers.penalty().to(loss.device)
        return float(sum(kept.values()))

    plain, pulled = interleaved(setup.repeats, lambda: steps(False), lambda: steps(True))
    without, with_loss = saved_bytes(False), saved_bytes(True)
    return [
        Row("plain fine-tuning step", plain / STEPS),
        Row("step with the outlier loss", pulled / STEPS, pulled / plain, "over the plain step; goal 1.15"),
        Row("memory kept for backward", None, with_loss / without, f"{with_loss / 2**20:.0f} MiB"),
    ]
