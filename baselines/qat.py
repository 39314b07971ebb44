"""Quantization-aware training under fixed ranges, with the straight-through estimator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from baselines.method import METHODS
from baselines.quantization_aware import QuantizationAware


@METHODS.register("qat")
@dataclass(frozen=True)
class Qat(QuantizationAware):
    """Fine-tuning of the simulated network under the ranges that calibration chose for the reference.

    Rounding passes gradients straight through (Bengio et al. 2013, arXiv 1308.3432; Jacob et al. 2018, arXiv
    1712.05877, section 3); values beyond a range get none. What ``lsq`` gains over this row is due to learned
    steps and not to training under quantization. Ours: weights keep the ranges of the reference as well, in
    place of the minimum and maximum of each step.
    """

    name: ClassVar[str] = "qat"
    source: ClassVar[str] = "arXiv 1712.05877, CVPR 2018"
