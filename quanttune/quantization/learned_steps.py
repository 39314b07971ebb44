"""Steps that are learned with the weights (LSQ, arXiv 1902.08153; LSQ+, 2004.09576).

A quantizer with step ``s`` and codes ``-Q_n .. Q_p`` gives ``s * round(clip(x / s, -Q_n, Q_p))``. Rounding
passes gradients straight through, so that (equations 3 and 5 of LSQ)::

    d/ds = round(x / s) - x / s    -Q_n < x / s < Q_p        d/dx = 1 inside, 0 outside
         = -Q_n                    x / s <= -Q_n
         = Q_p                     x / s >= Q_p

and the step's gradient is multiplied by ``g = 1 / sqrt(N * Q_p)`` (section 2.2). With an offset ``b`` (LSQ+,
equations 6 and 7), ``x - b`` takes the place of ``x`` and ``d/db`` is 0 inside and 1 outside.

Ours: what is learned is the logarithm of a step's ratio to its first value, so that no step can become
negative, and a rate of 1e-3 moves steps of every magnitude by a thousandth. The offset is learned in ranges
of the first quantizer and rounded to a whole number of steps, because zero is a level of our quantizers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quanttune.quantization.quantizers import GroupQuantizer, UniformQuantizer
from quanttune.quantization.quantizers.grid import significant

Learnable = UniformQuantizer | GroupQuantizer
"""Quantizers whose steps can be learned."""

_SHORT = (torch.float16, torch.bfloat16)
_AT_ONCE = 1 << 16  # elements that stay in the cache through all passes


class LearnedRounding(torch.autograd.Function):
    """``s * (clip(round(x / s) + z, low, high) - z)`` with the gradients of LSQ; of LSQ+ with an offset.

    Example:
        >>> values = torch.tensor([0.3, 9.0], requires_grad=True)
        >>> step = torch.tensor(0.5, requires_grad=True)
        >>> LearnedRounding.apply(values, step, None, None, -7, 7, 1.0).sum().backward()
        >>> values.grad.tolist(), round(float(step.grad), 6)  # 7, and 1 - 0.6
        ([1.0, 0.0], 7.4)
    """

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        step: Tensor,
        zero: Tensor | None,
        offset: Tensor | None,
        low: int,
        high: int,
        factor: float,
    ) -> Tensor:
        """Quantize and dequantize.

        Args:
            ctx: What the gradients need.
            values: Of any shape.
            step: Positive, broadcast against the values.
            zero: Zero points, whole numbers of the step's shape; ``None`` for 0.
            offset: What the zero points were made from, of the step's shape, if its gradient is wanted.
            low: Smallest code.
            high: Largest code.
            factor: Multiplies the gradients of step and offset.
        """
        values = values.contiguous()
        quantized = torch.empty_like(values)
        inside = torch.empty_like(values, dtype=torch.bool)
        slope = torch.empty_like(values)
        for (x, result, within, slopes), s, z in _parts([values, quantized, inside, slope], step, zero):
            least: Any = low if z is None else low - z
            most: Any = high if z is None else high - z
            exact = x * (1 / s)
            torch.logical_and(exact > least, exact < most, out=within)
            codes = exact.round().clamp_(least, most)
            torch.mul(codes, s, out=result)
            # Inside, what rounding adds; outside, the code of the end. The zero point of an offset that is
            # learned moves with the step, so that the end is counted from the offset.
            end = codes if offset is None or z is None else codes + (z - low)
            torch.where(within, torch.sub(codes, exact, out=exact), end, out=slopes)
        ctx.save_for_backward(inside, slope)
        ctx.shape, ctx.factor, ctx.has_offset = step.shape, factor, offset is not None
        return quantized

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Of the values, the step and the offset."""
        inside, slope = ctx.saved_tensors
        through = gradient * inside
        of_step = of_offset = None
        if ctx.needs_input_grad[1]:
            of_step = _summed(gradient, slope, ctx.shape).mul_(ctx.factor)
        if ctx.has_offset:
            of_offset = (gradient - through).sum_to_size(ctx.shape).mul_(ctx.factor)
        return through, of_step, None, of_offset, None, None, None


