"""One range for every few consecutive inputs of an output channel."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from quanttune.errors import ConfigError
from quanttune.quantization.granularity.granularity import GRANULARITIES, Granularity

if TYPE_CHECKING:
    from torch import Tensor

    from quanttune.quantization.quantizers import GroupQuantizer


@GRANULARITIES.register("per_group")
@dataclass(frozen=True)
class PerGroup(Granularity):
    """``W4g128A8``: what weights of language models have at 4 bits and below.

    Args:
        size: Consecutive inputs that share a range, at least 2.

    Raises:
        ConfigError: If there are fewer.
    """

    name: ClassVar[str] = "per_group"
    weight_pattern: ClassVar[str | None] = r"g(\d+)"
    example: ClassVar[str] = "g128"
    size: int = 128

    def __post_init__(self) -> None:
        if self.size < 2:
            raise ConfigError(f"groups of {self.size} weights share no range; give at least 2, e.g. W4g128A8")

    @classmethod
    def from_match(cls, match: re.Match[str]) -> PerGroup:
        """The size stands in the text."""
        return cls(int(match[1]))

    @property
    def weight_text(self) -> str:
        """``g`` and the size."""
        return f"g{self.size}"

    def weight_quantizer(self, weight: Tensor, bits: int, symmetric: bool, axis: int) -> GroupQuantizer:
        """The range from the smallest to the largest weight of each group."""
        from quanttune.quantization.quantizers import GroupQuantizer

        if axis != 0:
            raise ConfigError(
                f"groups run along the inputs of a weight whose outputs are on dimension 0, not {axis}; use "
                "nn.Linear there, or weights per channel, e.g. W4A8"
            )
        return GroupQuantizer.of_weight(weight, bits, self.size, symmetric)

    def __str__(self) -> str:
        return f"per group of {self.size}"
