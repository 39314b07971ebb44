"""AdaRound: rounding learned layer by layer (Nagel et al. 2020, arXiv 2004.10568)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from baselines.method import METHODS, Context
from baselines.reconstructing.network_parts import Part, blocks_of
from baselines.reconstructing.rounding import RoundingMethod


@METHODS.register("adaround")
@dataclass(frozen=True)
class AdaRound(RoundingMethod):
    """Each weight of a layer is rounded up or down such that the layer's output stays.

    The loss is the squared error of one layer's output, the layer reading what the layers rounded before it
    give (equation 25, without the activation function behind the layer), plus the penalty of equation 24. See
    :class:`~baselines.reconstructing.rounding.RoundingMethod` for what is ours and for the parameters.
    """

    name: ClassVar[str] = "adaround"
    variant: ClassVar[str] = "paper"
    version: ClassVar[int] = 1
    source: ClassVar[str] = "arXiv 2004.10568, ICML 2020"
    licence: ClassVar[str] = "none"

    def parts(self, context: Context, weights: dict[str, str]) -> list[Part]:
        """Layers; those of a block get their inputs from the block alone, which spares passes."""
        return blocks_of(context.model, weights, inner=True)
