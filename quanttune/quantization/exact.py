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

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from quanttune.quantization.quantizers.grid import Encoded, Grid

WHOLE_IN_FLOAT32 = 1 << 24
"""Whole numbers up to this magnitude, and their sums, are exact in float32."""
_WHOLE_IN_BFLOAT16 = 1 << 8  # what reduced-precision kernels multiply without loss
_AT_ONCE = 1 << 17  # elements scaled while they are in the cache


@dataclass
class Operand:
    """One side of a product.

    Attributes:
        values: The float32 tensor.
        encoded: Its codes, if it is on a grid; ``values`` may then be absent.
    """

    values: Tensor | None = None
    encoded: Encoded | None = None

    def decoded(self) -> Tensor:
        """The values."""
        if self.values is not None:
            return self.values
        if self.encoded is None:
            raise ValueError("an operand needs values or codes")
        return self.encoded.decoded()

    @cached_property
    def row_bounds(self) -> tuple[int, int, int]:
        """Largest sum of magnitudes of a row of codes, and of each half of the rows, for a weight."""
        if self.encoded is None:
            raise ValueError("an operand without codes has no bound")
        rows = self.encoded.codes.abs().double()
        half = rows.shape[-1] // 2
        parts = rows[..., :half].sum(dim=-1), rows[..., half:].sum(dim=-1)
        return tuple(int(sums.max()) for sums in (parts[0] + parts[1], *parts))  # type: ignore[return-value]

    def along(self, axis: int) -> Encoded | None:
        """The codes with one step along the dimension that is summed over; ``None`` if there are none."""
        return None if self.encoded is None else self.encoded.along(axis)


def linear(left: Operand, right: Operand, bias: Tensor | None) -> Tensor:
    """``x @ w.T + bias`` for ``x`` of shape ``(..., inputs)`` and ``w`` of shape ``(outputs, inputs)``."""
    x, w = left.along(-1), right.along(-1)
    if x is None or w is None or not _fold(x.grid, w.grid) or x.codes.dim() < 2:
        return in_float64(F.linear, left.decoded(), right.decoded(), bias)
    with _full_precision(x.codes):
        # Of a weight the codes are at hand, so the bound need not suppose that all are the largest.
        rows = right.row_bounds if w is right.encoded else Operand(encoded=w).row_bounds
        whole, *halves = (x.grid.largest * row for row in rows)
        total = _summed(F.linear, x, w, whole, max(halves))
    steps = w.grid.step.reshape(-1) if isinstance(w.grid.step, Tensor) else w.grid.step
    return _scaled(total, x.grid.step, steps, bias)


def matmul(left: Operand, right: Operand) -> Tensor:
    """``a @ b`` for operands of at least two dimensions; others are summed in float64."""
    a, b = left.along(-1), right.along(-2)
    if a is None or b is None or not _fold(a.grid, b.grid) or a.grid.factors is not None:
        return in_float64(torch.matmul, left.decoded(), right.decoded())
    if min(a.codes.dim(), b.codes.dim()) < 2:
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

    Summed in float64 and rounded to the whole number it stands for, so that an algorithm which transforms its
    operands (Winograd, FFT) gives the same sums.
    """
    x, w = left.encoded, right.encoded
    dimensions = (left.decoded() if x is None else x.codes).dim()
    for axis in range(1, dimensions):
        x = None if x is None else x.along(axis)
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
    reduced = torch.get_float32_matmul_precision() != "highest"
    if not (reduced and max(left.grid.largest, right.grid.largest) > _WHOLE_IN_BFLOAT16):
        if whole <= WHOLE_IN_FLOAT32:
            return product(x, w)
        if half <= WHOLE_IN_FLOAT32:
            middle = x.shape[-1] // 2
            # Both parts are whole, so this addition rounds the exact sum once.
            return product(x[..., :middle], w[..., :middle]).add_(product(x[..., middle:], w[..., middle:]))
    return product(x.double(), w.double()).float()


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
    elif isinstance(left, Tensor) or isinstance(right, Tensor):
        vector, number = (left, right) if isinstance(left, Tensor) else (right, left)
        scale = (vector.double() * number).float()  # type: ignore[union-attr]
    else:
        scale = left * right
    if bias is None:
        return total.mul_(scale)
    if (isinstance(scale, Tensor) and scale.dim() > 1) or bias.dim() > 1 or not total.is_contiguous():
        return total.mul_(scale).add_(bias)
    for rows in total.view(-1, total.shape[-1]).split(max(_AT_ONCE // total.shape[-1], 1)):
        rows.mul_(scale).add_(bias)
    return total


@contextmanager
def _full_precision(codes: Tensor) -> Iterator[None]:
    """No mixed precision, whatever stands around the model."""
    kind = codes.device.type
    if not torch.is_autocast_enabled(kind):
        yield
        return
    with torch.autocast(kind, enabled=False):
        yield
