"""What a quantizer is to ONNX: a scale, a zero point and a range of codes; or why it has no such form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from quanttune.errors import ConfigError
from quanttune.quantization.quantizers import Quantizer, ScaledQuantizer, UniformQuantizer
from quanttune.quantization.sites import SiteId

OFFSET = 128
"""Signed codes are stored in unsigned bytes with this zero point: runtimes have integer kernels for those."""
_BYTE = 255
_RANGES = {
    "softmax": (0.0, 1.0),
    "relu": (0.0, np.inf),
    "gelu": (-0.17, np.inf),
    "silu": (-0.2785, np.inf),
    "tanh": (-1.0, 1.0),
}
"""Between which numbers an operation's results lie."""


@dataclass(frozen=True)
class Levels:
    """Levels ``scale * (code - zero_point)`` of codes in a byte.

    Attributes:
        scale: Step, float32, of shape ``()``, or ``(channels,)`` with ``axis``.
        zero_point: Code of zero, of the same shape, as the byte holds it.
        low: Smallest code in use.
        high: Largest code in use.
        axis: Dimension of the channels.
        factors: What the tensor is divided by before, and multiplied by afterwards; ``(channels,)`` of the
            last dimension.
    """

    scale: np.ndarray
    zero_point: np.ndarray
    low: int
    high: int
    axis: int | None = None
    factors: np.ndarray | None = None

    def clips(self, operation: str, operand: str) -> tuple[int, int] | None:
        """Between which codes to clip, ``None`` if the byte itself keeps values within those in use.

        Args:
            operation: What made the tensor or reads it.
            operand: Which tensor of it: what is known of results is used.
        """
        low, high = _RANGES.get(operation, (-np.inf, np.inf)) if operand == "output" else (-np.inf, np.inf)
        step, zero = float(self.scale), int(self.zero_point)
        # One code more at either end: values are rounded, and bounds are.
        lowest = max(0.0, np.floor(low / step) + zero) if np.isfinite(low) else 0.0
        highest = min(float(_BYTE), np.ceil(high / step) + zero) if np.isfinite(high) else float(_BYTE)
        return None if lowest >= self.low and highest <= self.high else (self.low, self.high)


def activation_levels(site_id: str, quantizer: Quantizer) -> Levels:
    """The levels of an activation.

    Raises:
        ConfigError: If ONNX cannot express the quantizer, naming it.
    """
    inner, factors = _inner(site_id, quantizer)
    if inner.axis is not None:
        raise _refused(site_id, "a range for each channel, of which runtimes make no integer product")
    offset = _offset(site_id, inner)
    scale = np.asarray(inner.scale.cpu().numpy(), dtype=np.float32)
    zero_point = np.asarray(inner.zero_point.cpu().numpy() + offset, dtype=np.uint8)
    return Levels(scale, zero_point, inner.code_min + offset, inner.code_max + offset, None, factors)


def weight_levels(site_id: str, quantizer: Quantizer, unsigned: bool = False) -> Levels:
    """The levels of a weight: signed codes as ``int8``, or as ``uint8`` with zero point 128.

    Args:
        site_id: Its site.
        quantizer: Its quantizer.
        unsigned: Whether signed codes are stored as ``uint8``.

    Raises:
        ConfigError: If ONNX cannot express the quantizer, naming it.
    """
    inner, factors = _inner(site_id, quantizer)
    signed = _offset(site_id, inner) != 0
    offset = OFFSET if signed and unsigned else 0
    scale = np.asarray(inner.scale.cpu().numpy(), dtype=np.float32)
    kind = np.int8 if signed and not unsigned else np.uint8
    zero_point = np.asarray(inner.zero_point.cpu().numpy() + offset, dtype=kind)
    return Levels(scale, zero_point, inner.code_min + offset, inner.code_max + offset, inner.axis, factors)


def weight_codes(site_id: str, quantizer: Quantizer, weight: Tensor, levels: Levels) -> np.ndarray:
    """The codes of a weight by the quantizer's own arithmetic, in the type of the levels' zero point."""
    encoded = quantizer.encode(weight)
    if encoded is None:
        raise _refused(site_id, f"the codes of a {quantizer.kind} quantizer are not to be had")
    shape = [1] * weight.dim()
    if levels.axis is not None:
        shape[levels.axis] = -1
    codes = encoded.codes.numpy().astype(np.int32) + levels.zero_point.astype(np.int32).reshape(shape)
    return np.ascontiguousarray(codes.astype(levels.zero_point.dtype))


def require_expressible(quantizers: Mapping[str, Quantizer]) -> None:
    """Refuse quantizers that ONNX cannot express, before any work.

    Raises:
        ConfigError: Naming the kind, the first site of it and their number.
    """
    refused: dict[str, ConfigError] = {}
    for site_id, quantizer in quantizers.items():
        try:
            is_weight = SiteId.parse(site_id).operand == "weight"
            # A parameter in a matrix product may have a range for each of its outputs.
            per_channel = is_weight or SiteId.parse(site_id).operation == "matmul"
            (weight_levels if per_channel else activation_levels)(site_id, quantizer)
        except ConfigError as error:
            refused[site_id] = error
    if refused:
        first = next(iter(refused.values()))
        others = f"; {len(refused)} of {len(quantizers)} sites are like it" if len(refused) > 1 else ""
        raise ConfigError(f"{first}{others}; export a method with uniform quantizers, such as quanttune")


def _inner(site_id: str, quantizer: Quantizer) -> tuple[UniformQuantizer, np.ndarray | None]:
    factors = None
    if isinstance(quantizer, ScaledQuantizer):
        if quantizer.axis != -1:
            raise _refused(site_id, "factors along another dimension than the last")
        factors = np.asarray(quantizer.factors.cpu().numpy(), dtype=np.float32)
        quantizer = quantizer.inner
    # Of this very kind: what is derived from it may compute something else.
    if type(quantizer) is not UniformQuantizer:
        raise _refused(site_id, f"a {quantizer.kind} quantizer, which QuantizeLinear cannot express")
    return quantizer, factors


def _offset(site_id: str, inner: UniformQuantizer) -> int:
    offset = OFFSET if inner.code_min < 0 else 0
    if inner.code_min + offset < 0 or inner.code_max + offset > _BYTE:
        raise _refused(site_id, f"codes {inner.code_min} to {inner.code_max}, which no byte holds")
    return offset


def _refused(site_id: str, what: str) -> ConfigError:
    return ConfigError(f"no export to ONNX: site {site_id} has {what}")
