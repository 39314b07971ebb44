"""Counts of codes, quickly: in half precision where that loses nothing.

Half precision has the significant bits of the short format of :mod:`.histogram` and a narrower exponent. A
tensor times a power of two that takes its largest value to 2**15 therefore rounds to the same significands
down to 2**-14, and its 2**16 codes are counted in a table that stays in the cache, an eighth of that of all
short codes. Smaller values, less than 2**-28 of the largest, are counted likewise among themselves.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quanttune.quantization.histogram import CODES, CodeCounts, short_codes

_FEW = 1 << 12  # values that are sorted faster than a table is laid out
_HALVES = 1 << 16
_SIGN, _SHORT_SIGN = 1 << 15, CODES >> 1
_UNIT = 1 << 10  # codes of one exponent, in both formats
_EXPONENTS = (-96, 128)  # of the largest value, where every code of half precision has a short one
_MANY_TOKENS = 1 << 17
_MOST = (1 << 31) - 1  # that a count in a table can be


class Tally:
    """Counts of what was added so far.

    Args:
        counts: Counts to begin with.
    """

    def __init__(self, counts: CodeCounts | None = None) -> None:
        self._counts = CodeCounts() if counts is None else counts
        # By codes of half precision, of so many values below 2**exponent.
        self._table: Tensor | None = None
        self._exponent = self._tabled = 0
        self._smaller: Tally | None = None

    def add(self, values: Tensor, peak: float) -> None:
        """Count values.

        Args:
            values: Finite, any shape and floating-point type.
            peak: No value is larger in magnitude.
        """
        flat = values.detach().to(torch.float32).reshape(-1)
        if flat.numel() <= _FEW:
            self._merge(CodeCounts(*short_codes(flat).long().unique(return_counts=True)))
        elif flat.device.type != "cpu" or not self._add_halves(flat, peak):
            self._merge(_nonzero(torch.bincount(short_codes(flat), minlength=CODES)))

    def counts(self) -> CodeCounts:
        """Each code that occurred, ascending, with its count."""
        if self._table is not None:
            self._merge(_short(self._table, self._exponent))
            self._table = None
        if self._smaller is not None:
            self._merge(self._smaller.counts())
            self._smaller = None
        return CodeCounts(self._counts.codes.cpu(), self._counts.counts.cpu())

    def _merge(self, found: CodeCounts) -> None:
        """Where the counts are: to fetch a table for each batch would take a GPU longer than to count."""
        if len(self._counts.codes):
            device = found.codes.device
            known = CodeCounts(self._counts.codes.to(device), self._counts.counts.to(device))
            found = known.merge(found)
        self._counts = found

    def _add_halves(self, values: Tensor, peak: float) -> bool:
        """Count float32 values by their codes of half precision, unless that cannot be done."""
        exponent = math.frexp(peak)[1]
        if self._table is not None and exponent < self._exponent:
            exponent = self._exponent
        if not (peak > 0 and _EXPONENTS[0] <= exponent <= _EXPONENTS[1] and values.numel() <= _MOST):
            return False
        halves = (values * 2.0 ** (15 - exponent)).half()
        table = _table(halves)
        # The smallest normal number too: what is rounded up to it has a finer grid in the short format.
        small = sum(int(table[sign : sign + _UNIT + 1].sum()) for sign in (0, _SIGN))
        zeros = values.numel() - int(values.count_nonzero()) if small else 0
        if small > zeros:
            chosen = halves.view(torch.int16).bitwise_and(_SIGN - 1) <= _UNIT
            if zeros:
                chosen.logical_and_(values != 0)
            where = chosen.nonzero().squeeze(1)
            table -= _table(halves[where])
            self._smaller = self._smaller or Tally()
            self._smaller.add(values[where], 2.0 ** (exponent - 28))
        fits = exponent == self._exponent and self._tabled + values.numel() <= _MOST
        if self._table is not None and fits:
            self._table += table
            self._tabled += values.numel()
        else:
            if self._table is not None:
                self._merge(_short(self._table, self._exponent))
            self._table, self._exponent, self._tabled = table, exponent, values.numel()
        return True


def _table(halves: Tensor) -> Tensor:
    """How often each code of half precision occurs, int32: a model has hundreds of these tables."""
    return torch.bincount(halves.view(torch.uint16).to(torch.int32), minlength=_HALVES).int()


def _short(table: Tensor, exponent: int) -> CodeCounts:
    """The short codes of what a table counts, of values below ``2**exponent``."""
    found = _nonzero(table)
    magnitudes, signs = found.codes & (_SIGN - 1), found.codes >> 15
    # Exponents are biased by 15 here and by 127 there; zero has none.
    bias = (127 - 15 - (15 - exponent)) * _UNIT
    codes = magnitudes + (magnitudes > 0) * bias + signs * _SHORT_SIGN
    return CodeCounts(codes, found.counts.long())


def _nonzero(dense: Tensor) -> CodeCounts:
    codes = dense.nonzero().squeeze(1)
    return CodeCounts(codes, dense[codes])


class ExtremesTally:
    """Counts of the extremes of each token: its smallest value, its largest, the larger of their magnitudes.

    The extremes are kept as they are until there are many, because a count takes the same few calls however
    few there are: in one block, since small tensors that outlive their batch would each lie in a place where
    a large one of the batch had been, and the memory would grow by a batch with every batch.

    Args:
        extremes: All three, counted together, to begin with.
    """

    def __init__(self, extremes: CodeCounts) -> None:
        self._tallies = [Tally(extremes.part(number)) for number in range(3)]
        self._kept: Tensor | None = None
        self._tokens = 0

    def add(self, values: Tensor, axis: int) -> None:
        """Count the extremes along the dimension ``axis``."""
        # Taken apart: on a CPU both together are many times slower along a dimension.
        lows, highs = values.amin(dim=axis).flatten(), values.amax(dim=axis).flatten()
        first, end = self._tokens, self._tokens + len(lows)
        kept = self._with_room(end, lows)
        kept[0, first:end], kept[1, first:end] = lows, highs
        self._tokens = end
        if self._tokens > _MANY_TOKENS:
            self._count()

    def counts(self) -> CodeCounts:
        """All three, counted together."""
        self._count()
        self._kept = None
        return CodeCounts.joined([tally.counts() for tally in self._tallies])

    def _with_room(self, tokens: int, like: Tensor) -> Tensor:
        """The block, of shape ``(2, at least tokens)``, with what it holds."""
        kept = self._kept
        if kept is None:
            kept = like.new_empty((2, 2 * tokens))
        wider = torch.promote_types(kept.dtype, like.dtype)
        if kept.shape[1] < tokens or kept.dtype != wider:
            larger = kept.new_empty((2, max(2 * tokens, kept.shape[1])), dtype=wider)
            larger[:, : self._tokens] = kept[:, : self._tokens]
            kept = larger
        self._kept = kept
        return kept

    def _count(self) -> None:
        if self._kept is None or not self._tokens:
            return
        lows, highs = self._kept[:, : self._tokens]
        peaks = torch.maximum(lows.abs(), highs.abs())
        for tally, extremes in zip(self._tallies, (lows, highs, peaks), strict=True):
            tally.add(extremes, float(peaks.amax()))
        self._tokens = 0
