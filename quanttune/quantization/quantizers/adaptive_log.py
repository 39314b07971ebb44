"""Logarithmic levels whose base is chosen for each tensor (AdaLog, arXiv 2407.12951)."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from quanttune.errors import ConfigError
from quanttune.quantization.quantizers.grid import Encoded, Grid
from quanttune.quantization.quantizers.quantizer import QUANTIZERS, PlainQuantizer, straight_through

DENOMINATOR = 37
"""``r``: a base is ``2**(exponent / r)``, so that one table of ``r`` numbers and shifts read any code."""
_SHORT = (torch.float16, torch.bfloat16)
_LARGEST_CODE = 31
"""Codes of more bits than that leave no room below 2**53 for their sums with other codes."""
_TINY = float(np.finfo(np.float32).tiny)


@QUANTIZERS.register("adaptive_log")
class AdaptiveLogQuantizer(PlainQuantizer):
    """Powers of a base: code ``k = round(-log_b((x + shift) / scale))``, value ``scale * b**-k - shift``.

    The base is ``b = 2**(exponent / 37)``. ``b**-k`` is read as a shift and a table, ``2**-(e // 37) * T[e %
    37]`` with ``e = k * exponent``, and the table holds ``2**(-j / 37)`` as integers out of ``2**(bits + 1) -
    2``, as in the authors' code. Values above ``scale`` get code 0.

    One code is kept for zero: the powers have the codes 0 to ``2**bits - 2``, and what would get a larger
    one, masked probabilities among it, becomes ``-shift``. In the authors' code zero comes on top of
    ``2**bits`` powers.

    Which code a value gets is told by thresholds in float32, computed once, so that no processor's logarithm
    decides.

    Args:
        scale: Largest value of ``x + shift`` that is told apart, positive.
        exponent: Of the base, 1 or more; 37 is base 2.
        bits: Bit width.
        shift: Added before the logarithm is taken, as for GELU, whose outputs begin at -0.17. Integer
            hardware has ``-W shift`` in the bias.

    Raises:
        ConfigError: If the scale is not positive and finite, the exponent below 1, or there are fewer than 2
            bits.
    """

    kind: ClassVar[str] = "adaptive_log"
    parameters: ClassVar[tuple[str, ...]] = ("scale", "exponent", "bits", "shift")
    scales: ClassVar[tuple[str, ...]] = ("scale",)

    def __init__(self, scale: float, exponent: int, bits: int, shift: float = 0.0) -> None:
        if not 0 < scale < float("inf"):
            raise ConfigError(f"the scale {scale} of a logarithmic quantizer must be positive and finite")
        if exponent < 1 or bits < 2:
            raise ConfigError(
                f"a logarithmic quantizer of {bits} bits and base 2**({exponent}/{DENOMINATOR}) has no "
                "codes; give at least 2 bits and an exponent of at least 1"
            )
        self.scale, self.exponent, self.bits, self.shift = scale, exponent, bits, shift
        top = 2 ** (bits + 1) - 2
        exponents = np.arange(2**bits - 2, -1, -1) * exponent
        shifts, rest = exponents // DENOMINATOR, exponents % DENOMINATOR
        mantissas = np.rint(2.0 ** (-rest / DENOMINATOR) * top)
        unit = np.float32(scale / top)
        powers = np.ldexp((mantissas.astype(np.float32) * unit).astype(np.float64), -shifts)
        # Below float32's normal numbers processors may or may not know a value.
        powers[powers < _TINY] = 0.0
        middles = scale * 2.0 ** (-(exponents + exponent / 2) / DENOMINATOR)
        self._thresholds = torch.from_numpy((middles - shift).astype(np.float32))
        self._levels = torch.from_numpy((np.concatenate([[0.0], powers]) - shift).astype(np.float32))
        self._grid, self._codes = None, torch.empty(0)
        smallest = int(shifts[0])
        if shift == 0 and smallest + bits + 1 <= _LARGEST_CODE:
            codes = np.ldexp(mantissas, smallest - shifts)
            self._codes = torch.from_numpy(np.concatenate([[0.0], codes]).astype(np.float32))
            self._grid = Grid(float(np.ldexp(float(unit), -smallest)), top * 2**smallest)

    def __call__(self, values: Tensor) -> Tensor:
        """Quantize and dequantize values of any shape."""
        return straight_through(values, self._quantized(values.detach()))

    def encode(self, values: Tensor) -> Encoded | None:
        """Multiples of the smallest power's unit, where there is no shift and sums of them stay exact."""
        if self._grid is None:
            return None
        return Encoded(self._read(self._codes, values), self._grid)

    def _quantized(self, values: Tensor) -> Tensor:
        if values.dtype in _SHORT:
            return self._quantized(values.float()).to(values.dtype)
        return self._read(self._levels, values)

    def _read(self, table: Tensor, values: Tensor) -> Tensor:
        places = torch.bucketize(values.contiguous(), self._thresholds.to(values.device, values.dtype))
        found = table.to(values.device, values.dtype)[places]
        # A search puts NaN above everything.
        return torch.where(values.isnan(), values, found)

    @property
    def low(self) -> Tensor:
        """Smallest representable value."""
        return self._levels[0]

    @property
    def high(self) -> Tensor:
        """Largest representable value."""
        return self._levels[-1]

    def __repr__(self) -> str:
        base = 2 ** (self.exponent / DENOMINATOR)
        return f"AdaptiveLogQuantizer(base {base:.4g}, scale {self.scale:.4g}, {self.bits} bits)"
