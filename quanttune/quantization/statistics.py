"""Mergeable summaries of activations: one pass over the calibration data serves every range rule and width.

Values are counted by their float16 code. That histogram needs no range in advance, so it can be filled in one
pass and merged by addition, and its bins are 2**-11 of a value wide: about a thirtieth of an 8-bit step at
the end of the range, finer towards zero. Minimum and maximum are kept exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor, nn

from quanttune.errors import QuantTuneError
from quanttune.inputs import ModelInputs
from quanttune.quantization.observation import Bounds, Observer, finite_bounds, observe
from quanttune.quantization.sites import SiteTable
from quanttune.quantization.transforms import Transform

_CODES = 1 << 16
_SCALARS = ("low", "high", "ema_low", "ema_high", "first_low", "first_high", "batches")
EMA_MOMENTUM = 0.01
"""Weight of a new batch in the running minimum and maximum (the value of the FQ-ViT reference code)."""


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
class TensorStatistics:
    """Summary of every value a site took.

    Args:
        low: Smallest value.
        high: Largest value.
        ema_low: Running minimum over batches with momentum :data:`EMA_MOMENTUM`; the first batch dominates.
        ema_high: Running maximum likewise.
        first_low: Minimum of the first batch; what a merge needs to take the other's running bounds apart.
        first_high: Maximum of the first batch.
        batches: Number of batches seen.
        codes: Count of each float16 code, shape ``(65536,)``, int64.
    """

    low: float = math.inf
    high: float = -math.inf
    ema_low: float = 0.0
    ema_high: float = 0.0
    first_low: float = 0.0
    first_high: float = 0.0
    batches: int = 0
    codes: Tensor = field(default_factory=lambda: torch.zeros(_CODES, dtype=torch.int64))

    def update(self, values: Tensor, bounds: Bounds | None = None) -> None:
        """Add a batch of values of any shape.

        Args:
            values: The batch.
            bounds: Its smallest and largest value if they are known already.

        Raises:
            QuantTuneError: If a value is not finite.
        """
        values = values.detach()
        low, high = finite_bounds(values, "a calibration activation") if bounds is None else bounds
        if not self.batches:
            self.first_low, self.first_high = low, high
        momentum = EMA_MOMENTUM if self.batches else 1.0
        self.ema_low += momentum * (low - self.ema_low)
        self.ema_high += momentum * (high - self.ema_high)
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.batches += 1
        self.__dict__.pop("histogram", None)  # made from the counts so far
        codes = values.to(torch.float16).contiguous().view(torch.uint16).view(-1).to(torch.int32)
        self.codes += torch.bincount(codes, minlength=_CODES).to(self.codes.device)

    def merge(self, other: TensorStatistics) -> TensorStatistics:
        """The statistics of both sets of values, as if the other's batches had followed this set's."""
        # The other's running bounds start at its first batch; here they start at this set's bounds instead.
        weight = (1 - EMA_MOMENTUM) ** other.batches if self.batches else 0.0
        first = self if self.batches else other
        return TensorStatistics(
            low=min(self.low, other.low),
            high=max(self.high, other.high),
            ema_low=other.ema_low + weight * (self.ema_low - other.first_low),
            ema_high=other.ema_high + weight * (self.ema_high - other.first_high),
            first_low=first.first_low,
            first_high=first.first_high,
            batches=self.batches + other.batches,
            codes=self.codes + other.codes,
        )

    @property
    def count(self) -> int:
        """Number of values seen."""
        return int(self.codes.sum())

    @cached_property
    def histogram(self) -> Histogram:
        """The signed histogram; values beyond float16's 65504 stand in one bin at the exact bound."""
        counts = self.codes.cpu().numpy()
        occupied = np.flatnonzero(counts)
        values = occupied.astype(np.uint16).view(np.float16).astype(np.float64)
        values = np.clip(values, self.low, self.high)
        order = np.argsort(values, kind="stable")
        return Histogram(values[order], counts[occupied][order].astype(np.float64))

    @property
    def mean(self) -> float:
        """Mean of all values."""
        histogram = self.histogram
        return float(histogram.counts @ histogram.values) / histogram.count

    @property
    def std(self) -> float:
        """Standard deviation of all values."""
        return math.sqrt(max(self.histogram.moment(2), 0.0))

    @property
    def kurtosis(self) -> float:
        """Fourth standardised moment, 3 for a Gaussian; NaN for a constant."""
        variance = self.histogram.moment(2)
        return self.histogram.moment(4) / variance**2 if variance > 0 else math.nan

    @property
    def ratio(self) -> float:
        """Largest distance from the mean in standard deviations; NaN for a constant."""
        std = self.std
        return max(self.high - self.mean, self.mean - self.low) / std if std > 0 else math.nan


