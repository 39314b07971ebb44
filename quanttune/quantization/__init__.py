"""Sites, statistics, range rules, quantizers and their simulation, for any eager PyTorch model.

Names are imported on first use, so that reading a scheme or the name of a site does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quanttune.quantization.discovery import discover_sites
    from quanttune.quantization.granularity import PerChannel, PerGroup, PerTensor, PerToken
    from quanttune.quantization.histogram import Histogram
    from quanttune.quantization.observation import Observation, Observer, observe
    from quanttune.quantization.quantized import Quantized, quantize
    from quanttune.quantization.quantized_model import QuantizedModel
    from quanttune.quantization.quantizers import QUANTIZERS, Quantizer, State, UniformQuantizer
    from quanttune.quantization.ranges import RANGE_RULES, RangeRule
    from quanttune.quantization.scheme import Format, Scheme
    from quanttune.quantization.simulation import (
        activation_quantizer,
        build_quantizers,
        simulate,
        site_weight,
        weight_quantizer,
    )
    from quanttune.quantization.sites import PROFILES, Site, SiteId, SiteKind, SiteTable
    from quanttune.quantization.statistics import TensorStatistics, collect_statistics
    from quanttune.quantization.tracing import SiteHandlers, SiteVisitor
    from quanttune.quantization.transforms import ScaledPair, Transform

_NAMES = {
    "discovery": ("discover_sites",),
    "granularity": ("PerChannel", "PerGroup", "PerTensor", "PerToken"),
    "histogram": ("Histogram",),
    "observation": ("Observation", "Observer", "observe"),
    "quantized": ("Quantized", "quantize"),
    "quantized_model": ("QuantizedModel",),
    "quantizers": ("QUANTIZERS", "Quantizer", "State", "UniformQuantizer"),
    "ranges": ("RANGE_RULES", "RangeRule"),
    "scheme": ("Format", "Scheme"),
    "simulation": (
        "activation_quantizer",
        "build_quantizers",
        "simulate",
        "site_weight",
        "weight_quantizer",
    ),
    "sites": ("PROFILES", "Site", "SiteId", "SiteKind", "SiteTable"),
    "statistics": ("TensorStatistics", "collect_statistics"),
    "tracing": ("SiteHandlers", "SiteVisitor"),
    "transforms": ("ScaledPair", "Transform"),
}
_HOMES = {name: f"{__name__}.{module}" for module, names in _NAMES.items() for name in names}

__all__ = [
    "PROFILES",
    "QUANTIZERS",
    "RANGE_RULES",
    "Format",
    "Histogram",
    "Observation",
    "Observer",
    "PerChannel",
    "PerGroup",
    "PerTensor",
    "PerToken",
    "Quantized",
    "QuantizedModel",
    "Quantizer",
    "RangeRule",
    "ScaledPair",
    "Scheme",
    "Site",
    "SiteHandlers",
    "SiteId",
    "SiteKind",
    "SiteTable",
    "SiteVisitor",
    "State",
    "TensorStatistics",
    "Transform",
    "UniformQuantizer",
    "activation_quantizer",
    "build_quantizers",
    "collect_statistics",
    "discover_sites",
    "observe",
    "quantize",
    "simulate",
    "site_weight",
    "weight_quantizer",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
