"""What quantization makes of the output of the linear layers that read a tensor, for searches of factors.

Products are exact and errors are summed in float64, so that no machine decides between two candidates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from baselines.folding import Group
from baselines.method import Context
from quanttune.errors import ConfigError, QuantTuneError
from quanttune.inputs import to_device
from quanttune.quantization import (
    RANGE_RULES,
    Observer,
    Quantizer,
    TensorStatistics,
    activation_quantizer,
    exact,
    observe,
    weight_quantizer,
)
from quanttune.quantization.exact import Operand
from quanttune.quantization.observation import Bounds
from quanttune.quantization.observers import ChannelBounds


@dataclass(frozen=True)
class Channels:
    """What calibration saw of a tensor.

    Args:
        low: Smallest value of each channel over all data, float64, shape ``(channels,)``, on the CPU.
        high: Largest value likewise.
        rows: Some of its vectors, float32, shape ``(rows, channels)``; none if none were asked for.
    """

    low: Tensor
    high: Tensor
    rows: Tensor

    @property
    def largest(self) -> Tensor:
        """``max |x|`` of every channel."""
        return torch.maximum(self.low.abs(), self.high.abs())


def collect_channels(context: Context, groups: Sequence[Group], rows: int, stage: str) -> dict[str, Channels]:
    """Bounds of every channel and some vectors of each group's tensor, by site, in one pass over the data.

    Args:
        context: Model and data.
        groups: The tensors.
        rows: How many vectors to keep of each tensor, evenly spaced over the data; 0 for none.
        stage: Name in reports of progress.
    """
    total = len(context.calibration)
    at_most = math.ceil(rows / max(total, 1))
    bounds = {group.site: ChannelBounds(-1) for group in groups}
    kept = {group.site: _Rows(at_most) for group in groups}
    observe(
        context.model,
        (to_device(batch.inputs, context.device) for batch in context.calibration),
        {site: [bounds[site], *([kept[site]] if rows else [])] for site in bounds},
        progress=lambda done: context.progress(stage, done, total),
        known=context.sites.known,
    )
    found = {}
    for site, seen in bounds.items():
        if seen.low is None or seen.high is None:
            raise QuantTuneError(f"site {site} held no value in calibration; give batches that fill it")
        values = torch.cat(kept[site].rows) if rows else torch.zeros(0, len(seen.low))
        found[site] = Channels(seen.low.double(), seen.high.double(), values)
    return found


class _Rows(Observer):
    """Keeps evenly spaced vectors along the last dimension.

    Args:
        at_most: How many of each batch.
    """

    def __init__(self, at_most: int) -> None:
        self._at_most = at_most
        self.rows: list[Tensor] = []

    def update(self, values: Tensor, bounds: Bounds) -> None:
        """Keep some of a batch."""
        rows = values.detach().flatten(0, -2)
        count = min(self._at_most, len(rows))
        # Integers, so that no rounding of a position can differ.
        places = torch.arange(count) * len(rows) // max(count, 1)
        self.rows.append(rows[places.to(rows.device)].float().cpu())


class QuantizedReaders:
    """The linear layers that read a tensor, as quantization leaves them for given factors.

    The activation's range is min-max over all data, the weight's min-max too, in the scheme's formats.

    Args:
        context: Tells the scheme and the device.
        group: The tensor and its readers.
        channels: What calibration saw of it.
        parameters: The weights, by name.
        shift: ``z``, float64, shape ``(channels,)``; ``None`` for none.

    Raises:
        ConfigError: If the scheme leaves activations in float.
    """

    def __init__(
        self,
        context: Context,
        group: Group,
        channels: Channels,
        parameters: Mapping[str, Tensor],
        shift: Tensor | None = None,
    ) -> None:
        form = context.scheme.activations
        if form is None:
            raise ConfigError(
                f"scheme {context.scheme} leaves activations in float; no error can be compared"
            )
        self._form, self._weight_form = form, context.scheme.weights
        self._site = context.sites[group.inputs[0]]
        self._low, self._high = channels.low, channels.high
        self._device = context.device
        self.shift = torch.zeros_like(channels.low) if shift is None else shift
        self.weights = [parameters[name].detach().double() for name in group.parameters]

    def moved(self, rows: Tensor) -> Tensor:
        """``x - z``, float32, on the context's device.

        Args:
            rows: ``x``, shape ``(rows, channels)``.
        """
        return (rows - self.shift.float().to(rows.device)).to(self._device)

    def scaled_by(self, factors: Tensor) -> Callable[[Tensor, int], Tensor]:
        """The products under these factors.

        Args:
            factors: ``s``, positive, float64, shape ``(channels,)``.

        Returns:
            From ``x - z``, shape ``(rows, channels)``, and the number of a layer to
            ``Q((x - z) / s) Q(W s)'``, shape ``(rows, outputs)``.
        """
        low, high = ((bound - self.shift) / factors for bound in (self._low, self._high))
        statistics = TensorStatistics(low=float(low.min()), high=float(high.max()))
        quantizer = activation_quantizer(self._site, statistics, self._form, RANGE_RULES.get("minmax"))
        rights = []
        for weight in self.weights:
            scaled = (weight * factors.to(self._device)).float()
            rights.append(_operand(weight_quantizer(scaled, self._weight_form), scaled))
        divisors = factors.float().to(self._device)

        def product(moved: Tensor, number: int) -> Tensor:
            # In the shape of a batch of one, by which a quantizer at run time knows its axes.
            shape = [1] * (len(self._site.shape) - 1) + list(moved.shape)
            left = _operand(quantizer, (moved / divisors).view(shape))
            return exact.linear(left, rights[number], None).view(len(moved), -1)

        return product


def output_error(
    context: Context,
    group: Group,
    channels: Channels,
    parameters: Mapping[str, Tensor],
    shift: Tensor | None = None,
) -> Callable[[Tensor], float]:
    """What a candidate of the factors costs.

    That is the squared error of ``Q((x - z) / s) Q(W s)'`` against ``(x - z) W'``, summed over layers and
    rows, with ranges as in :class:`QuantizedReaders`.

    Args:
        context: Tells the scheme and the device.
        group: The tensor and its readers.
        channels: What calibration saw of it, with rows.
        parameters: The weights, by name.
        shift: ``z``, shape ``(channels,)``; ``None`` for none.

    Returns:
        From ``s``, positive, float64, shape ``(channels,)``, to the error.

    Raises:
        ConfigError: If the scheme leaves activations in float.
    """
    quantized = QuantizedReaders(context, group, channels, parameters, shift)
    rows = quantized.moved(channels.rows)
    exactly = [rows.double() @ weight.T for weight in quantized.weights]

    def error_of(factors: Tensor) -> float:
        product = quantized.scaled_by(factors)
        return sum(
            float((product(rows, number).double() - expected).square().sum())
            for number, expected in enumerate(exactly)
        )

    return error_of


def _operand(quantizer: Quantizer, values: Tensor) -> Operand:
    encoded = quantizer.encode(values)
    return Operand(quantizer(values)) if encoded is None else Operand(encoded=encoded)