def statistics_to_tensors(statistics: Mapping[str, TensorStatistics]) -> dict[str, Tensor]:
    """Pack statistics into tensors that safetensors can hold."""
    packed: dict[str, Tensor] = {}
    for site_id, summary in statistics.items():
        scalars = [getattr(summary, name) for name in _SCALARS]
        packed[f"{site_id}|scalars"] = torch.tensor(scalars, dtype=torch.float64)
        # Most codes never occur: the sparse form is a tenth of the dense one.
        occupied = summary.codes.cpu().nonzero().squeeze(1)
        packed[f"{site_id}|codes"] = torch.stack([occupied, summary.codes.cpu()[occupied]])
    return packed


def statistics_from_tensors(packed: Mapping[str, Tensor]) -> dict[str, TensorStatistics]:
    """The inverse of :func:`statistics_to_tensors`."""
    statistics = {}
    for name in packed:
        site_id, _, part = name.rpartition("|")
        if part != "scalars":
            continue
        scalars = dict(zip(_SCALARS, packed[name].tolist(), strict=True))
        codes = torch.zeros(_CODES, dtype=torch.int64)
        occupied, counts = packed[f"{site_id}|codes"]
        codes[occupied] = counts
        scalars["batches"] = int(scalars["batches"])
        statistics[site_id] = TensorStatistics(**scalars, codes=codes)
    return statistics


def collect_statistics(
    model: nn.Module,
    batches: Iterable[ModelInputs],
    sites: SiteTable,
    progress: Callable[[int], None] | None = None,
    transforms: Iterable[Transform] = (),
) -> dict[str, TensorStatistics]:
    """Run the model over ``batches`` once and summarise every activation site of ``sites``.

    Args:
        model: The model; it is run in evaluation mode and left in the mode it had.
        batches: Model inputs; at least one batch.
        sites: Sites of one profile; weight sites are passed over.
        progress: Called with the number of batches done.
        transforms: Where one stands at a site, what the quantizer there sees is summarised.

    Raises:
        QuantTuneError: If there is no batch, an activation is not finite, a site held no value, or a site was
            reached that discovery did not see; the message names the site.
    """
    of_site = {site_id: transform for transform in transforms for site_id in transform.sites}
    observers = {
        site_id: StatisticsObserver(partial(of_site[site_id].seen, site_id) if site_id in of_site else None)
        for site_id in sites.activations()
    }
    if not observers:
        return {}
    observe(model, batches, observers, progress=progress, known=sites.known)
    unseen = [site_id for site_id, observer in observers.items() if not observer.statistics.batches]
    if unseen:
        raise QuantTuneError(
            f"site {unseen[0]} held no value in calibration; give batches that fill it, such as tokens for "
            "every expert"
        )
    return {site_id: observer.statistics for site_id, observer in observers.items()}


class StatisticsObserver(Observer):
    """Summarises a site's tensor, or what a transform makes of it.

    Args:
        seen: From the tensor to what is summarised; the tensor itself by default.

    Attributes:
        statistics: The summary so far.
    """

    def __init__(self, seen: Callable[[Tensor], Tensor] | None = None) -> None:
        self.statistics = TensorStatistics()
        self._seen = seen

    def update(self, values: Tensor, bounds: Bounds) -> None:
        """Add a batch."""
        if self._seen is None:
            self.statistics.update(values, bounds)
        else:
            self.statistics.update(self._seen(values.detach()))
