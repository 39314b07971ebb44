"""Integer codes and the step between them: what products on integers are computed from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

RANGE_BITS = 16
"""Significant bits that a range and a step keep: the last digit of what calibration saw decides nothing."""


@dataclass(frozen=True)
class Grid:
    """The values ``code * step * factor`` for integers up to some magnitude; zero is code 0.

    Attributes:
        step: Distance of two neighbours in the tensor's unit: one number, or a float32 tensor that broadcasts
            against the values, with a size of 1 wherever they share it.
        largest: No code is larger in magnitude.
        factors: One more factor for each channel of the last dimension, shape ``(channels,)``.
    """

    step: float | Tensor
    largest: int
    factors: Tensor | None = None

    @property
    def is_shared(self) -> bool:
        """Whether one step holds for every value, so that moving values about changes nothing."""
        return not isinstance(self.step, Tensor) and self.factors is None

    def scaled(self, constant: float) -> Grid:
        """The grid of the values times a constant."""
        return replace(self, step=self.step * constant)


@dataclass(frozen=True)
class Encoded:
    """A tensor on a grid.

    Attributes:
        codes: Integers as float32, in the tensor's shape.
        grid: What they stand for.
    """

    codes: Tensor
    grid: Grid

    def decoded(self, reuse: bool = False) -> Tensor:
        """The values, float32: code times step, times factor where there is one.

        Args:
            reuse: Whether to write over the codes.
        """
        values = self.codes.mul_(self.grid.step) if reuse else self.codes * self.grid.step
        return values if self.grid.factors is None else values.mul_(self.grid.factors.to(values.device))

    def along(self, axis: int) -> Encoded | None:
        """The same values with one step along ``axis``, as a product that sums over it needs.

        Returns:
            ``None`` if the steps there do not differ by powers of two, which codes could take up.
        """
        step = self.grid.step
        if not isinstance(step, Tensor) or step.shape[axis] == 1:
            return self
        base = step.amin(dim=axis, keepdim=True)
        shifts = step / base
        if not bool((torch.frexp(shifts).mantissa == 0.5).all()):
            return None
        largest = self.grid.largest * int(shifts.max())
        return Encoded(self.codes * shifts, replace(self.grid, step=base, largest=largest))


@dataclass
class Finish:
    """Quantizes a result a part at a time, while the part is in the cache.

    Args:
        quantize: Writes the quantized values over a part and says their grid.
        nearly_known: The same for numbers that are known up to an error, if there is such a way; see
            :meth:`.UniformQuantizer.quantize_nearly_known`.

    Attributes:
        grid: The grid, once a part has been quantized; ``None`` means that the result is as it was.
    """

    quantize: Callable[[Tensor], Grid | None]
    nearly_known: Callable[[Tensor, float, Callable[[Tensor], Tensor], Tensor], Grid | None] | None = None
    grid: Grid | None = None

    def __call__(self, part: Tensor) -> None:
        """Quantize a part, in place."""
        self.grid = self.quantize(part)


def on_grid(values: Tensor, grid: Grid) -> Encoded:
    """The codes of values that are on a grid already, up to the rounding of float32."""
    step = grid.step
    codes = values if grid.factors is None else values / grid.factors.to(values.device)
    inverse = 1 / step if isinstance(step, Tensor) else 1 / float(step)
    return Encoded((codes * inverse).round_(), grid)


def significant(values: Tensor, bits: int = RANGE_BITS) -> Tensor:
    """Finite numbers rounded to so many significant bits; ties to even.

    Args:
        values: Float64 of any shape.
        bits: Of the significand, its leading one included.
    """
    mantissa, exponent = torch.frexp(values)
    return torch.ldexp(torch.round(mantissa * 2.0**bits), exponent - bits)


def quotient(values: Tensor, number: float) -> Tensor:
    """``values / number``, rounded once on every device.

    Of a tensor and a number CUDA makes a product with the number's reciprocal, which is rounded twice.

    Args:
        values: Of any shape and floating-point type, which the result has.
        number: What to divide by.
    """
    return values / torch.full((), number, dtype=values.dtype, device=values.device)
