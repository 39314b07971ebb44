"""What penalties on activations share as methods of their own: the recipe of QuantTune with another loss."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn

from baselines.training import FineTuning
from quanttune.activation_penalty import SitePenalty
from quanttune.errors import ConfigError, UnknownNameError
from quanttune.outlier_loss import RESIDUAL_STREAM
from quanttune.quantization import SiteKind, SiteTable

STREAM = ",".join(RESIDUAL_STREAM)
"""The kinds of site that QuantTune penalises by default, so that the losses differ and nothing else."""


@dataclass(frozen=True)
class PenalisedFineTuning(FineTuning):
    """Fine-tuning with ``L_task + weight * mean over sites of a formula``, then calibration.

    Steps, batches, dropout and rates are those of ``finetune`` and ``quanttune``; a weight of 0 is
    ``finetune``.

    Args:
        weight: Balance against the task loss.

    Raises:
        ConfigError: If the weight is negative, or another setting of the training is out of its range.
    """

    weight: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weight < 0:
            raise ConfigError(f"{self.name} weight {self.weight} is negative; use 0 to turn the penalty off")

    @abstractmethod
    def formula(self, values: Tensor, unit: float) -> Tensor:
        """What a site costs.

        Args:
            values: Of one forward pass, float32 or wider, any shape.
            unit: The standard deviation of the site's values in the first batch, before any step.
        """

    @abstractmethod
    def penalised(self, sites: SiteTable) -> list[str]:
        """Ids of the sites among all of profile ``full``."""

    def activation_penalty(self, model: nn.Module, sites: SiteTable, steps: int) -> SitePenalty | None:
        """The mean of the formula over the sites; nothing where it weighs nothing."""
        if not self.weight:
            return None
        return SitePenalty(model, self.penalised(sites.profile("full").activations()), self.formula, self)


@dataclass(frozen=True)
class PenalisedKinds(PenalisedFineTuning):
    """A penalty on every site of some kinds.

    Args:
        kinds: Kinds of site by name, joined by ``,``; ``all`` for every kind but softmax outputs.

    Raises:
        UnknownNameError: If there is no such kind of site.
    """

    kinds: str = STREAM

    def __post_init__(self) -> None:
        super().__post_init__()
        kinds_of(self.kinds)

    def penalised(self, sites: SiteTable) -> list[str]:
        """Those of the chosen kinds."""
        chosen = kinds_of(self.kinds)
        return [site.id for site in sites.values() if site.kind in chosen]


def kinds_of(text: str) -> tuple[SiteKind, ...]:
    """Kinds of site from their names.

    Args:
        text: Names joined by ``,``; ``all`` for every kind of activation but softmax outputs.

    Raises:
        UnknownNameError: If there is no such kind.
    """
    known = {kind.value: kind for kind in SiteKind}
    if text == "all":
        return tuple(kind for kind in SiteKind if kind not in (SiteKind.WEIGHT, SiteKind.SOFTMAX))
    for name in text.split(","):
        if name not in known:
            raise UnknownNameError("kind of site", name, ["all", *known])
    return tuple(known[name] for name in text.split(","))


def block_outputs(sites: SiteTable) -> list[str]:
    """The residual sums behind the MLP of each Transformer block, in execution order.

    A sum is one if an activation function ran since the sum before it: between the two sums of a block lies
    the MLP, in front of the first one attention alone. With the normalisation behind the sums (BERT) this is
    the sum, not what the normalisation makes of it.

    Args:
        sites: Every site of the model, or those of profile ``full``, in execution order.
    """
    found, activated = [], False
    for site in sites.values():
        if site.kind is SiteKind.ACTIVATION:
            activated = True
        elif site.kind is SiteKind.RESIDUAL_SUM:
            if activated:
                found.append(site.id)
            activated = False
    return found
