"""Build a method's quantizers and run a model as integer hardware would, in floating point."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType

import torch
from torch import Tensor, nn

from quanttune.errors import ConfigError, QuantTuneError
from quanttune.quantization.precision import Precision
from quanttune.quantization.quantizers import Quantizer, UniformQuantizer
from quanttune.quantization.ranges import RangeRule
from quanttune.quantization.sites import Site, SiteKind, SiteTable
from quanttune.quantization.statistics import TensorStatistics
from quanttune.quantization.tracing import Handler, SiteHandlers

WEIGHT_GRANULARITIES = ("per_channel", "per_tensor")


def activation_quantizer(
    statistics: TensorStatistics, bits: int, rule: RangeRule, symmetric: bool
) -> UniformQuantizer:
    """The uniform per-tensor quantizer of one activation site under a range rule."""
    low, high = rule(statistics, bits, symmetric)
    if symmetric:
        return UniformQuantizer.symmetric(max(-low, high), bits)
    return UniformQuantizer.asymmetric(low, high, bits)


def weight_quantizer(weight: Tensor, bits: int, granularity: str = "per_channel") -> UniformQuantizer:
    """The symmetric min-max quantizer of a weight, one scale per output channel (dimension 0) or one in all.

    Raises:
        ConfigError: If the granularity is neither ``per_channel`` nor ``per_tensor``.
    """
    if granularity not in WEIGHT_GRANULARITIES:
        raise ConfigError(
            f"weight granularity {granularity!r} is not one of {', '.join(WEIGHT_GRANULARITIES)}"
        )
    # Of the bounds, not of a copy: large copies freed between small kept scales would break up the heap.
    per_tensor = granularity == "per_tensor"
    values = weight.detach()
    low, high = torch.aminmax(values) if per_tensor else torch.aminmax(values.flatten(1), dim=1)
    limit = torch.maximum(low.abs(), high.abs()).cpu()
    return UniformQuantizer.symmetric(limit, bits, None if per_tensor else 0)


def build_quantizers(
    model: nn.Module,
    sites: SiteTable,
    statistics: Mapping[str, TensorStatistics],
    precision: Precision,
    rule: RangeRule,
    *,
    symmetric: bool = True,
    weight_granularity: str = "per_channel",
) -> dict[str, Quantizer]:
    """One quantizer for each site: min-max for weights, ``rule`` for activations.

    Args:
        model: The model whose weights are quantized.
        sites: Sites of one profile.
        statistics: Statistics of every activation site of ``sites``.
        precision: Bit widths.
        rule: Range rule of the activations.
        symmetric: Whether activation quantizers are symmetric.
        weight_granularity: ``per_channel`` or ``per_tensor``.
    """
    parameters = dict(model.named_parameters())

    def quantizer_of(site: Site) -> Quantizer:
        if site.kind is not SiteKind.WEIGHT:
            return activation_quantizer(statistics[site.id], precision.activations, rule, symmetric)
        if site.parameter is None:
            raise ConfigError(
                f"site {site.id}: its weight is computed, not a parameter, and cannot be quantized statically"
            )
        return weight_quantizer(parameters[site.parameter], precision.weights, weight_granularity)

    return {site.id: quantizer_of(site) for site in sites.values()}


class Simulation(SiteHandlers):
    """The context that :func:`simulate` returns.

    Raises:
        QuantTuneError: On leaving, if the model ran and a quantizer was never reached: its site belongs to
            another model or attention implementation, and the result would pass for a quantized one.
    """

    def __init__(self, model: nn.Module, quantizers: Mapping[str, Quantizer]) -> None:
        super().__init__(
            model, {site_id: _handler(site_id, quantizer) for site_id, quantizer in quantizers.items()}
        )

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        super().__exit__(exc_type, exc, traceback)
        if exc_type is None and self.ran and self.unreached:
            missed = self.unreached
            raise QuantTuneError(
                f"{len(missed)} of {len(self.handlers)} quantizers were never reached, e.g. at {missed[0]}; "
                "discover the sites on this same model, with the attention implementation it runs with"
            )


def simulate(model: nn.Module, quantizers: Mapping[str, Quantizer]) -> Simulation:
    """A context in which ``model`` computes with quantized tensors at the given sites.

    A weight is quantized once and reused until it changes; writing to ``weight.data`` inside the context goes
    unnoticed, as it does for autograd. With no quantizers the model's own kernels run and its logits are
    bit-identical.

    Example:
        >>> with torch.no_grad(), simulate(model, quantizers):  # doctest: +SKIP
        ...     logits = model(images)
    """
    return Simulation(model, quantizers)


def _handler(site_id: str, quantizer: Quantizer) -> Handler:
    return _QuantizedOnce(quantizer) if site_id.endswith(".weight") else quantizer


class _QuantizedOnce:
    """Quantizes a weight when it is another tensor, or holds other numbers, than the last time.

    The weight itself is kept beside its quantized form: the address of a freed tensor is soon used again.
    """

    def __init__(self, quantizer: Quantizer) -> None:
        self._quantizer = quantizer
        self._weight: Tensor | None = None
        self._state: tuple[int, int, bool] | None = None
        self._quantized: Tensor | None = None

    def __call__(self, weight: Tensor) -> Tensor:
        if (torch.is_grad_enabled() and weight.requires_grad) or weight.is_inference():
            return self._quantizer(weight)  # inference tensors do not say when they change
        # What inference mode made cannot take part in a gradient later, so the modes do not share.
        state = (weight.data_ptr(), weight._version, torch.is_inference_mode_enabled())
        if self._quantized is None or weight is not self._weight or state != self._state:
            self._weight, self._state, self._quantized = weight, state, self._quantizer(weight)
        return self._quantized
