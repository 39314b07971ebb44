"""Equidistant levels, per tensor or per channel."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from quanttune.quantization import one_pass
from quanttune.quantization.quantizers.grid import Encoded, Grid, quotient, significant
from quanttune.quantization.quantizers.quantizer import QUANTIZERS, Quantizer, State

_SHORT = (torch.float16, torch.bfloat16)
_AT_ONCE = 1 << 17


@QUANTIZERS.register("uniform")
class UniformQuantizer(Quantizer):
    """Equidistant levels ``scale * (code - zero_point)``, per tensor or per channel.

    Symmetric signed quantizers use the narrow codes ``-(2**(bits-1)-1) .. 2**(bits-1)-1``, asymmetric ones
    ``0 .. 2**bits-1``; zero is always a level. Rounding is to nearest, ties to even. Gradients pass straight
    through inside the range and are zero outside.

    Args:
        scale: Step in the tensor's unit, positive; scalar, or shape ``(channels,)`` with ``axis``.
        zero_point: Code of zero, integer valued, same shape as ``scale``.
        code_min: Smallest code.
        code_max: Largest code.
        axis: Channel dimension of a per-channel quantizer.

    Raises:
        ValueError: If a scale is not positive and finite, or ``axis`` does not fit its shape.
    """

    kind: ClassVar[str] = "uniform"
    scales: ClassVar[tuple[str, ...]] = ("scale",)

    def __init__(
        self, scale: Tensor, zero_point: Tensor, code_min: int, code_max: int, axis: int | None = None
    ) -> None:
        if scale.dim() != (0 if axis is None else 1):
            raise ValueError(f"a scale of shape {tuple(scale.shape)} does not fit axis {axis}")
        if zero_point.shape != scale.shape:
            shapes = f"{tuple(zero_point.shape)} and {tuple(scale.shape)}"
            raise ValueError(f"zero point and scale differ in shape: {shapes}")
        if not bool((scale > 0).all() and torch.isfinite(scale.to(torch.float32)).all()):
            raise ValueError(
                "quantizer scales must be positive and finite; check the range they were made from"
            )
        # Below float32's smallest normal number a scale has no finite inverse, and zero would become NaN.
        self.scale = scale.to(torch.float32).clamp(min=torch.finfo(torch.float32).tiny)
        self.zero_point = zero_point.to(torch.int32)
        self.code_min, self.code_max, self.axis = code_min, code_max, axis
        # Python floats keep the per-tensor path free of tiny tensor operations.
        self._step = float(self.scale) if axis is None else 1.0
        self._inverse = float(np.float32(1) / np.float32(self._step))
        self._zero = int(self.zero_point) if axis is None else 0
        ends = (self.code_min - self.zero_point, self.code_max - self.zero_point)
        self._largest = max(int(end.abs().max()) for end in ends)

    @classmethod
    def symmetric(cls, limit: Tensor | float, bits: int, axis: int | None = None) -> UniformQuantizer:
        """Signed codes over ``[-limit, limit]``; an all-zero tensor (limit 0) gets the limit 1."""
        scale, code_max = symmetric_scale(torch.as_tensor(limit, dtype=torch.float64), bits)
        return cls(scale, torch.zeros_like(scale), -code_max, code_max, axis)

    @classmethod
    def asymmetric(
        cls, low: Tensor | float, high: Tensor | float, bits: int, axis: int | None = None
    ) -> UniformQuantizer:
        """Unsigned codes over ``[low, high]``, widened to hold zero; the zero point is rounded to a code."""
        low, high = torch.as_tensor(low, dtype=torch.float64), torch.as_tensor(high, dtype=torch.float64)
        scale, zero_point, code_max = asymmetric_scale(low, high, bits)
        return cls(scale, zero_point, 0, code_max, axis)

    def state(self) -> State:
        """Scales, zero points, codes and axis."""
        settings = {"code_min": self.code_min, "code_max": self.code_max, "axis": self.axis}
        return State(self.kind, settings, {"scale": self.scale.cpu(), "zero_point": self.zero_point.cpu()})

    @classmethod
    def from_state(cls, state: State) -> UniformQuantizer:
        """The inverse of :meth:`state`."""
        return cls(state.tensors["scale"], state.tensors["zero_point"], **state.settings)

    @property
    def low(self) -> Tensor:
        """Smallest representable value, shape of ``scale``."""
        return (self.code_min - self.zero_point) * self.scale

    @property
    def high(self) -> Tensor:
        """Largest representable value, shape of ``scale``."""
        return (self.code_max - self.zero_point) * self.scale

    def __call__(self, values: Tensor) -> Tensor:
        """Quantize and dequantize ``values``; a per-channel quantizer needs its channel count on ``axis``."""
        if values.dtype in _SHORT:
            return self(values.float()).to(values.dtype)  # codes of 8 bits and more need the longer mantissa
        if torch.is_grad_enabled() and values.requires_grad:
            return self._with_gradient(values)
        if self.axis is None:
            found = one_pass.quantized(values, self._inverse, self.shared_limits, self._step)
            if found is not None:
                return found
        return self.encode(values).decoded(reuse=True)

    def encode(self, values: Tensor) -> Encoded:
        """Codes less the zero point."""
        if self.axis is None:
            # In-cache passes: several times faster on a CPU than the fused kernel, bit for bit the same.
            codes = one_pass.quantized(values, self._inverse, self.shared_limits)
            if codes is None:
                codes = (values * self._inverse).round_().clamp_(*self.shared_limits)
            return Encoded(codes, Grid(self._step, self._largest))
        shape = [1] * values.dim()
        shape[self.axis] = -1
        scale = self.scale.to(values.device).view(shape)
        zero = self.zero_point.to(values.device).view(shape)
        codes = (values * (1 / scale)).round_()
        # In place: a weight may be half a gigabyte.
        torch.maximum(codes, self.code_min - zero, out=codes)
        torch.minimum(codes, self.code_max - zero, out=codes)
        return Encoded(codes, Grid(scale, self._largest))

    @property
    def shared_grid(self) -> Grid | None:
        """The grid of a per-tensor quantizer; its codes are those less the zero point."""
        return Grid(self._step, self._largest) if self.axis is None else None

    @property
    def shared_limits(self) -> tuple[int, int]:
        """Smallest and largest code of a per-tensor quantizer, less the zero point."""
        return self.code_min - self._zero, self.code_max - self._zero

    def quantize_in_place(self, values: Tensor) -> Grid | None:
        """A part of the values at a time, all four passes while it is in the cache; of no use on a GPU."""
        grid = self.shared_grid
        if grid is None or not values.is_contiguous() or values.device.type != "cpu":
            return None
        for part in values.view(-1).split(_AT_ONCE):
            part.mul_(self._inverse).round_().clamp_(*self.shared_limits).mul_(self._step)
        return grid

    def quantize_nearly_known(
        self, values: Tensor, error: float, exactly: Callable[[Tensor], Tensor], target: Tensor
    ) -> Grid | None:
        """:meth:`quantize_in_place` of numbers known up to an error, with the codes of the true ones.

        Where a number is so close to the middle between two codes that the error could decide, it is asked
        for again.

        Args:
            values: The numbers as far as they are known; contiguous, on a CPU, overwritten.
            error: The largest difference from the true ones, the rounding of both to float32 included.
            exactly: Gives the true ones at indices into the flattened values, as float32.
            target: Where to write, in the shape of ``values``.
        """
        numbers = values.view(-1).mul_(self._inverse)
        codes = target.view(-1)
        torch.round(numbers, out=codes)
        far = numbers.sub_(codes).abs_()
        close = (far > 0.5 - error * self._inverse).nonzero().view(-1)
        if len(close):
            codes[close] = exactly(close).mul_(self._inverse).round_()
        codes.clamp_(*self.shared_limits).mul_(self._step)
        return self.shared_grid

    def _with_gradient(self, values: Tensor) -> Tensor:
        if self.axis is None:
            found = torch.fake_quantize_per_tensor_affine(
                values, self._step, self._zero, self.code_min, self.code_max
            )
        else:
            found = torch.fake_quantize_per_channel_affine(
                values,
                self.scale.to(values.device),
                self.zero_point.to(values.device),
                self.axis,
                self.code_min,
                self.code_max,
            )
        # Both make the smallest code of NaN.
        return torch.where(values.isnan(), values, found)

    def __repr__(self) -> str:
        kind = "per tensor" if self.axis is None else f"per channel {self.axis}"
        codes = f"codes {self.code_min}..{self.code_max}"
        return f"UniformQuantizer({kind}, {codes}, scale max {float(self.scale.max()):.4g})"


def symmetric_scale(limit: Tensor, bits: int) -> tuple[Tensor, int]:
    """Steps and the largest code of signed codes over ``[-limit, limit]``; a limit of 0 counts as 1.

    Steps keep :data:`~quanttune.quantization.quantizers.grid.RANGE_BITS` significant bits.
    """
    code_max = 2 ** (bits - 1) - 1
    return significant(quotient(torch.where(limit == 0, 1.0, limit), code_max)), code_max


def asymmetric_scale(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor, int]:
    """Steps, zero points and the largest code of unsigned codes over a range, widened to hold zero.

    The range and the steps keep :data:`~quanttune.quantization.quantizers.grid.RANGE_BITS` significant bits.
    """
    low, high = significant(low.clamp(max=0)), significant(high.clamp(min=0))
    code_max = 2**bits - 1
    width = high - low
    scale = significant(quotient(torch.where(width == 0, 1.0, width), code_max))
    return scale, torch.round(-low / scale), code_max
