"""Sites, statistics, range rules, quantizers and their simulation, for any eager PyTorch model."""

from quanttune.quantization.discovery import discover_sites
from quanttune.quantization.precision import Precision
from quanttune.quantization.quantizers import Quantizer, UniformQuantizer
from quanttune.quantization.ranges import RANGE_RULES, RangeRule
from quanttune.quantization.simulate import activation_quantizer, build_quantizers, simulate, weight_quantizer
from quanttune.quantization.sites import PROFILES, Site, SiteKind, SiteTable
from quanttune.quantization.statistics import Histogram, TensorStatistics, collect_statistics
from quanttune.quantization.tracing import SiteHandlers, SiteVisitor

__all__ = [
    "PROFILES",
    "RANGE_RULES",
    "Histogram",
    "Precision",
    "Quantizer",
    "RangeRule",
    "Site",
    "SiteHandlers",
    "SiteKind",
    "SiteTable",
    "SiteVisitor",
    "TensorStatistics",
    "UniformQuantizer",
    "activation_quantizer",
    "build_quantizers",
    "collect_statistics",
    "discover_sites",
    "simulate",
    "weight_quantizer",
]
