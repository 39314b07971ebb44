"""A site and its quantizer, for tests that need no model."""

from __future__ import annotations

import numpy as np

from quanttune.quantization import (
    Format,
    RangeRule,
    Site,
    SiteId,
    SiteKind,
    TensorStatistics,
    UniformQuantizer,
    activation_quantizer,
)

SITE = Site(SiteId("layer", "linear", 1, "input"), SiteKind.LINEAR_INPUT, (4,))


def quantizer_of(
    statistics: TensorStatistics, bits: int, rule: RangeRule, symmetric: bool
) -> UniformQuantizer:
    made = activation_quantizer(SITE, statistics, Format(bits, symmetric=symmetric), rule)
    assert isinstance(made, UniformQuantizer)
    return made


def significant(values: np.ndarray | float, bits: int = 16) -> np.ndarray:
    """NumPy's word on numbers of so many significant bits: ranges and steps have 16."""
    mantissa, exponent = np.frexp(np.asarray(values, dtype=np.float64))
    return np.ldexp(np.rint(np.ldexp(mantissa, bits)), exponent - bits)
