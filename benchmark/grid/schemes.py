"""How a cell tells its scheme: a precision as text, and the two axes that suites have beside it."""

from __future__ import annotations

import functools
from dataclasses import replace

from quanttune.quantization.granularity import PerChannel, PerTensor
from quanttune.quantization.scheme import Scheme, weight_granularity

Axes = tuple[str, str, bool]
"""Precision, granularity of weights, symmetry of activations: one way to tell each scheme, so one cell id."""


@functools.cache
def scheme_of(precision: str, granularity: str, symmetric: bool, profile: str) -> Scheme:
    """The scheme that a precision and the suite's axes tell together; what the precision tells itself stands.

    Args:
        precision: Text such as ``W8A8``.
        granularity: ``per_channel`` or ``per_tensor``, for weights whose granularity the text leaves open.
        symmetric: Whether activations are symmetric, where the text leaves it open.
        profile: Which tensors.

    Raises:
        ConfigError: If the precision is no scheme.
    """
    scheme = Scheme.parse(precision, profile)
    weights, activations = scheme.weights, scheme.activations
    if isinstance(weights.granularity, PerChannel):
        weights = replace(weights, granularity=weight_granularity(granularity))
    if activations is not None and activations.symmetric:
        activations = replace(activations, symmetric=symmetric)
    return replace(scheme, weights=weights, activations=activations)


@functools.cache
def axes_of(scheme: Scheme) -> Axes:
    """The inverse of :func:`scheme_of`: what a cell of this scheme is told by."""
    weights, activations = scheme.weights, scheme.activations
    granularity = weights.granularity
    if isinstance(granularity, PerTensor):
        weights = replace(weights, granularity=PerChannel())
    symmetric = activations is None or activations.symmetric
    if activations is not None:
        activations = replace(activations, symmetric=True)
    text = str(replace(scheme, weights=weights, activations=activations))
    return text, granularity.name, symmetric
