"""Mergeable summaries of activations: one pass over the calibration data serves every range rule and width.

Values are counted in a histogram that needs no range in advance, see :mod:`quanttune.quantization.histogram`,
so it can be filled in one pass and merged by addition. Its bins are at most an eighth of an 8-bit step wide,
and finer towards zero. Minimum and maximum are kept exactly.

The same is kept of the extremes of each token: its smallest value, its largest, and the larger of their
magnitudes. A token is the vector along the channels; along the last dimension where a tensor has none, as a
row of an attention matrix. Every position of a batch counts, padding too, as in the histogram of the values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from quanttune.errors import QuantTuneError
from quanttune.inputs import ModelInputs
from quanttune.quantization.histogram import CodeCounts, Histogram
from quanttune.quantization.observation import Bounds, Observer, finite_bounds, observe
from quanttune.quantization.sites import SiteTable
from quanttune.quantization.tally import ExtremesTally, Tally
from quanttune.quantization.transforms import Transform

_SCALARS = ("low", "high", "ema_low", "ema_high", "first_low", "first_high", "batches")
_TOKENS = ("token_lows", "token_highs", "token_peaks")
LAYOUT = 2
"""What is packed of a site: raised when it is more or other, so that what was kept before is collected anew.

1: bounds and the histogram of the values. 2: the extremes of the tokens as well.
"""
EMA_MOMENTUM = 0.01
"""Weight of a new batch in the running minimum and maximum (the value of the FQ-ViT reference code)."""


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
        codes: Codes that occurred, ascending, shape ``(bins,)``, int64.
        counts: Values of each of them, shape ``(bins,)``, int64.
        extremes: Of each token, what :data:`_TOKENS` names, counted together.
    """

    low: float = math.inf
    high: float = -math.inf
    ema_low: float = 0.0
    ema_high: float = 0.0
    first_low: float = 0.0
    first_high: float = 0.0
    batches: int = 0
    codes: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    counts: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    extremes: CodeCounts = field(default_factory=CodeCounts)

    def update(self, values: Tensor, bounds: Bounds | None = None, axis: int | None = None) -> None:
        """Add a batch of values of any shape.

        Args:
            values: The batch.
            bounds: Its smallest and largest value if they are known already.
            axis: The dimension that holds the channels of a token; the last one by default.

        Raises:
            QuantTuneError: If a value is not finite.
        """
        counting = Counting(self, axis)
        counting.add(values, bounds)
        counting.finish()

    def widen(self, low: float, high: float) -> None:
        """Take in the bounds of a batch, and nothing else of it."""
        if not self.batches:
            self.first_low, self.first_high = low, high
        momentum = EMA_MOMENTUM if self.batches else 1.0
        self.ema_low += momentum * (low - self.ema_low)
        self.ema_high += momentum * (high - self.ema_high)
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.batches += 1

    def merge(self, other: TensorStatistics) -> TensorStatistics:
        """The statistics of both sets of values, as if the other's batches had followed this set's."""
        # The other's running bounds start at its first batch; here they start at this set's bounds instead.
        weight = (1 - EMA_MOMENTUM) ** other.batches if self.batches else 0.0
        first = self if self.batches else other
        both = CodeCounts(self.codes, self.counts).merge(CodeCounts(other.codes, other.counts))
        return TensorStatistics(
            low=min(self.low, other.low),
            high=max(self.high, other.high),
            ema_low=other.ema_low + weight * (self.ema_low - other.first_low),
            ema_high=other.ema_high + weight * (self.ema_high - other.first_high),
            first_low=first.first_low,
            first_high=first.first_high,
            batches=self.batches + other.batches,
            codes=both.codes,
            counts=both.counts,
            extremes=self.extremes.merge(other.extremes),
        )

    @property
    def count(self) -> int:
        """Number of values seen."""
        return int(self.counts.sum())

    @cached_property
    def histogram(self) -> Histogram:
        """The signed histogram; no bin lies beyond the exact bounds."""
        return CodeCounts(self.codes, self.counts).histogram(self.low, self.high)

    @property
    def token_lows(self) -> CodeCounts:
        """The smallest value of each token."""
        return self.extremes.part(0)

    @property
    def token_highs(self) -> CodeCounts:
        """The largest value of each token."""
        return self.extremes.part(1)

    @property
    def token_peaks(self) -> CodeCounts:
        """The largest magnitude of each token."""
        return self.extremes.part(2)

    @property
    def tokens(self) -> int:
        """Number of tokens seen, padding included."""
        return int(self.token_peaks.counts.sum())

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


