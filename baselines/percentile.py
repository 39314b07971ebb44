"""Percentile calibration: the largest values are clipped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from baselines.calibration import Calibrator
from baselines.method import METHODS
from quanttune.errors import ConfigError
from quanttune.quantization.ranges import DEFAULT_PERCENTILE


@METHODS.register("percentile")
@dataclass(frozen=True)
class Percentile(Calibrator):
    """The range ends at a percentile; see :func:`quanttune.quantization.ranges.percentile`.

    Args:
        p: Percentile of the magnitudes, 50 to 100.

    Raises:
        ConfigError: If ``p`` is out of range.
    """

    name: ClassVar[str] = "percentile"
    rule: ClassVar[str] = "percentile"
    p: float = DEFAULT_PERCENTILE

    def __post_init__(self) -> None:
        if not 50 < self.p <= 100:
            raise ConfigError(f"percentile {self.p} is not above 50 and at most 100; 99.9 to 99.999 is usual")
