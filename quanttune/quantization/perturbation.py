"""Copies of a quantized model whose steps differ in their last digits.

Another processor, library or batch size rounds differently, and what a deep quantized network computes then
differs by whole codes. What such copies score shows by how much: the model itself is copy 0, and any of the
others is as good.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from quanttune.seeds import torch_generator

if TYPE_CHECKING:
    from quanttune.quantization.quantizers import Quantizer

COPIES = 5
"""Perturbed copies beside the model itself."""
RELATIVE = 1e-6
"""By how much a step is perturbed at most, relative to itself: about eight units in its last place."""
PURPOSE = "rounding noise"


def perturbed_copy(quantizers: Mapping[str, Quantizer], seed: int, copy: int) -> dict[str, Quantizer]:
    """Quantizers whose steps and ranges are off by at most :data:`RELATIVE`.

    Args:
        quantizers: By site.
        seed: Of the cell.
        copy: Which copy, from 1 on.
    """
    generator = torch_generator(seed, PURPOSE, copy)
    return {site: quantizer.perturbed(RELATIVE, generator) for site, quantizer in sorted(quantizers.items())}
