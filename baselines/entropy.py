"""Entropy calibration: the range that loses the least information, as TensorRT chooses it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from baselines.calibration import Calibrator
from baselines.method import METHODS


@METHODS.register("entropy")
@dataclass(frozen=True)
class Entropy(Calibrator):
    """The range of the smallest KL divergence; see :func:`quanttune.quantization.ranges.entropy`."""

    name: ClassVar[str] = "entropy"
    source: ClassVar[str] = "TensorRT, Migacz, GTC 2017"
    rule: ClassVar[str] = "entropy"
