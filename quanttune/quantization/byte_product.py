"""Products of codes in one byte each: faster than float32's where the processor has them.

Sums are 32-bit integers; on a GPU its tensor cores make them. Without instructions for dot products of bytes
(VNNI, AMX) some kernels add pairs of products in 16 bits and saturate, without a word, so each shape is tried
on the worst operands before it is used. Others are a plain loop, right and 24 times as slow as float32's, so
each is timed first.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from quanttune.quantization import one_pass
from quanttune.quantization.quantizers.grid import Encoded

BYTE = 127
"""Codes up to this magnitude fit a signed byte."""
_LONGEST = (2**31 - 1) // BYTE**2
_PROBED_ROWS = (1, 48, 512)
"""Numbers of rows that a product is tried with: kernels are chosen by it."""
_TIMED_ROWS, _TIMED_OUTPUTS, _TIMES = 48, 512, 4
_SLOWER = 4
"""Times as long as in float32 a product may take: instructions for it never do, and a plain loop always."""
_FEWEST_ON_A_GPU = 32
"""CUDA's product of bytes takes no fewer than 17 rows; those that are missing are zeros."""
_WEIGHTS_AT_ONCE = 1 << 22
_CPU = torch.device("cpu")


class ByteProduct:
    """Products of rows of codes with one weight.

    Args:
        weight: Codes, shape ``(outputs, inputs)``, int8.
        rows: The most rows that are multiplied at once.
    """

    def __init__(self, weight: Tensor, rows: int) -> None:
        outputs, inputs = weight.shape
        self._weight = weight.T
        self._fewest = _FEWEST_ON_A_GPU if weight.is_cuda else 1
        rows = max(rows, self._fewest)
        self._codes = torch.zeros(rows, inputs, dtype=torch.int8, device=weight.device)
        self._sums = torch.empty(rows, outputs, dtype=torch.int32, device=weight.device)

    def write(self, codes: Tensor, total: Tensor) -> None:
        """Write the exact sums, each rounded once to float32.

        Args:
            codes: Integers up to :data:`BYTE` in magnitude, or not finite; float32, ``(rows, inputs)``.
            total: Where to write, shape ``(rows, outputs)``, float32.
        """
        # No byte is NaN or infinite: what a cast would make of it differs between processors.
        if not codes.is_cuda and not math.isfinite(float(codes.sum())):
            total.copy_(codes.double() @ self._weight.double())
            return
        total.copy_(self._summed(codes))
        if codes.is_cuda:
            # To look would be to wait for the GPU: nothing is added to a finite row, NaN to another.
            seen = codes.sum(dim=-1, keepdim=True)
            total.add_(seen - seen)

    def scaled(self, codes: Tensor, step: float | Tensor, bias: Tensor | None) -> Tensor | None:
        """The exact sums, rounded once, times a step for all or for each output, plus a bias.

        Returns:
            ``None`` where this takes more passes over memory than :meth:`write` and what follows it.
        """
        if not codes.is_cuda:
            return None
        return one_pass.scaled(self._summed(codes), codes.sum(dim=-1, keepdim=True), step, bias)

    def _summed(self, codes: Tensor) -> Tensor:
        count = max(len(codes), self._fewest)
        in_bytes, sums = self._codes[:count], self._sums[:count]
        in_bytes[: len(codes)].copy_(codes)
        torch._int_mm(in_bytes, self._weight, out=sums)
        return sums[: len(codes)]


def as_bytes(encoded: Encoded) -> Tensor | None:
    """A weight's codes as int8; ``None`` where they do not fit, or products are slow or not exact here."""
    codes = encoded.codes
    fits = encoded.grid.largest <= BYTE and codes.dim() == 2 and codes.shape[1] <= _LONGEST
    if not fits or not is_fast(*codes.shape, codes.device) or not is_exact(*codes.shape, codes.device):
        return None
    return codes.to(torch.int8)


@cache
def is_fast(outputs: int, inputs: int, device: torch.device = _CPU) -> bool:
    """Whether this process has more than a plain loop for products of bytes of that shape, by time.

    No number depends on the answer: both ways give the exact sums.

    Args:
        outputs: Rows of the weight; of many, some are tried.
        inputs: Numbers that are summed over.
        device: Where; a GPU always has.
    """
    if device.type != "cpu":
        return True
    rows = torch.ones(_TIMED_ROWS, inputs, dtype=torch.int8)
    weight = torch.ones(inputs, min(outputs, _TIMED_OUTPUTS), dtype=torch.int8)
    in_floats = rows.float(), weight.float()
    try:
        in_bytes = _shortest(lambda: torch._int_mm(rows, weight))
    except (RuntimeError, NotImplementedError):
        return False
    return in_bytes <= _SLOWER * _shortest(lambda: torch.mm(*in_floats))


def _shortest(work: Callable[[], Tensor]) -> float:
    """Seconds of the fastest of a few times; the first ones choose a kernel."""
    seconds = []
    for _ in range(_TIMES):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


@cache
def is_exact(outputs: int, inputs: int, device: torch.device = _CPU) -> bool:
    """Whether this process multiplies bytes of that shape without loss, tried on the largest codes.

    Args:
        outputs: Rows of the weight.
        inputs: Numbers that are summed over.
        device: Where.
    """
    weight = torch.full((outputs, inputs), BYTE, dtype=torch.int8, device=device)
    weight[1::2, ::3] = -BYTE
    weight[2::3] = -BYTE
    fewest = _FEWEST_ON_A_GPU if weight.is_cuda else 1
    for count in sorted({max(count, fewest) for count in _PROBED_ROWS}):
        rows = torch.full((count, inputs), BYTE, dtype=torch.int8, device=device)
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