def _parts(
    tensors: list[Tensor], step: Tensor, zero: Tensor | None
) -> Iterator[tuple[list[Tensor], Tensor, Tensor | None]]:
    """Parts of contiguous tensors of one shape that fit into the cache, with their steps and zero points."""
    count, steps = tensors[0].numel(), step.numel()
    if tensors[0].is_cuda or count <= _AT_ONCE:
        yield tensors, step, zero
    elif steps == 1:
        shared = None if zero is None else zero.view(())
        for parts in zip(*(tensor.view(-1).split(_AT_ONCE) for tensor in tensors), strict=True):
            yield list(parts), step.view(()), shared
    elif steps == step.shape[0] == tensors[0].shape[0]:
        matrices = [tensor.view(steps, -1) for tensor in tensors]
        rows = max(1, _AT_ONCE * steps // count)
        for start in range(0, steps, rows):
            part = slice(start, start + rows)
            zeros = None if zero is None else zero.view(-1, 1)[part]
            yield [matrix[part] for matrix in matrices], step.view(-1, 1)[part], zeros
    else:
        yield tensors, step, zero


def _summed(left: Tensor, right: Tensor, shape: torch.Size) -> Tensor:
    """The sum of products over the dimensions that ``shape`` lacks."""
    if math.prod(shape) == 1:
        return torch.dot(left.reshape(-1), right.reshape(-1)).view(shape)
    return (left * right).sum_to_size(shape)


class LearnedSteps(nn.Module):
    """A quantizer whose steps, and offsets where it is asymmetric, are parameters.

    Args:
        quantizer: What it begins as.
        elements: ``N`` of the gradients' factor: values that share a step, of an activation those of an item.
        learn_offset: Whether zero points are learned, too.
    """

    def __init__(self, quantizer: Learnable, elements: int, learn_offset: bool = True) -> None:
        super().__init__()
        self._low, self._high = quantizer.code_min, quantizer.code_max
        self._of = quantizer
        symmetric = self._low == -self._high
        self.register_buffer("first", quantizer.scale.clone())
        self.register_buffer("first_zero", quantizer.zero_point.float())
        self.log_ratio = nn.Parameter(torch.zeros_like(self.first))
        learns = learn_offset and not symmetric
        self.shift = nn.Parameter(torch.zeros_like(self.first)) if learns else None
        self._levels = self._high if symmetric else self._high - self._low
        self._is_centred = symmetric and not bool(quantizer.zero_point.any())
        self.factor = 1 / math.sqrt(elements * self._levels)

    first: Tensor
    first_zero: Tensor

    @property
    def step(self) -> Tensor:
        """The present steps; positive, whatever the parameter is."""
        return self.first * self.log_ratio.exp()

    @property
    def offset(self) -> Tensor | None:
        """The present offsets, the value of the smallest code; ``None`` where they are not learned."""
        if self.shift is None:
            return None
        return self.first * (self._levels * self.shift - self.first_zero + self._low)

    def zero_point(self) -> Tensor:
        """The present zero points, whole numbers between the smallest and the largest code."""
        offset = self.offset
        if offset is None:
            return self.first_zero
        exact = self._low - offset.detach() / self.step.detach()
        return exact.round_().clamp_(self._low, self._high)

    def forward(self, values: Tensor) -> Tensor:
        """Quantize and dequantize."""
        if values.dtype in _SHORT:
            return self(values.float()).to(values.dtype)
        step, offset = self.step, self.offset
        zero = None if self._is_centred else self.zero_point()
        if isinstance(self._of, GroupQuantizer):
            rows = values.flatten(1)
            padded = F.pad(rows, (0, -rows.shape[1] % self._of.size)).unflatten(1, (-1, self._of.size))
            shape = (*step.shape, 1)
            quantized = self._rounded(padded, step, zero, offset, shape)
            return quantized.flatten(1)[:, : rows.shape[1]].reshape(values.shape)
        shape = () if self._of.axis is None else _along(values.dim(), self._of.axis)
        return self._rounded(values, step, zero, offset, shape)

    def _rounded(
        self, values: Tensor, step: Tensor, zero: Tensor | None, offset: Tensor | None, shape: tuple[int, ...]
    ) -> Tensor:
        vectors = (None if each is None else each.view(shape) for each in (step, zero, offset))
        rounded: Tensor = LearnedRounding.apply(values, *vectors, self._low, self._high, self.factor)
        return rounded

    @torch.no_grad()
    def quantizer(self) -> Learnable:
        """What it has become, with steps of 16 significant bits."""
        scale, zero = significant(self.step.double().cpu()), self.zero_point().cpu()
        if isinstance(self._of, GroupQuantizer):
            return GroupQuantizer(scale, zero, self._low, self._high, self._of.size)
        return UniformQuantizer(scale, zero, self._low, self._high, self._of.axis)


def _along(dimensions: int, axis: int) -> tuple[int, ...]:
    shape = [1] * dimensions
    shape[axis] = -1
    return tuple(shape)
