"""Build a method's quantizers and run a model as integer hardware would, in floating point."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from quanttune.errors import ConfigError
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
    magnitude = weight.detach().abs().cpu()
    if granularity == "per_tensor":
        return UniformQuantizer.symmetric(magnitude.amax(), bits)
    return UniformQuantizer.symmetric(magnitude.flatten(1).amax(dim=1), bits, axis=0)


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


def simulate(model: nn.Module, quantizers: Mapping[str, Quantizer]) -> SiteHandlers:
    """A context in which ``model`` computes with quantized tensors at the given sites.

    A weight is quantized once and reused until it changes. With no quantizers the model's own kernels run and
    its logits are bit-identical.

    Example:
        >>> with torch.no_grad(), simulate(model, quantizers):  # doctest: +SKIP
        ...     logits = model(images)
    """
    return SiteHandlers(
        model, {site_id: _handler(site_id, quantizer) for site_id, quantizer in quantizers.items()}
    )


def _handler(site_id: str, quantizer: Quantizer) -> Handler:
    return _quantized_once(quantizer) if site_id.endswith(".weight") else quantizer


def _quantized_once(quantizer: Quantizer) -> Callable[[Tensor], Tensor]:
    cached: dict[tuple[int, int], Tensor] = {}

    def handle(weight: Tensor) -> Tensor:
        if torch.is_grad_enabled() and weight.requires_grad:
            return quantizer(weight)
        key = (weight.data_ptr(), weight._version)
        if key not in cached:
            cached.clear()
            cached[key] = quantizer(weight)
        return cached[key]

    return handle
