"""QuantTune: fine-tuning with the outlier-driven loss, then plain min-max calibration (arXiv 2403.06497).

The paper gives neither the loss formula nor the recipe that we could read; :mod:`quanttune.outlier_loss`
documents our reconstruction, hence the variant ``ours``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from baselines.method import METHODS
from baselines.penalties import kinds_of
from baselines.training import FineTuning
from quanttune.outlier_loss import OutlierLoss, OutlierLossConfig
from quanttune.quantization import SiteTable

_DEFAULT = OutlierLossConfig()


@METHODS.register("quanttune")
@dataclass(frozen=True)
class QuantTune(FineTuning):
    """Fine-tuning that pulls outlier activations back towards the expected statistics of their tensor.

    Args:
        weight: See :class:`quanttune.outlier_loss.OutlierLossConfig`, as for the other settings.
        threshold: See there.
        parameter_threshold: See there; 0 leaves the matrices alone.
        schedule: See there.
        band: See there.
        anneal: See there.
        power: See there.
        penalty: See there.
        kinds: Kinds of site by name, joined by ``,``; ``all`` for every kind but softmax outputs.
        branch_threshold: See there; 0 leaves the other kinds alone.
    """

    name: ClassVar[str] = "quanttune"
    source: ClassVar[str] = "arXiv 2403.06497, reconstructed"
    weight: float = _DEFAULT.weight
    threshold: float = _DEFAULT.threshold
    parameter_threshold: float = _DEFAULT.parameter_threshold or 0.0
    schedule: str = _DEFAULT.schedule
    band: float = _DEFAULT.band
    anneal: float = _DEFAULT.anneal
    power: int = _DEFAULT.power
    penalty: str = _DEFAULT.penalty
    kinds: str = ",".join(_DEFAULT.kinds or ())
    branch_threshold: float = _DEFAULT.branch_threshold or 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.outlier_settings()

    def activation_penalty(self, model: nn.Module, sites: SiteTable, steps: int) -> OutlierLoss:
        """The outlier-driven loss."""
        return OutlierLoss(model, sites, steps, self.outlier_settings())

    def outlier_settings(self) -> OutlierLossConfig:
        """The settings of the outlier-driven loss.

        Raises:
            ConfigError: If one is out of its range.
            UnknownNameError: If there is no such kind of site.
        """
        kinds = None if self.kinds == "all" else kinds_of(self.kinds)
        return OutlierLossConfig(
            weight=self.weight,
            threshold=self.threshold,
            parameter_threshold=self.parameter_threshold or None,
            schedule=self.schedule,
            band=self.band,
            anneal=self.anneal,
            power=self.power,
            penalty=self.penalty,
            kinds=kinds,
            branch_threshold=self.branch_threshold or None,
        )
