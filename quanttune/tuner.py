"""Fine-tuning with or without a penalty on activations: one short loop for any torch model.

The control of every comparison is this same loop with no penalty, so all see the same batches, the same
dropout and the same schedule.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quanttune.activation_penalty import ActivationPenalty
from quanttune.checkpoint import Checkpoint
from quanttune.digests import json_digest
from quanttune.errors import ConfigError, TuningDivergedError
from quanttune.fields import fitting
from quanttune.finite import refuse_not_finite
from quanttune.inputs import ModelInputs, call_model, logits_of, to_device
from quanttune.replicas import Replicas
from quanttune.seeds import derive_seed

if TYPE_CHECKING:
    from accelerate import Accelerator

TrainingBatch = tuple[ModelInputs, Tensor]
"""Model inputs and targets of one batch."""


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to fine-tune.

    Args:
        steps: Optimizer steps.
        learning_rate: Peak learning rate of AdamW.
        batch_size: Items a step.
        warmup: Fraction of the steps over which the rate rises linearly; it then falls linearly to zero.
        weight_decay: Decoupled decay of matrices; biases and normalisation parameters have none.
        clip: Largest norm of the whole gradient.
        norm_rate: Factor on the learning rate of normalisation parameters and biases.
        accumulation: Batches whose gradients make one step.
    """

    steps: int
    learning_rate: float
    batch_size: int = 32
    warmup: float = 0.1
    weight_decay: float = 0.01
    clip: float = 1.0
    norm_rate: float = 1.0
    accumulation: int = 1

    def __post_init__(self) -> None:
        for name in ("steps", "learning_rate", "batch_size", "accumulation", "clip"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"schedule: {name} is {getattr(self, name)}; it must be positive")
        if self.norm_rate < 0:
            raise ConfigError(
                f"schedule: norm_rate is {self.norm_rate}; use 0 to freeze normalisation and biases"
            )

    def rate(self, step: int) -> float:
        """Fraction of the peak learning rate at ``step``, counted from 0."""
        warm = max(1, round(self.warmup * self.steps))
        return min((step + 1) / warm, (self.steps - step) / max(1, self.steps - warm))


EXPLODED = 10.0
"""Nats of smoothed task loss above the first value at which a run is given up."""
WORSENED = 0.5
"""Nats by which the smoothed task loss may end above its first value; a run that ends worse is refused."""
_SMOOTHING = 0.95
_OPENING = 10
"""Steps, at most a tenth of all, whose mean loss counts as the first: one small batch may be anywhere."""


