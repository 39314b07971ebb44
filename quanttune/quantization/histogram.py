"""Histograms without a range given in advance: values are counted by their code in a short float format.

The format is float32 with 11 significant bits in place of 24: sign, the whole exponent, 11 bits less the
leading one. So a bin is at most 2**-10 of a value wide wherever the values lie, from float32's smallest
normal number to its largest: histograms of ``s x`` are those of ``x`` with every value times ``s``, exactly
so for powers of two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

_DROPPED = 24 - 11
CODES = 1 << (32 - _DROPPED)
"""Number of codes of the short format."""


@dataclass(frozen=True)
class Histogram:
    """Sorted distinct values with their counts.

    Args:
        values: Bin centres, ascending, shape ``(bins,)``, float64.
        counts: Elements per bin, shape ``(bins,)``, float64.
    """

    values: np.ndarray
    counts: np.ndarray

    @cached_property
    def prefix_sums(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Running sums of the counts, of the values and of their squares, each of shape ``(bins + 1,)``."""
        moments = (self.counts, self.counts * self.values, self.counts * self.values**2)
        return tuple(np.concatenate([[0.0], np.cumsum(moment)]) for moment in moments)  # type: ignore[return-value]

    @property
    def count(self) -> float:
        """Number of elements."""
        return float(self.counts.sum())

    def magnitudes(self) -> Histogram:
        """The histogram of absolute values."""
        values, where = np.unique(np.abs(self.values), return_inverse=True)
        return Histogram(values, np.bincount(where, weights=self.counts, minlength=len(values)))

    def moment(self, order: int) -> float:
        """The central moment of ``order``; exactly 0 for a constant."""
        if self.values[0] == self.values[-1]:
            return 0.0
        mean = float(self.counts @ self.values) / self.count
        return float(self.counts @ (self.values - mean) ** order) / self.count

    def quantile(self, fraction: float) -> float:
        """The smallest value that at least ``fraction`` of the elements do not exceed."""
        cumulative = np.cumsum(self.counts)
        index = int(np.searchsorted(cumulative, fraction * cumulative[-1] * (1 - 1e-12)))
        return float(self.values[min(index, len(self.values) - 1)])


@dataclass
class CodeCounts:
    """How often each code of the short format occurred; can be merged, and packed into one tensor.

    Args:
        codes: Codes that occurred, ascending, shape ``(bins,)``, int64.
        counts: Values of each of them, shape ``(bins,)``, int64.
    """

    codes: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    counts: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    def part(self, number: int) -> CodeCounts:
        """The counts of one of several tensors that were added together."""
        edges = torch.tensor([number * CODES, (number + 1) * CODES])
        first, last = torch.searchsorted(self.codes, edges).tolist()
        return CodeCounts(self.codes[first:last] - number * CODES, self.counts[first:last])

    @classmethod
    def joined(cls, parts: Sequence[CodeCounts]) -> CodeCounts:
        """The inverse of :meth:`part`."""
        codes = torch.cat([part.codes + number * CODES for number, part in enumerate(parts)])
        return cls(codes, torch.cat([part.counts for part in parts]))

    def merge(self, other: CodeCounts) -> CodeCounts:
        """The counts of both sets of values."""
        codes, where = torch.cat([self.codes, other.codes]).unique(return_inverse=True)
        counts = torch.zeros_like(codes).index_add_(0, where, torch.cat([self.counts, other.counts]))
        return CodeCounts(codes, counts)

    def histogram(self, low: float, high: float) -> Histogram:
        """The signed histogram; no value lies beyond the given bounds."""
        values = np.clip(values_of_codes(self.codes.numpy()), low, high)
        order = np.argsort(values, kind="stable")
        return Histogram(values[order], self.counts.numpy()[order].astype(np.float64))

    def packed(self) -> Tensor:
        """Codes and counts, int64, shape ``(2, bins)``."""
        return torch.stack([self.codes, self.counts])


def short_codes(values: Tensor) -> Tensor:
    """The code of each value, rounded to the nearest, ties to even.

    Args:
        values: Finite, any shape and floating-point type; what float32 cannot hold counts as its largest.

    Returns:
        The leading bits of the rounded float32, in ``[0, CODES)``, int32, flat.
    """
    bits = values.detach().to(torch.float32).contiguous().view(torch.int32).view(-1)
    # The bit that decides ties, then half of what is dropped less one: round half to even in integers.
    codes = torch.bitwise_right_shift(bits, _DROPPED).bitwise_and_(1)
    codes.add_(bits).add_((1 << (_DROPPED - 1)) - 1)
    return codes.bitwise_right_shift_(_DROPPED).bitwise_and_(CODES - 1)


def values_of_codes(codes: np.ndarray) -> np.ndarray:
    """The value of each code, float64 of the same shape; infinite for what the largest values round up to."""
    return (codes.astype(np.uint32) << _DROPPED).view(np.float32).astype(np.float64)


def cell_edges(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the values that are counted at a bin centre begin and end: half a unit in the last place around.

    Args:
        values: Bin centres, shape ``(bins,)``; below float32's normal numbers as if there were smaller ones.

    Returns:
        Both ends, each of shape ``(bins,)``; both are zero for zero.
    """
    mantissa, exponent = np.frexp(values)
    outer = np.ldexp(0.5, exponent - 11) * (values != 0)
    # Below a power of two neighbours are half as far.
    inner = np.where(np.abs(mantissa) == 0.5, outer / 2, outer)
    return values - np.where(values < 0, outer, inner), values + np.where(values < 0, inner, outer)
