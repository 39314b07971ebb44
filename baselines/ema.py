"""Running min-max calibration: a row of the FQ-ViT tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from baselines.calibration import Calibrator
from baselines.method import METHODS


@METHODS.register("ema")
@dataclass(frozen=True)
class RunningMinMax(Calibrator):
    """The range follows running bounds; see :func:`quanttune.quantization.ranges.ema`."""

    name: ClassVar[str] = "ema"
    rule: ClassVar[str] = "ema"
    source: ClassVar[str] = "FQ-ViT's code"
