"""BRECQ: rounding learned block by block (Li et al. 2021, arXiv 2102.05426)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from baselines.method import METHODS, Context
from baselines.reconstructing.network_parts import Part, blocks_of
from baselines.reconstructing.reconstruction import Settings
from baselines.reconstructing.rounding import RoundingMethod
from quanttune.errors import ConfigError


@METHODS.register("brecq")
@dataclass(frozen=True)
class Brecq(RoundingMethod):
    """The weights of a block are rounded up or down together such that the block's output stays.

    The loss is the squared error of the block's output, plus AdaRound's penalty. With ``weigh_errors`` each
    element is weighted by a squared gradient there, which is the paper's (equation 10: the diagonal of the
    Fisher information): here by that of the divergence between the outputs of FP32 and of the network rounded
    to nearest. From 128 items it leaves too few elements that count, and so did that of the task's loss; on
    validation items both are far behind no weights (docs/methods.md), so that is the default. Blocks
    are the repeated modules of the network, whatever its architecture; what lies outside, as the patch
    convolution and the head, is learned layer by layer. The rest of what is ours stands at
    :class:`~baselines.reconstructing.rounding.RoundingMethod`.

    The paper learns the steps of activations afterwards. Here they are calibrated like everyone's, so that
    the row shows what the weights gain. With ``drop`` below 1 activations are quantized while weights learn,
    each element with probability ``1 - drop``, and so are the block's inputs: QDrop (arXiv 2203.05740, whose
    probability is 0.5), without its learned steps.

    Args:
        drop: Probability that an element of an activation stays in FP32 while a block learns.
        weigh_errors: Whether errors are weighted, as in the paper; without, each element counts the same.
    """

    name: ClassVar[str] = "brecq"
    variant: ClassVar[str] = "ours"
    version: ClassVar[int] = 2
    source: ClassVar[str] = "arXiv 2102.05426, ICLR 2021"
    licence: ClassVar[str] = "MIT"
    drop: float = 1.0
    weigh_errors: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.drop <= 1:
            raise ConfigError(f"{self.name} drop {self.drop} is no probability; 1 or 0.5 is usual")

    @property
    def weigh(self) -> bool:  # type: ignore[override]
        """Whether errors are weighted."""
        return self.weigh_errors

    def settings(self) -> Settings:
        """With the probability of dropping."""
        return dataclasses.replace(super().settings(), drop=self.drop)

    def parts(self, context: Context, weights: dict[str, str]) -> list[Part]:
        """Blocks as a whole."""
        return blocks_of(context.model, weights, inner=False)
