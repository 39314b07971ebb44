"""``quanttune_every_channel``: QuantTune whose running moments are estimated from values of every channel.

A try for the study of the same name, ``every_channel.toml``, which needs this file as ``--include``.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from baselines.method import METHODS
from baselines.quanttune import QuantTune
from quanttune import OutlierLossConfig


@METHODS.register("quanttune_every_channel")
@dataclass(frozen=True)
class QuantTuneEveryChannel(QuantTune):
    """As ``quanttune``, with :attr:`quanttune.OutlierLossConfig.every_channel`."""

    name: ClassVar[str] = "quanttune_every_channel"

    def outlier_settings(self) -> OutlierLossConfig:
        """The settings of the outlier-driven loss."""
        return dataclasses.replace(super().outlier_settings(), every_channel=True)
