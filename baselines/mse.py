"""MSE calibration: the range with the smallest squared error on the calibration data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from baselines.calibration import Calibrator
from baselines.method import METHODS


@METHODS.register("mse")
@dataclass(frozen=True)
class MeanSquaredError(Calibrator):
    """The range minimises the squared error; see :func:`quanttune.quantization.ranges.mse`."""

    name: ClassVar[str] = "mse"
    rule: ClassVar[str] = "mse"
