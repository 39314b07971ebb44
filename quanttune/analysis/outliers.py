"""How far outliers lie out, per site: the measures of the literature on outliers in Transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from quanttune.analysis.decomposition import ORDINARY
from quanttune.errors import QuantTuneError
from quanttune.inputs import ModelInputs, batch_size_of, call_model
from quanttune.quantization import SiteHandlers, SiteTable, TensorStatistics
from quanttune.quantization.tracing import Handler

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
    totals = dict.fromkeys(sites.activations(), 0.0)
    items = 0
    batch = 0

    def observer(site_id: str) -> Handler:
        def observe(values: Tensor) -> Tensor:
            magnitudes = values.detach().abs()
            if values.dim() and values.shape[0] % batch == 0:
                totals[site_id] += float(magnitudes.reshape(batch, -1).amax(dim=1).sum(dtype=torch.float64))
            else:
                totals[site_id] += batch * float(magnitudes.amax())
            return values

        return observe

    with torch.no_grad(), SiteHandlers(model, {site_id: observer(site_id) for site_id in totals}):
        for done, inputs in enumerate(batches, start=1):
            batch = batch_size_of(inputs)
            call_model(model, inputs)
            items += batch
            if progress is not None:
                progress(done)
    if not items:
        raise QuantTuneError("there are no items to measure infinity norms on; give at least one batch")
    return {site_id: total / items for site_id, total in totals.items()}


def layer_of(site_id: str) -> str:
    """The layer a site belongs to: its module path up to the index in the model's list of layers.

    ``blocks.3.attn/matmul.a`` belongs to ``blocks.3``, ``layers.1.blocks.0/add.output`` to
    ``layers.1.blocks.0``; what lies in no list belongs to its outermost module, or to ``""``.
    """
    parts = site_id.partition("/")[0].split(".")
    found = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    if found is None:
        return parts[0]
    while len(parts) > found + 2 and parts[found + 1] in _LISTS and parts[found + 2].isdigit():
        found += 2
    return ".".join(parts[: found + 1])
