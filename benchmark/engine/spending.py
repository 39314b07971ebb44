"""Where a run's time goes, and what a method costs whoever made its stages."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from benchmark.keep.meter import Meter, Work, trains

if TYPE_CHECKING:
    from baselines.method import Method
    from quanttune.quantization import Quantized

PARTS = ("references", "training", "calibration", "evaluation")
"""What a run spends its time on: making and checking FP32 models, fine-tuning, everything else of a method,
and measuring quantized models with the copies that tell their noise. What is left is ``other``."""

WIDTHS = 3
"""The precisions of a comparison, usually 8, 7 and 6 bits: trainings are counted for so many."""


class Spending:
    """What a cell spends of this run's time, in seconds on the clock."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def on(self, part: str) -> Iterator[None]:
        """Count what is done within under one of :data:`PARTS`."""
        started = time.monotonic()
        try:
            yield
        finally:
            self._add(part, time.monotonic() - started)

    @contextmanager
    def on_method(self, method: Method, meter: Meter) -> Iterator[Work]:
        """Count a method's work within as training and calibration; it is there once it has ended."""
        work = Work()
        try:
            with meter.work() as work:
                yield work
        finally:
            training = work.elapsed if _is_all_training(method, work) else work.training_elapsed
            self._add("training", training)
            self._add("calibration", work.elapsed - training)

    def _add(self, part: str, seconds: float) -> None:
        self.seconds[part] = self.seconds.get(part, 0.0) + seconds


def cost_of(method: Method, quantized: Quantized, work: Work) -> dict[str, float | None]:
    """What a method takes for one cell, as if it had shared nothing with others.

    Args:
        method: Says how often it trains.
        quantized: What it gave.
        work: Its work.

    Returns:
        ``training_s``: seconds on the clock of making trained weights, 0 for methods that do not train.
        ``calibration_s``: of everything else. ``peak_mb``: the most memory meanwhile beyond what the process
        held before, in units of 10**6 bytes. ``extra_operations``: tensors that cost one more operation an
        element at run time. ``trainings``: see :func:`trainings`. ``None`` where something is not known.
    """
    cost = work.cost()
    training = cost.seconds if _is_all_training(method, work) else work.training_seconds
    calibration = None if cost.seconds is None or training is None else cost.seconds - training
    return {
        "training_s": None if training is None else round(training, 3),
        "calibration_s": None if calibration is None else round(calibration, 3),
        "peak_mb": None if cost.peak_bytes is None else round(cost.peak_bytes / 1e6, 1),
        "extra_operations": len(quantized.extra_operations),
        "trainings": trainings(method),
    }


def _is_all_training(method: Method, work: Work) -> bool:
    """Whether a method trains without saying which of its stages are trained weights."""
    return method.trains and not any(trains(stage) for stage, _ in work.stages)


def trainings(method: Method) -> int:
    """How often a method trains, or optimises anew, for :data:`WIDTHS` precisions: 0, 1 or each time."""
    return WIDTHS if method.per_width else int(method.trains)
