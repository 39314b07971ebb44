"""Products on integer codes: the same number whatever the processor, the threads, the batch or the library.

Of two operands on grids the codes are multiplied and summed, and only then scaled. A sum of integers is exact
in any order while it stays below 2**24 in float32 and 2**53 in float64, so the fastest kernel at hand may add
them up as it likes: float32 where the bound over the codes allows it, in two parts where it allows each half,
float64 beyond. Then, in this order: the sum is rounded to float32, multiplied by the product of both steps
(taken in float64, rounded once), and the bias is added.

Where an operand is on no grid, or its steps differ along the dimension that is summed over, the product of
the float32 values is summed in float64 and rounded once: exact products, and an error of the sum some 2**-29
of what would change the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from quanttune.quantization import one_pass
from quanttune.quantization.byte_product import BYTE, ByteProduct, as_bytes
from quanttune.quantization.portions import portion
from quanttune.quantization.quantizers.grid import Encoded, Finish, Grid

ARITHMETIC = 3
"""Part of the keys of what is kept of calibration: raised when it is computed differently."""
WHOLE_IN_FLOAT32 = 1 << 24
"""Whole numbers up to this magnitude, and their sums, are exact in float32."""
_WHOLE_IN_BFLOAT16 = 1 << 8  # what reduced-precision kernels multiply without loss
_AT_ONCE = 1 << 17  # elements scaled while they are in the cache
_PRODUCT_AT_ONCE = 1 << 20  # elements of either side of a product likewise
_FEWEST_ROWS = 256  # fewer would slow the product itself


class Operand:
    """One side of a product.

    Args:
        values: The float32 tensor; may be left out where there are codes.
        encoded: Its codes, if it is on a grid.
        lazy: Codes that are made when a product asks for them, a few rows at a time if it can.
    """

    def __init__(
        self, values: Tensor | None = None, encoded: Encoded | None = None, lazy: LazyCodes | None = None
    ) -> None:
        self.values = values
        self.lazy = lazy
        self._encoded = encoded

    @property
    def encoded(self) -> Encoded | None:
        """The codes, or ``None``."""
        if self._encoded is None and self.lazy is not None:
            self._encoded = self.lazy.encoded()
        return self._encoded

    @property
    def dimensions(self) -> int:
        """How many the tensor has."""
        if self.lazy is not None:
            return self.lazy.source.dim()
        return (self.decoded() if self._encoded is None else self._encoded.codes).dim()

    @property
    def grid(self) -> Grid | None:
        """The grid, if it is on one."""
        return (
            self.lazy.grid if self.lazy is not None else None if self._encoded is None else self._encoded.grid
        )

    def decoded(self) -> Tensor:
        """The values."""
        if self.values is None:
            if self.encoded is None:
                raise ValueError("an operand needs values or codes")
            self.values = self.encoded.decoded()
        return self.values

    @cached_property
    def row_bounds(self) -> tuple[int, int, int]:
        """Largest sum of magnitudes of a row of codes, and of each half of the rows, for a weight."""
        if self.encoded is None:
            raise ValueError("an operand without codes has no bound")
        rows = self.encoded.codes.abs().double()
        half = rows.shape[-1] // 2
        parts = rows[..., :half].sum(dim=-1), rows[..., half:].sum(dim=-1)
        return tuple(int(sums.max()) for sums in (parts[0] + parts[1], *parts))  # type: ignore[return-value]

    @cached_property
    def in_bytes(self) -> Tensor | None:
        """The codes of a weight in one byte each, where this machine multiplies such without loss."""
        return None if self.encoded is None else as_bytes(self.encoded)

    def along(self, axis: int) -> Encoded | None:
        """The codes with one step along the dimension that is summed over; ``None`` if there are none."""
        return None if self.encoded is None else self.encoded.along(axis)


@dataclass(frozen=True)
class LazyCodes:
    """How to make the codes of a tensor that shares one step.

    Attributes:
        source: The tensor.
        grid: The grid.
        limits: Smallest and largest code, where values may lie beyond.
    """

    source: Tensor
    grid: Grid
    limits: tuple[float, float] | None = None

    def encoded(self) -> Encoded:
        """All codes."""
        return Encoded(self.write(self.source, torch.empty_like(self.source)), self.grid)

    def write(self, part: Tensor, codes: Tensor) -> Tensor:
        """The codes of a part of the source, which may be written to ``codes``."""
        inverse = float(np.float32(1) / np.float32(self.grid.step))
        found = one_pass.quantized(part, inverse, self.limits or (-math.inf, math.inf))
        if found is not None:
            return found
        torch.mul(part, inverse, out=codes)
        codes.round_()
        return codes if self.limits is None else codes.clamp_(*self.limits)


def linear(left: Operand, right: Operand, bias: Tensor | None, finish: Finish | None = None) -> Tensor:
    """``x @ w.T + bias`` for ``x`` of shape ``(..., inputs)`` and ``w`` of shape ``(outputs, inputs)``.

    Args:
        left: ``x``.
        right: ``w``.
        bias: Of shape ``(outputs,)``.
        finish: Applied where the product is computed a part at a time.

    Returns:
        Shape ``(..., outputs)``, float32.
    """
    w = right.along(-1)
    if w is right.encoded and w is not None and w.grid.factors is None and left.lazy is not None:
        found = _linear_in_cache(left.lazy, right, bias, finish)
        if found is not None:
            return found
    x = left.along(-1)
    if x is None or w is None or not _fold(x.grid, w.grid) or x.codes.dim() < 2:
        return in_float64(F.linear, left.decoded(), right.decoded(), bias)
    with _full_precision(x.codes):
        # Of a weight the codes are at hand, so the bound need not suppose that all are the largest.
        rows = right.row_bounds if w is right.encoded else Operand(encoded=w).row_bounds
        whole, *halves = (x.grid.largest * row for row in rows)
        total = _summed(F.linear, x, w, whole, max(halves))
    return _scaled(total, x.grid.step, _of_outputs(w.grid), bias)


def _linear_in_cache(
    left: LazyCodes, right: Operand, bias: Tensor | None, finish: Finish | None
) -> Tensor | None:
    """The same a few rows at a time, so that codes and sums need no trip to memory; ``None`` if it cannot."""
    x, w = left.source, right.encoded
    if w is None or not x.is_contiguous() or x.dim() < 2 or x.shape[-1] != w.codes.shape[-1]:
        return None
    bound = left.grid.largest * right.row_bounds[0]
    in_bytes = right.in_bytes if left.grid.largest <= BYTE else None
    if in_bytes is None and not _in_float32(bound, max(left.grid.largest, w.grid.largest)):
        return None
    rows, outputs = x.flatten(0, -2), w.codes.shape[0]
    result = torch.empty(len(rows), outputs, device=x.device)
    most = portion(x, _PRODUCT_AT_ONCE) // max(x.shape[-1], outputs)
    at_once = min(max(most, _FEWEST_ROWS), len(rows))
    scratch = torch.empty(at_once, x.shape[-1], device=x.device)
    product = None if in_bytes is None else ByteProduct(in_bytes, at_once)
    with _full_precision(x):
        for part, total in zip(rows.split(at_once), result.split(at_once), strict=True):
            codes = left.write(part, scratch[: len(part)])
            if product is not None and at_once == len(rows):
                scale = _scale(left.grid.step, _of_outputs(w.grid))
                whole = product.scaled(codes, scale, bias)
                if whole is not None:
                    return whole.view(*x.shape[:-1], outputs)
            if product is None:
                torch.mm(codes, w.codes.T, out=total)
            else:
                product.write(codes, total)
            _scaled(total, left.grid.step, _of_outputs(w.grid), bias)
            if finish is not None:
                finish(total)
    return result.view(*x.shape[:-1], outputs)


def _of_outputs(grid: Grid) -> float | Tensor:
    """The steps of a weight's outputs, one number or a vector."""
    return grid.step.reshape(-1) if isinstance(grid.step, Tensor) else grid.step


