"""One range for every output channel of a weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from quanttune.quantization.granularity.granularity import GRANULARITIES, Granularity

if TYPE_CHECKING:
    from torch import Tensor

    from quanttune.quantization.quantizers import UniformQuantizer


@GRANULARITIES.register("per_channel")
@dataclass(frozen=True)
class PerChannel(Granularity):
    """What a weight has unless a scheme says otherwise: ``W8A8``."""

    name: ClassVar[str] = "per_channel"
    weight_pattern: ClassVar[str | None] = ""

    def weight_quantizer(self, weight: Tensor, bits: int, symmetric: bool, axis: int) -> UniformQuantizer:
        """The range from the smallest to the largest weight of each channel."""
        import torch

        from quanttune.quantization.quantizers import UniformQuantizer

        # Of the bounds, not of a copy: large copies freed between small kept scales would break up the heap.
        # aminmax along a dimension takes twenty times as long on a CPU.
        rows = weight.detach().movedim(axis, 0).flatten(1)
        low, high = rows.amin(dim=1), rows.amax(dim=1)
        if symmetric:
            return UniformQuantizer.symmetric(torch.maximum(low.abs(), high.abs()).cpu(), bits, axis)
        return UniformQuantizer.asymmetric(low.cpu(), high.cpu(), bits, axis)
