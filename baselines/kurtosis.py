"""Kurtosis regularisation of activations (arXiv 2404.03605) as a fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from baselines.method import METHODS
from baselines.penalties import PenalisedKinds
from quanttune.excess import kurtosis_of


@METHODS.register("kurtosis")
@dataclass(frozen=True)
class Kurtosis(PenalisedKinds):
    """``L_task + weight * mean over sites of |kurtosis - target|``.

    The kurtosis is the fourth standardised moment of the flattened tensor, not the excess over a Gaussian: 3
    for a Gaussian, 1.8 for the uniform distribution, which a uniform quantizer fits best. It is never below
    1, so that a target of 0 is the kurtosis itself. Ours: the same training and the same sites as QuantTune;
    the paper trains language models from scratch, with quantized inputs of linear layers besides.

    Args:
        weight: Balance against the task loss; the default was chosen on validation items
            (``benchmark/studies/trained_search.toml``).
        target: Kurtosis to come to; 0 for as small as possible.
        kinds: Kinds of site by name, joined by ``,``; ``all`` for every kind but softmax outputs.

    Raises:
        UnknownNameError: If there is no such kind of site.
    """

    name: ClassVar[str] = "kurtosis"
    source: ClassVar[str] = "arXiv 2404.03605"
    weight: float = 0.001
    target: float = 0.0

    def formula(self, values: Tensor, unit: float) -> Tensor:
        """``|kurtosis - target|``; the unit has no say."""
        return (kurtosis_of(values) - self.target).abs()
