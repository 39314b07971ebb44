"""Attention probabilities as powers of two, and a softmax on integers alone (FQ-ViT, arXiv 2111.13824)."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from quanttune.errors import ConfigError
from quanttune.quantization.quantizers.grid import Encoded, Grid, quotient
from quanttune.quantization.quantizers.quantizer import QUANTIZERS, ProbabilityQuantizer, straight_through

EXPONENTIALS = ("paper", "reference-code")
"""Integer exponentials: I-BERT's, to which the paper refers (arXiv 2101.01321, algorithm 2), and that of
FQ-ViT's code. The first takes ``exp(r)`` on ``(-ln 2, 0]`` for ``0.3585 (r + 1.353)**2 + 0.344`` and rounds
``ln 2 / scale`` down, the second for ``0.35815147 r**2 + 0.96963238 r + 1`` and rounds it up."""
_LARGEST_COUNT = 32
"""More powers of two than that leave no room below 2**53 for their sums with other codes."""
SHIFTS = 30
"""Largest right shift of the exponential: scores more than ``30 ln 2`` below the largest count as there."""


@QUANTIZERS.register("log2")
class Log2Quantizer(ProbabilityQuantizer):
    """Probabilities as powers of two: code ``q = round(-log2 p)``, value ``2**-q``.

    Codes run from 0 to ``2**bits - 1``; a probability whose code would be larger, zero included, becomes 0.

    Args:
        bits: Bit width, usually 4.
    """

    kind: ClassVar[str] = "log2"
    parameters: ClassVar[tuple[str, ...]] = ("bits",)

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self._codes = 2**bits

    def __call__(self, values: Tensor) -> Tensor:
        """Quantize and dequantize probabilities of any shape."""
        return straight_through(values, self._quantized(values.detach()))

    def encode(self, values: Tensor) -> Encoded | None:
        """Multiples of the smallest power, where float32 holds them."""
        return _multiples(self._quantized(values), self._codes)

    def _quantized(self, values: Tensor) -> Tensor:
        # In float64: the logarithm's last digit depends on the processor.
        codes = torch.log2(values.double()).neg_().round_().clamp_(min=0)
        return _power_of_two(codes, self._codes).to(values.dtype)

    def __repr__(self) -> str:
        return f"Log2Quantizer({self.bits} bits)"


@QUANTIZERS.register("integer_softmax")
class IntegerSoftmaxQuantizer(ProbabilityQuantizer):
    """Log-Int-Softmax: what :class:`Log2Quantizer` gives when the softmax itself is computed on integers.

    Scores are integers ``i`` times ``scale``. With ``e_i`` the polynomial exponential of ``scale * (i - max
    i)``, the code is the rounded binary logarithm of the integer ``round(sum e / e_i)``: the position of its
    leading bit, one more if the next bit is set. Score differences are read back from the floating-point
    probabilities, so masks and score biases need no handling of their own.

    Args:
        bits: Bit width of the codes, usually 4.
        scale: Step of the scores, positive.
        exponential: One of :data:`EXPONENTIALS`.

    Raises:
        ConfigError: If the step is not positive or the exponential unknown.
    """

    kind: ClassVar[str] = "integer_softmax"
    parameters: ClassVar[tuple[str, ...]] = ("bits", "scale", "exponential")
    scales: ClassVar[tuple[str, ...]] = ("scale",)

    def __init__(self, bits: int, scale: float, exponential: str) -> None:
        if not scale > 0:
            raise ConfigError(f"the score step {scale} of an integer softmax must be positive")
        if exponential not in EXPONENTIALS:
            raise ConfigError(f"the exponential {exponential!r} is not one of {', '.join(EXPONENTIALS)}")
        self.bits, self.scale, self.exponential = bits, scale, exponential
        self._codes = 2**bits

    def __call__(self, values: Tensor) -> Tensor:
        """Quantize probabilities: rows sum to 1, or are zero where every score is masked."""
        return straight_through(values, self._quantized(values.detach()))

    def encode(self, values: Tensor) -> Encoded | None:
        """Multiples of the smallest power, where float32 holds them."""
        return _multiples(self._quantized(values), self._codes)

    def _quantized(self, values: Tensor) -> Tensor:
        with torch.no_grad():
            probabilities = values.double()
            largest = probabilities.amax(dim=-1, keepdim=True)
            scores = quotient(torch.log(probabilities / largest), self.scale).round_()
            # A masked row gives 0 / 0; any score will do, since its result is what it was, see below.
            scores = scores.nan_to_num_(nan=0.0, neginf=-math.inf)
            exponentials = integer_exponential(scores, self.scale, self.exponential)
            ratio = (exponentials.sum(dim=-1, keepdim=True) / exponentials).round_()
            quantized = _power_of_two(integer_log2(ratio), self._codes)
            # The shifted exponential of a masked score is small but not zero; its code is past the last one
            # unless the width is large, so the mask is kept.
            return torch.where(values > 0, quantized.to(values.dtype), values.clamp(max=0.0))

    def __repr__(self) -> str:
        return f"IntegerSoftmaxQuantizer({self.bits} bits, scale {self.scale:.4g}, {self.exponential})"


def integer_exponential(scores: Tensor, scale: float, form: str) -> Tensor:
    """``exp(scale * scores)`` by integer arithmetic, up to a common factor.

    With ``l`` the integer for ``ln 2``, a score is ``r - k l`` with ``-l < r <= 0``, and its exponential the
    polynomial of ``r`` shifted right by ``k``.

    Args:
        scores: Integer-valued, none positive, any shape, float64; minus infinity counts as far below.
        scale: Step of the scores.
        form: One of :data:`EXPONENTIALS`.

    Returns:
        Integers, as float64, proportional to the exponentials; none is below 1.
    """
    as_paper = form == "paper"
    ln2 = max(math.floor(math.log(2) / scale), 1) if as_paper else math.ceil(0.6931 / scale)
    scores = scores.clamp(min=-SHIFTS * ln2)
    shift = torch.floor(-scores / ln2)
    rest = scores + shift * ln2
    if as_paper:
        polynomial = (rest + math.floor(1.353 / scale)) ** 2 + math.floor(0.344 / (0.3585 * scale**2))
    else:
        linear = math.floor(0.96963238 / 0.35815147 / scale)
        polynomial = rest * (rest + linear) + math.floor(1 / 0.35815147 / scale**2)
    return torch.floor(polynomial * 2.0 ** (SHIFTS - shift)).clamp_(min=1)


def integer_log2(values: Tensor) -> Tensor:
    """Binary logarithm of positive integers, rounded by the bit after the leading one."""
    exponent = torch.frexp(values).exponent.to(values.dtype) - 1
    return exponent + (values >= 1.5 * torch.exp2(exponent)).to(values.dtype)


def _power_of_two(codes: Tensor, count: int) -> Tensor:
    # NaN is of no code and stays what it is.
    return torch.where(codes >= count, 0.0, torch.exp2(-codes))


def _multiples(powers: Tensor, count: int) -> Encoded | None:
    """Powers of two from ``2**(1 - count)`` to 1, and zeros, as multiples of the smallest."""
    if count > _LARGEST_COUNT:
        return None
    return Encoded(powers * 2.0 ** (count - 1), Grid(2.0 ** (1 - count), 2 ** (count - 1)))
