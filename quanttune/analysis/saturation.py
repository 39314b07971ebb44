"""What clipping costs or gains: accuracy against the percentage by which every activation range is cut."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from torch import nn

from quanttune.errors import ConfigError
from quanttune.quantization import (
    RANGE_RULES,
    RangeRule,
    Scheme,
    SiteTable,
    TensorStatistics,
    build_quantizers,
    simulate,
)

SATURATIONS = (0.0, 0.05, 0.10, 0.15, 0.20, 0.25, 0.30)
"""Fractions of the range that are cut away."""

_Measured = TypeVar("_Measured")


def saturating(saturation: float) -> RangeRule:
    """A range rule that cuts the min-max range: ``limit = (1 - saturation) max |x|``; asymmetric: both ends.

    Args:
        saturation: Fraction of the range that is cut away, 0 or more and below 1.

    Raises:
        ConfigError: If it is not.
    """
    if not 0 <= saturation < 1:
        raise ConfigError(f"saturation {saturation} is not a fraction of at least 0 and below 1")
    minmax = RANGE_RULES.get("minmax")

    def rule(statistics: TensorStatistics, bits: int, symmetric: bool) -> tuple[float, float]:
        low, high = minmax(statistics, bits, symmetric)
        return (1 - saturation) * low, (1 - saturation) * high

    return rule


def saturation_sweep(
    model: nn.Module,
    sites: SiteTable,
    statistics: Mapping[str, TensorStatistics],
    scheme: Scheme,
    measure: Callable[[], _Measured],
    saturations: Iterable[float] = SATURATIONS,
) -> dict[float, _Measured]:
    """Quantize a model once for each saturation, the same at every activation site, and measure it.

    Args:
        model: In evaluation mode.
        sites: Sites of one profile.
        statistics: Of every activation site of ``sites``.
        scheme: Formats of weights and activations; weights are never clipped.
        measure: Runs ``model``, e.g. over a test set, while it is quantized.
        saturations: Fractions of the range that are cut away.

    Returns:
        What ``measure`` returned, by saturation.
    """
    measured = {}
    for saturation in saturations:
        quantizers = build_quantizers(model, sites, statistics, scheme, saturating(saturation))
        with simulate(model, quantizers, known=sites.known):
            measured[saturation] = measure()
    return measured
