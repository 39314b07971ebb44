"""One range for a whole tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from quanttune.errors import QuantTuneError
from quanttune.quantization.granularity.granularity import GRANULARITIES, Granularity

if TYPE_CHECKING:
    from torch import Tensor

    from quanttune.quantization.quantizers import UniformQuantizer
    from quanttune.quantization.ranges import RangeRule
    from quanttune.quantization.sites import Site
    from quanttune.quantization.statistics import TensorStatistics


@GRANULARITIES.register("per_tensor")
@dataclass(frozen=True)
class PerTensor(Granularity):
    """What an activation has unless a scheme says otherwise: ``W8A8``. For weights: ``W8tA8``."""

    name: ClassVar[str] = "per_tensor"
    weight_pattern: ClassVar[str | None] = "t"
    activation_pattern: ClassVar[str | None] = ""
    example: ClassVar[str] = "t"

    def weight_quantizer(self, weight: Tensor, bits: int, symmetric: bool, axis: int) -> UniformQuantizer:
        """The range from the smallest to the largest weight."""
        import torch

        from quanttune.quantization.quantizers import UniformQuantizer

        # Of the bounds, not of a copy: large copies freed between small kept scales would break up the heap.
        low, high = torch.aminmax(weight.detach())
        if symmetric:
            return UniformQuantizer.symmetric(torch.maximum(low.abs(), high.abs()).cpu(), bits)
        return UniformQuantizer.asymmetric(low.cpu(), high.cpu(), bits)

    def activation_quantizer(
        self, site: Site, statistics: TensorStatistics | None, bits: int, symmetric: bool, rule: RangeRule
    ) -> UniformQuantizer:
        """The range that the rule makes of the statistics."""
        from quanttune.quantization.quantizers import UniformQuantizer
        from quanttune.quantization.ranges import range_of

        if statistics is None:
            raise QuantTuneError(f"site {site.id} has no statistics; collect them for every site first")
        low, high = range_of(statistics, bits, symmetric, rule, f"site {site.id}")
        if symmetric:
            return UniformQuantizer.symmetric(max(-low, high), bits)
        return UniformQuantizer.asymmetric(low, high, bits)
