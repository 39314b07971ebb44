"""One range for every token of an activation, found while the network runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from quanttune.quantization.granularity.granularity import GRANULARITIES, Granularity

if TYPE_CHECKING:
    from quanttune.quantization.quantizers import DynamicQuantizer
    from quanttune.quantization.ranges import RangeRule
    from quanttune.quantization.sites import Site
    from quanttune.quantization.statistics import TensorStatistics


@GRANULARITIES.register("per_token")
@dataclass(frozen=True)
class PerToken(Granularity):
    """``W8A8-token``: an upper bound for static quantization (ZeroQuant, arXiv 2206.01861, section 4.1).

    Whatever a product sums over shares a range, so that integers can be summed: a token of a linear layer's
    input, a key, a whole item where a convolution reads it. The values that attention weighs are summed over
    tokens: a range of one token each, so that no token's numbers depend on those behind it or on padding, and
    no sum of integers (the suite adds such products up in float64).
    """

    name: ClassVar[str] = "per_token"
    activation_pattern: ClassVar[str | None] = "-token"
    example: ClassVar[str] = "-token"
    dynamic: ClassVar[bool] = True

    def activation_quantizer(
        self, site: Site, statistics: TensorStatistics | None, bits: int, symmetric: bool, rule: RangeRule
    ) -> DynamicQuantizer:
        """Min-max at run time; statistics and rule have no say."""
        from quanttune.quantization.axes import summed_axes
        from quanttune.quantization.quantizers import DynamicQuantizer

        axes = (-1,) if site.weighed else summed_axes(site.at, len(site.shape) + 1)
        return DynamicQuantizer(bits, axes, symmetric)