def tune(
    model: nn.Module,
    batches: Iterator[TrainingBatch],
    loss: Callable[[Tensor, Tensor], Tensor],
    schedule: Schedule,
    *,
    outliers: ActivationPenalty | None = None,
    around: AbstractContextManager[Any] | None = None,
    rates: Mapping[str, float] | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    autocast: torch.dtype | None = None,
    checkpoint: Path | None = None,
    checkpoint_every: int = 100,
    progress: Callable[[int, int, float], None] | None = None,
    course: list[dict[str, float]] | None = None,
    accelerator: Accelerator | None = None,
) -> dict[str, float]:
    """Fine-tune ``model`` in place.

    With an ``accelerator`` several processes share the work: all call this with the same arguments, each on
    its own device. The steps are those of a single process on the same batches, up to rounding and dropout.

    Args:
        model: Any torch model; left in evaluation mode.
        batches: Endless batches in a fixed order, so that an interrupted run can find its place again.
        loss: Task loss of logits and targets, a scalar.
        schedule: Steps and rates.
        outliers: The outlier-driven loss or another penalty; ``None`` is plain fine-tuning.
        around: What the whole training runs in, such as a simulated quantization.
        rates: Peak learning rates of parameters that have one of their own, by the start of their names; they
            have no weight decay.
        seed: Seed of dropout; global random state is restored afterwards.
        device: Where to compute.
        autocast: Mixed-precision type, e.g. ``torch.bfloat16``; ``None`` for full precision.
        checkpoint: File (without suffix) that holds the state while the run lasts; an existing one is
            resumed, and it is removed at the end.
        checkpoint_every: Steps between checkpoints.
        progress: Called with steps done, steps in all and the smoothed task loss.
        course: Is given a row a step, also those of before an interruption: ``step``, ``loss`` of the task,
            and with a penalty ``outlier_loss`` and, if it measures them, ``largest_ratio``.
        accelerator: ``accelerate.Accelerator`` of this process; its device takes the place of ``device``. The
            main process alone writes checkpoints, all read them.

    Returns:
        Smoothed task loss at the start and at the end.

    Raises:
        QuantTuneError: If a weight of the model is NaN or infinite; the message names it.
        TuningDivergedError: If the loss is not finite or the smoothed loss ran away; weights are then not to
            be used.
    """
    replicas = None if accelerator is None else Replicas(accelerator)
    device = torch.device(device) if replicas is None else replicas.device
    model.to(device).train()
    if replicas is not None:
        # before the checkpoint is looked for, which belongs to the weights that a run begins with
        replicas.copy_from_main(model)
    optimizer = _optimizer(model, schedule, rates or {})
    state = _Progress()
    purpose = [asdict(schedule), seed, None if outliers is None else asdict(outliers.config)]
    purpose += [dict(rates)] if rates else []
    keeper = Checkpoint(checkpoint, model, optimizer, json_digest(purpose))
    is_main = replicas is None or replicas.is_main

    def go_on(saved: dict[str, Any]) -> None:
        nonlocal state
        progress = _Progress(**fitting(_Progress, saved["progress"]))
        if not 0 < progress.step < schedule.steps:
            raise ValueError(f"step {progress.step} of {schedule.steps}")
        told = _rows(saved.get("course", []), progress.step)
        if outliers is not None:
            outliers.load_state_dict(saved["outliers"])
        state = progress
        if course is not None:
            course[:] = told

    keeper.load(go_on)
    if replicas is not None:
        _join(replicas, outliers, state.step)
    if not state.step:
        refuse_not_finite(model)
    remaining = itertools.islice(batches, state.step * schedule.accumulation, None)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), around or nullcontext(), outliers or nullcontext():
        while state.step < schedule.steps:
            rank = () if replicas is None or replicas.count == 1 else (replicas.rank,)
            torch.manual_seed(derive_seed(seed, "dropout", state.step, *rank))
            _set_rate(optimizer, schedule, state.step)
            task = penalty = 0.0
            for _ in range(schedule.accumulation):
                inputs, targets = next(remaining)
                share = 1.0
                if replicas is not None:
                    inputs, targets, share = replicas.part(inputs, targets)
                with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                    logits = logits_of(call_model(model, to_device(inputs, device)))
                task_loss = share * loss(logits.float(), targets.to(device))
                total = task_loss
                if outliers is not None:
                    added = outliers.penalty().to(device)
                    total = task_loss + added
                    penalty += float(added.detach()) / schedule.accumulation
                (total / schedule.accumulation).backward()
                task += float(task_loss.detach()) / schedule.accumulation
            whole = penalty
            if replicas is not None:
                replicas.add_gradients(model)
                # All or none: a process that stops alone would leave the others waiting.
                task, whole = replicas.sum(torch.tensor([task, penalty], dtype=torch.float64)).tolist()
            nn.utils.clip_grad_norm_(model.parameters(), schedule.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if outliers is not None:
                outliers.step()
            state.advance(task, whole, min(_OPENING, max(1, schedule.steps // 10)))
            if course is not None:
                row = {"step": float(state.step), "loss": task}
                if outliers is not None:
                    row |= {"outlier_loss": penalty} | _largest(outliers)
                course.append(row)
            if progress is not None and is_main:
                progress(state.step, schedule.steps, state.smoothed)
            if is_main and state.step % checkpoint_every == 0 and state.step < schedule.steps:
                keeper.save(
                    {
                        "progress": asdict(state),
                        "outliers": None if outliers is None else outliers.state_dict(),
                        "course": course or [],
                    }
                )
    model.eval()
    if is_main:
        keeper.remove()
    state.require_useful()
    return {"first_loss": state.first, "last_loss": state.smoothed}


def _largest(outliers: ActivationPenalty) -> dict[str, float]:
    ratios = outliers.ratios
    return {"largest_ratio": max(ratios.values())} if ratios else {}


def _rows(saved: Any, steps: int) -> list[dict[str, float]]:
    """The course that a checkpoint tells of; none if it is not one of its steps."""
    rows = [{str(name): float(value) for name, value in row.items()} for row in saved]
    return rows if [row.get("step") for row in rows] == list(range(1, steps + 1)) else []


def _join(replicas: Replicas, outliers: ActivationPenalty | None, step: int) -> None:
    """Begin together, at the same step.

    Raises:
        ConfigError: If the processes do not see the same checkpoint.
    """
    steps = replicas.gather(torch.tensor(step)).tolist()
    if len(set(steps)) > 1:
        raise ConfigError(
            f"the processes would go on from steps {steps}; they must see the same checkpoint file"
        )
    if outliers is not None:
        outliers.share_over(replicas)


@dataclass
class _Progress:
    step: int = 0
    first: float = math.nan
    smoothed: float = math.nan

    def advance(self, task: float, penalty: float, opening: int) -> None:
        """Count a step.

        Args:
            task: Its task loss.
            penalty: Its loss on activations.
            opening: Steps whose mean loss is where the run began.
        """
        self.step += 1
        if not math.isfinite(task) and self.step == 1:
            raise TuningDivergedError(
                f"the reference is not finite: its loss is {task} on the first batch, before any step; check "
                "the model's weights and inputs"
            )
        if not math.isfinite(task):
            raise TuningDivergedError(f"the loss is {task} at step {self.step}; lower the learning rate")
        if not math.isfinite(penalty):
            raise TuningDivergedError(
                f"the loss on activations is {penalty} at step {self.step}; lower its weight or the learning "
                "rate"
            )
        if self.step <= opening:
            before = 0.0 if self.step == 1 else self.first
            self.first = self.smoothed = before + (task - before) / self.step
        self.smoothed = _SMOOTHING * self.smoothed + (1 - _SMOOTHING) * task
        if self.smoothed > self.first + EXPLODED:
            raise TuningDivergedError(self._told("rose"))

    def require_useful(self) -> None:
        """Refuse weights whose training loss ended clearly above where it began."""
        if self.smoothed > self.first + WORSENED:
            raise TuningDivergedError(self._told("ended"))

    def _told(self, verb: str) -> str:
        return (
            f"the smoothed task loss {verb} from {self.first:.3f} to {self.smoothed:.3f} by step "
            f"{self.step}; lower the learning rate or the outlier-loss weight"
        )


def _optimizer(model: nn.Module, schedule: Schedule, rates: Mapping[str, float]) -> torch.optim.AdamW:
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    own: dict[str, list[nn.Parameter]] = {start: [] for start in rates}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            start = next((start for start in rates if name.startswith(start)), None)
            group = own[start] if start is not None else matrices if parameter.dim() > 1 else vectors
            group.append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": schedule.weight_decay, "factor": 1.0},
        {"params": vectors, "weight_decay": 0.0, "factor": schedule.norm_rate},
    ]
    for start, parameters in own.items():
        factor = rates[start] / schedule.learning_rate
        groups.append({"params": parameters, "weight_decay": 0.0, "factor": factor})
    # One fused kernel: on a CPU the default loop costs a quarter of a step of a model with large embeddings.
    return torch.optim.AdamW(groups, lr=schedule.learning_rate, fused=True)


def _set_rate(optimizer: torch.optim.Optimizer, schedule: Schedule, step: int) -> None:
    for group in optimizer.param_groups:
        group["lr"] = schedule.learning_rate * schedule.rate(step) * group["factor"]
