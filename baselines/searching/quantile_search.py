"""The range search of RepQ-ViT (arXiv 2212.08254): three quantiles, and the least squared error wins."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from quanttune.quantization import Histogram, TensorStatistics, UniformQuantizer
from quanttune.quantization.observation import Bounds, Observer
from quanttune.quantization.quantizers.log_sqrt2 import LogSqrt2Quantizer
from quanttune.quantization.ranges import asymmetric_error, symmetric_error

QUANTILES = (0.999, 0.9999, 0.99999)
"""Both ends of a range lie at ``p`` and ``1 - p``."""


def quantile_range(statistics: TensorStatistics, bits: int, symmetric: bool) -> tuple[float, float]:
    """A range rule: see :class:`quanttune.quantization.RangeRule`. Ties go to the smaller quantile.

    Nothing is cut where nothing but zero would be left.
    """
    histogram = statistics.histogram
    ends = [(histogram.quantile(1 - p), histogram.quantile(p)) for p in QUANTILES]
    if symmetric:
        limits = np.array([max(abs(low), abs(high)) for low, high in ends])
        if not limits.any():
            limits = np.array([max(abs(statistics.low), abs(statistics.high))])
        limits = limits[limits > 0] if limits.any() else limits
        limit = float(limits[np.argmin(symmetric_error(histogram.magnitudes(), limits, bits))])
        return -limit, limit
    lows = np.array([min(low, 0.0) for low, _ in ends])
    highs = np.array([max(high, 0.0) for _, high in ends])
    if not (highs - lows).all():
        lows = np.append(lows, min(statistics.low, 0.0))
        highs = np.append(highs, max(statistics.high, 0.0))
    best = int(np.argmin(asymmetric_error(histogram, lows, highs, bits)))
    return float(lows[best]), float(highs[best])


def softmax_scale(histogram: Histogram, bits: int) -> float:
    """The scale of a :class:`LogSqrt2Quantizer`: the quantile with the least squared error."""
    values = torch.from_numpy(histogram.values)
    counts = torch.from_numpy(histogram.counts)
    scales = [min(histogram.quantile(p), 1.0) for p in QUANTILES]
    # Where nearly all probabilities are zero, as behind masks, a quantile may be, too.
    scales = [scale for scale in scales if scale > 0] or [1.0]
    errors = [
        float((counts * (LogSqrt2Quantizer(bits, scale)(values) - values) ** 2).sum()) for scale in scales
    ]
    return scales[errors.index(min(errors))]


def row_ranges(rows: Tensor, bits: int, symmetric: bool, holds_zero: bool = True) -> tuple[Tensor, Tensor]:
    """The range of each row with the least squared error.

    Quantiles are interpolated linearly between the two neighbours in order.

    Args:
        rows: Shape ``(rows, values)``.
        bits: Width.
        symmetric: Whether ranges are symmetric and codes narrow and signed.
        holds_zero: Whether asymmetric ranges are widened to hold zero.

    Returns:
        Lower and upper end, float64, shape ``(rows,)``, on the CPU.
    """
    values = rows.detach().double().sort(dim=1).values
    best_error = best_low = best_high = None
    for p in QUANTILES:
        low, high = _interpolated(values, 1 - p), _interpolated(values, p)
        if symmetric:
            high = torch.maximum(low.abs(), high.abs())
            low = -high
        elif holds_zero:
            low, high = low.clamp(max=0), high.clamp(min=0)
        error = _errors(values, low, high, bits, symmetric)
        if best_error is None or best_low is None or best_high is None:
            best_error, best_low, best_high = error, low, high
            continue
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_low, best_high = torch.where(better, low, best_low), torch.where(better, high, best_high)
    assert best_low is not None  # noqa: S101 - there are quantiles; tells the type checker
    assert best_high is not None  # noqa: S101 - likewise
    return best_low.cpu(), best_high.cpu()


def _interpolated(ordered: Tensor, fraction: float) -> Tensor:
    position = fraction * (ordered.shape[1] - 1)
    below = math.floor(position)
    above = min(below + 1, ordered.shape[1] - 1)
    return ordered[:, below] + (position - below) * (ordered[:, above] - ordered[:, below])


def _errors(values: Tensor, low: Tensor, high: Tensor, bits: int, symmetric: bool) -> Tensor:
    """Squared error of each row when it is quantized over its range, float64."""
    step, zero, code_min, code_max = steps_of(low, high, bits, symmetric)
    step, zero = step[:, None], zero[:, None]
    codes = (torch.round(values / step) + zero).clamp_(code_min, code_max)
    return ((codes - zero) * step - values).square_().sum(dim=1)


def steps_of(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor, int, int]:
    """Steps, whole zero points, and the smallest and largest code; an empty range has step 1."""
    top = 2 ** (bits - 1) - 1 if symmetric else 2**bits - 1
    width = high if symmetric else high - low
    step = torch.where(width > 0, width, float(top)) / top
    zero = torch.zeros_like(step) if symmetric else torch.round(-low / step)
    return step, zero, (-top if symmetric else 0), top


def weight_quantizer_of(
    weight: Tensor, bits: int, symmetric: bool, axis: int, per_channel: bool
) -> UniformQuantizer:
    """The quantizer of a weight, per output channel or for the whole tensor."""
    rows = weight.detach().movedim(axis, 0).flatten(1) if per_channel else weight.detach().reshape(1, -1)
    low, high = row_ranges(rows, bits, symmetric)
    if not per_channel:
        low, high = low[0], high[0]
    if symmetric:
        return UniformQuantizer.symmetric(high, bits, axis if per_channel else None)
    return UniformQuantizer.asymmetric(low, high, bits, axis if per_channel else None)


class Vectors(Observer):
    """Keeps every vector along the last dimension.

    Attributes:
        rows: One tensor a batch, of shape ``(vectors, channels)``, on the CPU.
    """

    def __init__(self) -> None:
        self.rows: list[Tensor] = []

    def update(self, values: Tensor, bounds: Bounds) -> None:
        """Keep a batch."""
        self.rows.append(values.detach().flatten(0, -2).cpu())

    def by_channel(self) -> Tensor:
        """All of them, shape ``(channels, vectors)``."""
        return torch.cat(self.rows).T


def in_parts(sizes: Mapping[str, int], most: int) -> list[Sequence[str]]:
    """Names in order, in as few parts as keep each sum of sizes within a bound; one name may exceed it."""
    parts: list[list[str]] = []
    used = 0
    for name, size in sizes.items():
        if not parts or used + size > most:
            parts.append([])
            used = 0
        parts[-1].append(name)
        used += size
    return list(parts)
