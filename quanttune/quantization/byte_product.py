"""Products of codes in one byte each: faster than float32's where the processor has them.

Sums are 32-bit integers. Processors without instructions for dot products of bytes (VNNI, AMX) add pairs of
products in 16 bits and saturate, without a word, so each shape is tried on the worst operands before it is
used.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from quanttune.quantization.quantizers.grid import Encoded

BYTE = 127
"""Codes up to this magnitude fit a signed byte."""
_LONGEST = (2**31 - 1) // BYTE**2
_PROBED_ROWS = (1, 48, 512)
"""Numbers of rows that a product is tried with: kernels are chosen by it."""
_WEIGHTS_AT_ONCE = 1 << 22


class ByteProduct:
    """Products of rows of codes with one weight.

    Args:
        weight: Codes, shape ``(outputs, inputs)``, int8.
        rows: The most rows that are multiplied at once.
    """

    def __init__(self, weight: Tensor, rows: int) -> None:
        outputs, inputs = weight.shape
        self._weight = weight.T
        self._codes = torch.empty(rows, inputs, dtype=torch.int8)
        self._sums = torch.empty(rows, outputs, dtype=torch.int32)

    def write(self, codes: Tensor, total: Tensor) -> None:
        """Write the exact sums, each rounded once to float32.

        Args:
            codes: Integers up to :data:`BYTE` in magnitude, or not finite; float32, ``(rows, inputs)``.
            total: Where to write, shape ``(rows, outputs)``, float32.
        """
        if not math.isfinite(float(codes.sum())):
            # No byte is NaN or infinite: what a cast would make of it differs between processors.
            total.copy_(codes.double() @ self._weight.double())
            return
        in_bytes, sums = self._codes[: len(codes)], self._sums[: len(codes)]
        in_bytes.copy_(codes)
        torch._int_mm(in_bytes, self._weight, out=sums)
        total.copy_(sums)


def as_bytes(encoded: Encoded) -> Tensor | None:
    """A weight's codes as int8; ``None`` where they do not fit or such products are not exact here."""
    codes = encoded.codes
    fits = encoded.grid.largest <= BYTE and codes.dim() == 2 and codes.shape[1] <= _LONGEST
    if not fits or codes.device.type != "cpu" or not is_exact(*codes.shape):
        return None
    return codes.to(torch.int8)


@cache
def is_exact(outputs: int, inputs: int) -> bool:
    """Whether this process multiplies bytes of that shape without loss, tried on the largest codes.

    Args:
        outputs: Rows of the weight.
        inputs: Numbers that are summed over.
    """
    weight = torch.full((outputs, inputs), BYTE, dtype=torch.int8)
    weight[1::2, ::3] = -BYTE
    weight[2::3] = -BYTE
    for count in _PROBED_ROWS:
        rows = torch.full((count, inputs), BYTE, dtype=torch.int8)
        # Sums of one sign in some rows, of both in others: what saturates differs.
        rows[1::2, 1::2] = -BYTE
        rows[2::3] = -BYTE
        try:
            found = torch._int_mm(rows, weight.T)
        except (RuntimeError, NotImplementedError):
            return False
        # A few outputs at a time: in float64 a large weight is eight times itself.
        at_once = max(_WEIGHTS_AT_ONCE // inputs, 1)
        for sums, part in zip(found.split(at_once, dim=1), weight.split(at_once), strict=True):
            if not torch.equal(sums.double(), rows.double() @ part.double().T):
                return False
    return True
