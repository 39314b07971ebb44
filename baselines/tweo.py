"""TWEO: fine-tuning with a power of the block outputs (Transformers Without Extreme Outliers, 2511.23225)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from baselines.method import METHODS
from baselines.penalties import PenalisedFineTuning, block_outputs
from quanttune.errors import ConfigError
from quanttune.quantization import Scheme, SiteTable

_EPSILON = 1e-6


@METHODS.register("tweo")
@dataclass(frozen=True)
class Tweo(PenalisedFineTuning):
    """``L_task + weight * mean over blocks of mean((|A| / (tau + eps)) ** power)``, A a block's output.

    ``A`` is the residual sum behind the MLP, in post-norm models before its normalisation. The paper trains
    from scratch with an absolute ``tau`` of 2 to 5 and names fine-tuning as future work. Ours: ``tau`` counts
    standard deviations of the same tensor at the start, because a pretrained stream has the magnitude of its
    own; the weight stays the same during the training; ``eps`` is 1e-6.

    Args:
        weight: Balance against the task loss; the default was chosen on validation items
            (``benchmark/studies/trained_search.toml``).
        tau: Magnitude, in standard deviations at the start, at which a value costs 1; the default is ours.
        power: Exponent; the paper's is 4. With a mean over all elements a small one leaves rare outliers
            without gradient.

    Raises:
        ConfigError: If ``tau`` is not positive or the power is below 1.
    """

    name: ClassVar[str] = "tweo"
    source: ClassVar[str] = "arXiv 2511.23225, CVPR 2026"
    weight: float = 0.1
    tau: float = 3.0
    power: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tau > 0:
            raise ConfigError(f"tweo: tau {self.tau} is not positive; 2 to 5 deviations is usual")
        if self.power < 1:
            raise ConfigError(f"tweo: power {self.power} is below 1; the paper's is 4")

    def skip(self, sites: SiteTable, scheme: Scheme) -> str | None:
        """A model in which no block is found, or what its calibrator cannot quantize."""
        if not block_outputs(sites):
            return "the model has no residual sum behind an activation function, so no block has an output"
        return super().skip(sites, scheme)

    def formula(self, values: Tensor, unit: float) -> Tensor:
        """``mean((|A| / (tau * unit + eps)) ** power)``."""
        return ((values.abs() / (self.tau * unit + _EPSILON)) ** self.power).mean()

    def penalised(self, sites: SiteTable) -> list[str]:
        """The blocks' outputs."""
        return block_outputs(sites)
