"""Observers that keep bounds along a dimension, beside the histograms of :mod:`.statistics`."""

from __future__ import annotations

import torch
from torch import Tensor

from quanttune.errors import QuantTuneError
from quanttune.quantization.observation import Bounds, Observer


class ChannelBounds(Observer):
    """The smallest and the largest value of every channel over all data.

    Args:
        axis: The channel dimension, batch included.

    Attributes:
        low: Shape ``(channels,)``, the tensor's type, on the CPU; ``None`` before the first batch.
        high: Likewise.
    """

    def __init__(self, axis: int) -> None:
        self.axis = axis
        self.low: Tensor | None = None
        self.high: Tensor | None = None

    def update(self, values: Tensor, bounds: Bounds) -> None:
        """Widen the bounds by a batch."""
        rows = values.detach().movedim(self.axis, -1).flatten(0, -2)
        # aminmax along a dimension takes twenty times as long on a CPU
        low, high = rows.amin(dim=0).cpu(), rows.amax(dim=0).cpu()
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)

    def largest(self) -> Tensor:
        """``max |x|`` of every channel, shape ``(channels,)``.

        Raises:
            QuantTuneError: If nothing was observed.
        """
        if self.low is None or self.high is None:
            raise QuantTuneError("no channel bounds: the observer saw no data")
        return torch.maximum(self.low.abs(), self.high.abs())


class TokenExtremes(Observer):
    """The smallest and the largest value of every token, kept one by one so that their quantiles are exact.

    A token is a vector along the last dimension (Outlier Suppression, arXiv 2209.13325, section 4.2).
    """

    def __init__(self) -> None:
        self._lows: list[Tensor] = []
        self._highs: list[Tensor] = []

    def update(self, values: Tensor, bounds: Bounds) -> None:
        """Add the tokens of a batch."""
        self._lows.append(values.detach().amin(dim=-1).flatten().cpu())
        self._highs.append(values.detach().amax(dim=-1).flatten().cpu())

    @property
    def low(self) -> Tensor:
        """Smallest value of each token, shape ``(tokens,)``, in the order of the data."""
        return torch.cat(self._lows)

    @property
    def high(self) -> Tensor:
        """Largest value of each token, shape ``(tokens,)``."""
        return torch.cat(self._highs)

    def quantile(self, fraction: float) -> Bounds:
        """The ranges' ends that this fraction of the tokens keeps within.

        Args:
            fraction: Between 0 and 1; 1 covers every token.

        Returns:
            The ``1 - fraction`` quantile of the smallest values and the ``fraction`` quantile of the largest,
            each a value that occurs.
        """
        low = torch.quantile(self.low.double(), 1 - fraction, interpolation="lower")
        high = torch.quantile(self.high.double(), fraction, interpolation="higher")
        return float(low), float(high)
