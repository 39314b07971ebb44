"""Range regularisation (R2, arXiv 2303.08253), here of activations, as a fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from baselines.method import METHODS
from baselines.penalties import PenalisedKinds
from quanttune.errors import ConfigError


@METHODS.register("activation_range")
@dataclass(frozen=True)
class ActivationRange(PenalisedKinds):
    """``L_task + weight * mean over sites of max|x| / unit``: what a symmetric min-max range is made of.

    The paper pulls in the range of weights, by the largest magnitude or by a smooth form of it. Ours: the
    same of activations; in units of the tensor's standard deviation at the start, so that one weight serves
    tensors of every magnitude; and log-sum-exp as the smooth form.

    Args:
        weight: Balance against the task loss; the default was chosen on validation items
            (``benchmark/studies/trained_search.toml``).
        sharpness: 0 for the largest magnitude itself, whose gradient reaches one element; otherwise ``a`` of
            ``log(sum(exp(a * |x| / unit))) / a``, which nears it as ``a`` grows.
        kinds: Kinds of site by name, joined by ``,``; ``all`` for every kind but softmax outputs.

    Raises:
        ConfigError: If the sharpness is negative.
        UnknownNameError: If there is no such kind of site.
    """

    name: ClassVar[str] = "activation_range"
    source: ClassVar[str] = "arXiv 2303.08253"
    weight: float = 0.3
    sharpness: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sharpness < 0:
            raise ConfigError(
                f"activation_range: sharpness {self.sharpness} is negative; use 0 for the largest magnitude"
            )

    def formula(self, values: Tensor, unit: float) -> Tensor:
        """The range of one side in units, or its smooth form."""
        magnitudes = values.abs().flatten() / unit
        if not self.sharpness:
            return magnitudes.amax()
        return torch.logsumexp(self.sharpness * magnitudes, 0) / self.sharpness
