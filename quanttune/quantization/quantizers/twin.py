"""Twin uniform quantizers: one bit of the code chooses between two uniform grids (PTQ4ViT, arXiv 2111.12293).

A value is rounded on the grid of the region it falls in, and on that one alone.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from quanttune.errors import ConfigError
from quanttune.quantization.quantizers.grid import Encoded, Grid
from quanttune.quantization.quantizers.quantizer import (
    QUANTIZERS,
    PlainQuantizer,
    ProbabilityQuantizer,
    straight_through,
)

GELU_LOWEST = 0.17
"""Magnitude of GELU's smallest value, about -0.16997, rounded up: the fixed range of the negative side."""


@QUANTIZERS.register("twin_softmax")
class TwinSoftmaxQuantizer(ProbabilityQuantizer):
    """Attention probabilities: half of the codes for ``[0, split)``, half for ``[split, 1]``.

    Both halves have ``2**(bits-1)`` unsigned codes; the steps are ``split / (2**(bits-1)-1)`` and
    ``1 / (2**(bits-1)-1)``.

    Args:
        split: Where the regions meet, in (0, 1]; a power of two lets integer hardware align the two with a
            shift.
        bits: Bit width, region bit included.

    Raises:
        ConfigError: If ``split`` is outside (0, 1] or there are fewer than 2 bits.
    """

    kind: ClassVar[str] = "twin_softmax"
    parameters: ClassVar[tuple[str, ...]] = ("split", "bits")

    def __init__(self, split: float, bits: int) -> None:
        if not 0 < split <= 1:
            raise ConfigError(
                f"the split {split} of a twin quantizer is not in (0, 1]; use a power of two such as 0.125"
            )
        self.split, self.bits = split, bits
        self._top = _top_code(bits)
        self._step = split / self._top

    def __call__(self, values: Tensor) -> Tensor:
        """Quantize and dequantize probabilities of any shape."""
        return straight_through(values, self._quantized(values.detach()))

    def encode(self, values: Tensor) -> Encoded | None:
        """Codes of the fine step, which a coarse code is a shift of where the split is a power of two."""
        if math.frexp(self.split)[0] != 0.5:
            return None
        shift = round(1 / self.split)
        codes = torch.where(values < self.split, self._fine(values), self._coarse(values).mul_(shift))
        return Encoded(codes, Grid(self._step, self._top * shift))

    def _quantized(self, values: Tensor) -> Tensor:
        fine = self._fine(values).mul_(self._step)
        return torch.where(values < self.split, fine, self._coarse(values).mul_(1 / self._top))

    def _fine(self, values: Tensor) -> Tensor:
        return (values * (self._top / self.split)).round_().clamp_(0, self._top)

    def _coarse(self, values: Tensor) -> Tensor:
        return (values * self._top).round_().clamp_(0, self._top)

    def __repr__(self) -> str:
        return f"TwinSoftmaxQuantizer(split {self.split:g}, {self.bits} bits)"


@QUANTIZERS.register("twin_gelu")
class TwinGeluQuantizer(PlainQuantizer):
    """GELU outputs: half of the codes for the negative side, whose range is fixed, half for ``[0, limit]``.

    The steps are ``negative / (2**(bits-1)-1)`` and ``limit / (2**(bits-1)-1)``.

    Args:
        limit: Largest representable value, positive.
        bits: Bit width, side bit included.
        negative: Range of the negative side.

    Raises:
        ConfigError: If a range is not positive or there are fewer than 2 bits.
    """

    kind: ClassVar[str] = "twin_gelu"
    parameters: ClassVar[tuple[str, ...]] = ("limit", "bits", "negative")
    scales: ClassVar[tuple[str, ...]] = ("limit", "negative")

    def __init__(self, limit: float, bits: int, negative: float = GELU_LOWEST) -> None:
        if not (limit > 0 and negative > 0):
            raise ConfigError(f"the ranges {negative} and {limit} of a twin quantizer must be positive")
        self.limit, self.bits, self.negative = limit, bits, negative
        self._top = _top_code(bits)

    def __call__(self, values: Tensor) -> Tensor:
        """Quantize and dequantize values of any shape."""
        return straight_through(values, self._quantized(values.detach()))

    def _quantized(self, values: Tensor) -> Tensor:
        # Clamping to one side first leaves zero on the other, so the sum is the region's own grid and no
        # more.
        top = self._top
        below = values.clamp(-self.negative, 0).mul_(top / self.negative).round_().mul_(self.negative / top)
        above = values.clamp(0, self.limit).mul_(top / self.limit).round_().mul_(self.limit / top)
        return above.add_(below)

    @property
    def low(self) -> Tensor:
        """Smallest representable value."""
        return torch.tensor(-self.negative)

    @property
    def high(self) -> Tensor:
        """Largest representable value."""
        return torch.tensor(self.limit)

    def __repr__(self) -> str:
        return f"TwinGeluQuantizer(-{self.negative:g} .. {self.limit:.4g}, {self.bits} bits)"


def _top_code(bits: int) -> int:
    if bits < 2:
        raise ConfigError(
            f"a twin quantizer needs a bit for the region and one for the value; got {bits} bits"
        )
    return 2 ** (bits - 1) - 1
