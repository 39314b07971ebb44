"""Min-max calibration: no value seen in calibration is clipped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from baselines.calibration import Calibrator
from baselines.method import METHODS


@METHODS.register("minmax")
@dataclass(frozen=True)
class MinMax(Calibrator):
    """The range covers every calibration value; see :func:`quanttune.quantization.ranges.minmax`."""

    name: ClassVar[str] = "minmax"
    rule: ClassVar[str] = "minmax"
