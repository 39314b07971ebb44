"""Ranges computed while the network runs, one for each vector that a product sums over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from quanttune.quantization.quantizers.grid import Encoded, Grid, quotient
from quanttune.quantization.quantizers.quantizer import QUANTIZERS, PlainQuantizer, straight_through

_SHORT = (torch.float16, torch.bfloat16)


@QUANTIZERS.register("dynamic")
class DynamicQuantizer(PlainQuantizer):
    """Min-max of each vector as it comes: a token of an activation, an item of an image.

    Not static quantization: hardware has to find every range at run time. Codes and rounding are those of
    :class:`~quanttune.quantization.quantizers.UniformQuantizer`. Gradients pass straight through.

    Args:
        bits: Width.
        axes: Negative dimensions that share a range.
        symmetric: Whether codes are signed around zero.
    """

    kind: ClassVar[str] = "dynamic"
    parameters: ClassVar[tuple[str, ...]] = ("bits", "axes", "symmetric")

    def __init__(self, bits: int, axes: Sequence[int] = (-1,), symmetric: bool = True) -> None:
        if not axes or any(axis >= 0 for axis in axes):
            raise ValueError(
                f"axes {axes} of a dynamic quantizer must be negative, counted from the last one"
            )
        self.bits, self.axes, self.symmetric = bits, tuple(axes), symmetric

    def __call__(self, values: Tensor) -> Tensor:
        """Quantize and dequantize ``values``."""
        if values.dtype in _SHORT:
            return self(values.float()).to(values.dtype)
        return straight_through(values, self.encode(values.detach()).decoded(reuse=True))

    def encode(self, values: Tensor) -> Encoded:
        """Codes less the zero points, with a step for each vector."""
        tiny = torch.finfo(torch.float32).tiny
        if self.symmetric:
            top = 2 ** (self.bits - 1) - 1
            limit = values.abs().amax(dim=self.axes, keepdim=True)
            scale = quotient(torch.where(limit == 0, 1.0, limit), top).clamp_(min=tiny)
            codes = (values * (1 / scale)).round_().clamp_(-top, top)
        else:
            top = 2**self.bits - 1
            low = values.amin(dim=self.axes, keepdim=True).clamp_(max=0)
            width = values.amax(dim=self.axes, keepdim=True).clamp_(min=0) - low
            scale = quotient(torch.where(width == 0, 1.0, width), top).clamp_(min=tiny)
            zero = (-low / scale).round_()
            codes = (values * (1 / scale)).round_()
            codes = torch.minimum(torch.maximum(codes, -zero), top - zero)
        return Encoded(codes, Grid(scale, top))

    def __repr__(self) -> str:
        kind = "symmetric" if self.symmetric else "asymmetric"
        return f"DynamicQuantizer({self.bits} bits, {kind}, a range over {self.axes})"
