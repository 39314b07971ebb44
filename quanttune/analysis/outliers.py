"""How far outliers lie out, per site: the measures of the literature on outliers in Transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from quanttune.analysis.decomposition import ORDINARY
from quanttune.inputs import ModelInputs, batch_size_of
from quanttune.quantization import Observer, SiteId, SiteTable, TensorStatistics, observe
from quanttune.quantization.observation import Bounds

_LISTS = frozenset({"blocks", "layer", "layers", "h"})
"""Names that models give to a list of equal layers inside another list, as Swin does."""


@dataclass(frozen=True)
class OutlierMetrics:
    """What one site's values look like, in the tensor's unit unless said otherwise.

    Args:
        low: Smallest value.
        high: Largest value.
        mean: Mean.
        std: Standard deviation.
        ratio: ``max |x - mean| / std``; NaN for a constant.
        kurtosis: Fourth standardised moment, not excess: 3 for a Gaussian; NaN for a constant.
        beyond: Fraction of the values more than 6 standard deviations from the mean.
    """

    low: float
    high: float
    mean: float
    std: float
    ratio: float
    kurtosis: float
    beyond: float

    @property
    def max_abs(self) -> float:
        """Largest magnitude: what symmetric min-max calibration has to cover."""
        return max(abs(self.low), abs(self.high))

    @property
    def range(self) -> float:
        """``high - low``."""
        return self.high - self.low


def outlier_metrics(statistics: TensorStatistics, ordinary: float = ORDINARY) -> OutlierMetrics:
    """Measure a site from its statistics, without another pass over the data.

    Args:
        statistics: Of the site.
        ordinary: Standard deviations from the mean up to which a value is ordinary.
    """
    histogram, mean, std = statistics.histogram, statistics.mean, statistics.std
    beyond = np.abs(histogram.values - mean) > ordinary * std
    return OutlierMetrics(
        low=statistics.low,
        high=statistics.high,
        mean=mean,
        std=std,
        ratio=statistics.ratio,
        kurtosis=statistics.kurtosis,
        beyond=float(histogram.counts[beyond].sum()) / histogram.count if std > 0 else 0.0,
    )


def infinity_norms(
    model: nn.Module,
    batches: Iterable[ModelInputs],
    sites: SiteTable,
    progress: Callable[[int], None] | None = None,
) -> dict[str, float]:
    """The infinity norm of each activation site: ``max |x|`` of every item, averaged over the items.

    The norm of a model is the largest of these (Bondarenko et al. 2023, arXiv 2306.12929, take it over the
    layers' outputs). ``max |x|`` over a whole set grows with the set; this does not.

    A tensor's first dimension holds the items, alone or outermost (windows of an image, tokens of a text); a
    tensor whose first dimension is no multiple of the batch is the same for all items. Padding counts, as it
    does in calibration.

    Args:
        model: In evaluation mode.
        batches: Model inputs; at least one batch.
        sites: Sites of one profile; weight sites are passed over.
        progress: Called with the number of batches done.

    Raises:
        QuantTuneError: If there is no batch.
    """
    counter = _Counter()
    norms = {site_id: _Norms(counter) for site_id in sites.activations()}
    observe(model, counter.counted(batches), norms, progress=progress)
    return {site_id: observer.total / counter.items for site_id, observer in norms.items()}


class _Counter:
    """Which batch is running, and how many items there were."""

    def __init__(self) -> None:
        self.batch = self.items = 0

    def counted(self, batches: Iterable[ModelInputs]) -> Iterator[ModelInputs]:
        for inputs in batches:
            self.batch = batch_size_of(inputs)
            self.items += self.batch
            yield inputs


class _Norms(Observer):
    """The sum of ``max |x|`` over items."""

    def __init__(self, counter: _Counter) -> None:
        self.total = 0.0
        self._counter = counter

    def update(self, values: Tensor, bounds: Bounds) -> None:
        batch = self._counter.batch
        if values.dim() and values.shape[0] % batch == 0:
            magnitudes = values.detach().abs().reshape(batch, -1)
            self.total += float(magnitudes.amax(dim=1).sum(dtype=torch.float64))
        else:
            self.total += batch * max(-bounds[0], bounds[1])


def layer_of(site_id: str) -> str:
    """The layer a site belongs to: its module path up to the index in the model's list of layers.

    ``blocks.3.attn/matmul.a`` belongs to ``blocks.3``, ``layers.1.blocks.0/add.output`` to
    ``layers.1.blocks.0``; what lies in no list belongs to its outermost module, or to ``""``.
    """
    parts = SiteId.parse(site_id).module.split(".")
    found = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    if found is None:
        return parts[0]
    while len(parts) > found + 2 and parts[found + 1] in _LISTS and parts[found + 2].isdigit():
        found += 2
    return ".".join(parts[: found + 1])
