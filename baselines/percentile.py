"""Percentile calibration: the largest values are clipped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from baselines.calibration import Calibrator
from baselines.method import METHODS
from quanttune.quantization.ranges import DEFAULT_PERCENTILE


@METHODS.register("percentile")
@dataclass(frozen=True)
class Percentile(Calibrator):
    """The range ends at a percentile; see :func:`quanttune.quantization.ranges.percentile`.

    Args:
        p: Percentile of the magnitudes, 50 to 100.
    """

    name: ClassVar[str] = "percentile"
    rule: ClassVar[str] = "percentile"
    p: float = DEFAULT_PERCENTILE