def matmul(left: Operand, right: Operand) -> Tensor:
    """``a @ b`` for operands of at least two dimensions; others are summed in float64."""
    if min(left.dimensions, right.dimensions) < 2:
        return in_float64(torch.matmul, left.decoded(), right.decoded())
    a, b = left.along(-1), right.along(-2)
    if a is None or b is None or not _fold(a.grid, b.grid) or a.grid.factors is not None:
        return in_float64(torch.matmul, left.decoded(), right.decoded())
    with _full_precision(a.codes):
        largest, length = a.grid.largest * b.grid.largest, a.codes.shape[-1]
        transposed = Encoded(b.codes.mT, b.grid)
        total = _summed(_matmul_transposed, a, transposed, largest * length, largest * -(-length // 2))
    return _scaled(total, a.grid.step, b.grid.step, None)


def convolution(
    func: Callable[..., Tensor],
    left: Operand,
    right: Operand,
    bias: Tensor | None,
    *rest: Any,
    **options: Any,
) -> Tensor:
    """A convolution of ``x`` of shape ``(items, inputs, ...)`` with ``w`` of ``(outputs, inputs, ...)``.

    ``x`` may also be one item, ``(inputs, ...)``.

    Summed in float64 and rounded to the whole number it stands for, so that an algorithm which transforms its
    operands (Winograd, FFT) gives the same sums.
    """
    x, w = left.encoded, right.encoded
    dimensions = (right.decoded() if w is None else w.codes).dim()
    for axis in range(1, dimensions):
        x = None if x is None else x.along(axis - dimensions)
        w = None if w is None else w.along(axis)
    if x is None or w is None or x.grid.factors is not None or w.grid.factors is not None:
        return in_float64(func, left.decoded(), right.decoded(), bias, *rest, **options)
    with _full_precision(x.codes):
        total = func(x.codes.double(), w.codes.double(), None, *rest, **options).round_().float()
    shape = (-1, *[1] * (dimensions - 2))
    steps = w.grid.step.reshape(shape) if isinstance(w.grid.step, Tensor) else w.grid.step
    return _scaled(total, x.grid.step, steps, None if bias is None else bias.view(shape))


def in_float64(func: Callable[..., Tensor], *operands: Any, **options: Any) -> Tensor:
    """``func`` of float32 operands, computed in float64 and rounded once; other types compute as they are."""
    if not any(isinstance(value, Tensor) and value.dtype == torch.float32 for value in operands):
        return func(*operands, **options)
    wide = (value.double() if isinstance(value, Tensor) else value for value in operands)
    return func(*wide, **options).float()


def _matmul_transposed(a: Tensor, b: Tensor) -> Tensor:
    return torch.matmul(a, b.mT)


def _summed(
    product: Callable[[Tensor, Tensor], Tensor], left: Encoded, right: Encoded, whole: int, half: int
) -> Tensor:
    """The exact sums of products of codes along the last dimension of both, rounded to float32.

    Args:
        product: Of two tensors, summed over the last dimension of both.
        left: Codes.
        right: Codes.
        whole: No sum, nor a part of one, is larger in magnitude.
        half: The same of the sums over the first half and over the rest.
    """
    x, w = left.codes, right.codes
    largest = max(left.grid.largest, right.grid.largest)
    if _in_float32(whole, largest):
        return product(x, w)
    if _in_float32(half, largest):
        middle = x.shape[-1] // 2
        # Both parts are whole, so this addition rounds the exact sum once.
        return product(x[..., :middle], w[..., :middle]).add_(product(x[..., middle:], w[..., middle:]))
    return product(x.double(), w.double()).float()


def _in_float32(bound: int, largest: int) -> bool:
    """Whether float32 holds sums within ``bound`` of products of codes up to ``largest``."""
    return bound <= WHOLE_IN_FLOAT32 and (largest <= _WHOLE_IN_BFLOAT16 or not _reduced())


def _reduced() -> bool:
    """Whether kernels may compute products of float32 with fewer bits."""
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:
        # PyTorch has two ways to say it and refuses to tell where they differ: one of them says yes.
        return True


def _fold(left: Grid, right: Grid) -> bool:
    """Whether the factors of both operands cancel, so that the product is one of codes."""
    if left.factors is None or right.factors is None:
        return left.factors is None and right.factors is None
    return torch.equal(1 / left.factors, right.factors) or torch.equal(left.factors, 1 / right.factors)


def _scaled(total: Tensor, left: float | Tensor, right: float | Tensor, bias: Tensor | None) -> Tensor:
    """``total * (left * right) + bias``, in place; two vectors of steps multiply one after the other."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        total.mul_(left)
        scale: float | Tensor = right
    else:
        scale = _scale(left, right)
    if bias is None:
        return total.mul_(scale)
    if (isinstance(scale, Tensor) and scale.dim() > 1) or bias.dim() > 1 or not total.is_contiguous():
        return total.mul_(scale).add_(bias)
    for rows in total.view(-1, total.shape[-1]).split(max(portion(total, _AT_ONCE) // total.shape[-1], 1)):
        rows.mul_(scale).add_(bias)
    return total


def _scale(left: float | Tensor, right: float | Tensor) -> float | Tensor:
    """The product of two steps, of which one at least is a number: taken in float64, rounded once."""
    if not isinstance(left, Tensor):
        return left * right if not isinstance(right, Tensor) else (right.double() * left).float()
    return (left.double() * right).float()


@contextmanager
def _full_precision(codes: Tensor) -> Iterator[None]:
    """No mixed precision, whatever stands around the model."""
    kind = codes.device.type
    if not torch.is_autocast_enabled(kind):
        yield
        return
    with torch.autocast(kind, enabled=False):
        yield
