"""The control: the same fine-tuning as QuantTune without its loss, then the same calibration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from baselines.method import METHODS
from baselines.training import FineTuning


@METHODS.register("finetune")
@dataclass(frozen=True)
class PlainFineTuning(FineTuning):
    """Plain fine-tuning; what QuantTune gains over this row is due to its loss and not to the training."""

    name: ClassVar[str] = "finetune"
    role: ClassVar[str] = "control"
