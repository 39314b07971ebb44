"""Attention probabilities as powers of the square root of two (RepQ-ViT, arXiv 2212.08254, section 3.3)."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from quanttune.errors import ConfigError
from quanttune.quantization.quantizers.quantizer import QUANTIZERS, ProbabilityQuantizer, straight_through


@QUANTIZERS.register("log_sqrt2")
class LogSqrt2Quantizer(ProbabilityQuantizer):
    """Codes ``q = round(-2 log2(p / s))``, values ``s 2**-ceil(q / 2)``, times sqrt 2 for odd ``q``.

    So hardware shifts by half the code, and the code's last bit chooses one of two scales. Codes run from 0
    to ``2**bits - 1``: what is above ``s`` gets code 0, and a probability whose code would be larger, zero
    included, becomes 0.

    Values of odd and of even codes are multiples of no common step, so there is no
    :meth:`~quanttune.quantization.Quantizer.encode`: products with them are summed in float64.

    Args:
        bits: Bit width.
        scale: ``s``, the largest value, in ``(0, 1]``.

    Raises:
        ConfigError: If the scale is not in ``(0, 1]``, or the width below 2.
    """

    kind: ClassVar[str] = "log_sqrt2"
    parameters: ClassVar[tuple[str, ...]] = ("bits", "scale")
    scales: ClassVar[tuple[str, ...]] = ("scale",)

    def __init__(self, bits: int, scale: float) -> None:
        # A perturbed scale may pass 1 by as much as rounding does.
        if not 0 < scale <= 1 + 1e-3:
            raise ConfigError(f"the scale {scale} of a log-sqrt2 quantizer is not in (0, 1]; 1 covers all")
        if bits < 2:
            raise ConfigError(f"a log-sqrt2 quantizer of {bits} bits has too few codes; give at least 2")
        self.bits, self.scale = bits, scale

    def __call__(self, values: Tensor) -> Tensor:
        """Quantize and dequantize probabilities of any shape."""
        return straight_through(values, self._quantized(values.detach()))

    def codes(self, values: Tensor) -> Tensor:
        """The code of each value, int64; ``2**bits`` where the value becomes 0."""
        # In float64: the logarithm's last digit depends on the processor.
        exponents = torch.log2(values.double() / self.scale).mul_(-2).round_()
        return exponents.clamp_(0, 2**self.bits).long()

    def decoded(self, codes: Tensor) -> Tensor:
        """The value of each code, float64."""
        half = torch.div(codes + 1, 2, rounding_mode="floor")
        # As a tensor: of two numbers float32 would be made.
        root = torch.ones(codes.shape, dtype=torch.float64, device=codes.device)
        root[codes % 2 == 1] = math.sqrt(2.0)
        # exp2 of a whole number may be off by a digit; ldexp is a shift.
        values = torch.ldexp(root * self.scale, -half)
        return torch.where(codes < 2**self.bits, values, 0.0)

    def _quantized(self, values: Tensor) -> Tensor:
        # NaN has no code.
        return torch.where(values.isnan(), values, self.decoded(self.codes(values)).to(values.dtype))

    @property
    def high(self) -> Tensor:
        """Largest representable value."""
        return torch.tensor(self.scale)

    def __repr__(self) -> str:
        return f"LogSqrt2Quantizer({self.bits} bits, scale {self.scale:.4g})"