class Counting:
    """Adds batches to a summary, whose counts lag behind until :meth:`finish`.

    Args:
        statistics: The summary.
        axis: The dimension that holds the channels of a token; the last one by default.
    """

    def __init__(self, statistics: TensorStatistics, axis: int | None = None) -> None:
        self.statistics = statistics
        self._axis = -1 if axis is None else axis
        self._values = Tally(CodeCounts(statistics.codes, statistics.counts))
        self._extremes = ExtremesTally(statistics.extremes)

    def add(self, values: Tensor, bounds: Bounds | None = None) -> None:
        """Add a batch; arguments and errors of :meth:`TensorStatistics.update`."""
        values = values.detach()
        low, high = finite_bounds(values, "a calibration activation") if bounds is None else bounds
        self.statistics.widen(low, high)
        self._values.add(values, max(-low, high))
        self._extremes.add(values, self._axis)

    def finish(self) -> TensorStatistics:
        """The summary, with all counts."""
        self.statistics.__dict__.pop("histogram", None)  # made from the counts so far
        counts = self._values.counts()
        self.statistics.codes, self.statistics.counts = counts.codes, counts.counts
        self.statistics.extremes = self._extremes.counts()
        return self.statistics


def statistics_to_tensors(statistics: Mapping[str, TensorStatistics]) -> dict[str, Tensor]:
    """Pack statistics into tensors that safetensors can hold."""
    packed: dict[str, Tensor] = {}
    for site_id, summary in statistics.items():
        scalars = [getattr(summary, name) for name in _SCALARS]
        packed[f"{site_id}|scalars"] = torch.tensor(scalars, dtype=torch.float64)
        packed[f"{site_id}|codes"] = torch.stack([summary.codes, summary.counts])
        for name in _TOKENS:
            packed[f"{site_id}|{name}"] = getattr(summary, name).packed()
    return packed


def statistics_from_tensors(packed: Mapping[str, Tensor]) -> dict[str, TensorStatistics]:
    """The inverse of :func:`statistics_to_tensors`."""
    statistics = {}
    for name in packed:
        site_id, _, part = name.rpartition("|")
        if part != "scalars":
            continue
        scalars = dict(zip(_SCALARS, packed[name].tolist(), strict=True))
        codes, counts = packed[f"{site_id}|codes"]
        scalars["batches"] = int(scalars["batches"])
        extremes = CodeCounts.joined([CodeCounts(*packed[f"{site_id}|{each}"]) for each in _TOKENS])
        statistics[site_id] = TensorStatistics(**scalars, codes=codes, counts=counts, extremes=extremes)
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
        site.id: StatisticsObserver(
            partial(of_site[site.id].seen, site.id) if site.id in of_site else None, site.channel_axis
        )
        for site in sites.activations().values()
    }
    if not observers:
        return {}
    observe(model, batches, observers, progress=progress, known=sites.known)
    found = {site_id: observer.statistics for site_id, observer in observers.items()}
    unseen = [site_id for site_id, statistics in found.items() if not statistics.batches]
    if unseen:
        raise no_value(unseen[0])
    return found


def no_value(site_id: str) -> QuantTuneError:
    """The error of a site that was reached with empty tensors alone."""
    return QuantTuneError(
        f"site {site_id} held no value in calibration; give batches that fill it, such as tokens for "
        "every expert"
    )


class StatisticsObserver(Observer):
    """Summarises a site's tensor, or what a transform makes of it.

    Args:
        seen: From the tensor to what is summarised; the tensor itself by default.
        axis: The dimension that holds the channels; the last one by default.

    """

    def __init__(self, seen: Callable[[Tensor], Tensor] | None = None, axis: int | None = None) -> None:
        self._counting = Counting(TensorStatistics(), axis)
        self._seen = seen

    def update(self, values: Tensor, bounds: Bounds) -> None:
        """Add a batch."""
        if self._seen is None:
            self._counting.add(values, bounds)
        else:
            self._counting.add(self._seen(values.detach()))

    @property
    def statistics(self) -> TensorStatistics:
        """The summary so far."""
        return self._counting.finish()
