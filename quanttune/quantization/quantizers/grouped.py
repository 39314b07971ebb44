"""One scale for every few consecutive inputs of an output channel."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from quanttune.quantization.quantizers.quantizer import QUANTIZERS, Quantizer, State, straight_through
from quanttune.quantization.quantizers.uniform import asymmetric_scale, symmetric_scale


@QUANTIZERS.register("grouped")
class GroupQuantizer(Quantizer):
    """Equidistant levels ``scale * (code - zero_point)`` per output channel and group of inputs.

    A weight of shape ``(outputs, ...)`` is seen as ``(outputs, inputs)``; group ``g`` holds the inputs ``g *
    size`` to ``(g + 1) * size - 1``, and the last group what is left. Codes and rounding are those of
    :class:`~quanttune.quantization.quantizers.UniformQuantizer`. Gradients pass straight through.

    Args:
        scale: Steps, positive, shape ``(outputs, groups)``.
        zero_point: Codes of zero, integer valued, same shape.
        code_min: Smallest code.
        code_max: Largest code.
        size: Inputs in a group.

    Raises:
        ValueError: If a scale is not positive and finite, or the shapes differ.
    """

    kind: ClassVar[str] = "grouped"
    scales: ClassVar[tuple[str, ...]] = ("scale",)

    def __init__(self, scale: Tensor, zero_point: Tensor, code_min: int, code_max: int, size: int) -> None:
        if scale.dim() != 2 or zero_point.shape != scale.shape:
            raise ValueError(
                f"scales and zero points {tuple(scale.shape)} and {tuple(zero_point.shape)} "
                "of a grouped quantizer must both be (outputs, groups)"
            )
        if not bool((scale > 0).all() and torch.isfinite(scale.to(torch.float32)).all()):
            raise ValueError("quantizer scales must be positive and finite; check the weight")
        self.scale = scale.to(torch.float32).clamp(min=torch.finfo(torch.float32).tiny)
        self.zero_point = zero_point.to(torch.int32)
        self.code_min, self.code_max, self.size = code_min, code_max, size

    @classmethod
    def of_weight(cls, weight: Tensor, bits: int, size: int, symmetric: bool = True) -> GroupQuantizer:
        """The min-max quantizer of a weight; a group of zeros gets the range 1.

        A row shorter than ``size`` is one group.
        """
        rows = weight.detach().flatten(1)
        size = min(size, max(1, rows.shape[1]))
        groups = _grouped(rows, size)
        # aminmax along a dimension takes twenty times as long on a CPU
        low, high = groups.amin(dim=-1).double().cpu(), groups.amax(dim=-1).double().cpu()
        if symmetric:
            scale, code_max = symmetric_scale(torch.maximum(low.abs(), high.abs()), bits)
            return cls(scale, torch.zeros_like(scale), -code_max, code_max, size)
        scale, zero_point, code_max = asymmetric_scale(low, high, bits)
        return cls(scale, zero_point, 0, code_max, size)

    @property
    def low(self) -> Tensor:
        """Smallest representable value, shape of ``scale``."""
        return (self.code_min - self.zero_point) * self.scale

    @property
    def high(self) -> Tensor:
        """Largest representable value, shape of ``scale``."""
        return (self.code_max - self.zero_point) * self.scale

    def __call__(self, values: Tensor) -> Tensor:
        """Quantize and dequantize a weight of the shape that the scales were made for."""
        exact = values.detach()
        rows = exact.float().flatten(1)
        scale = self.scale.to(values.device)[..., None]
        zero = self.zero_point.to(values.device)[..., None]
        codes = (_grouped(rows, self.size) * (1 / scale)).round_()
        torch.maximum(codes, self.code_min - zero, out=codes)
        grouped = torch.minimum(codes, self.code_max - zero, out=codes).mul_(scale)
        quantized = grouped.flatten(1)[:, : rows.shape[1]].reshape(values.shape).to(values.dtype)
        return straight_through(values, quantized)

    def state(self) -> State:
        """Scales, zero points, codes and the size of a group."""
        settings = {"code_min": self.code_min, "code_max": self.code_max, "size": self.size}
        return State(self.kind, settings, {"scale": self.scale.cpu(), "zero_point": self.zero_point.cpu()})

    @classmethod
    def from_state(cls, state: State) -> GroupQuantizer:
        """The inverse of :meth:`state`."""
        return cls(state.tensors["scale"], state.tensors["zero_point"], **state.settings)

    def __repr__(self) -> str:
        codes = f"codes {self.code_min}..{self.code_max}"
        return f"GroupQuantizer(groups of {self.size}, {codes}, scale max {float(self.scale.max()):.4g})"


def _grouped(rows: Tensor, size: int) -> Tensor:
    """``(outputs, groups, size)``; what a last group lacks is filled with zeros, which change no range."""
    missing = -rows.shape[1] % size
    return F.pad(rows, (0, missing)).unflatten(1, (-1, size))
