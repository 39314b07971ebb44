"""OMSE calibration as the FQ-ViT tables use the name: both ends shrunk together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from baselines.calibration import Calibrator
from baselines.method import METHODS


@METHODS.register("omse")
@dataclass(frozen=True)
class ShrunkMeanSquaredError(Calibrator):
    """Both ends shrunk by one factor; see :func:`quanttune.quantization.ranges.omse`."""

    name: ClassVar[str] = "omse"
    rule: ClassVar[str] = "omse"
    source: ClassVar[str] = "arXiv 1902.06822; grid of FQ-ViT's code"
