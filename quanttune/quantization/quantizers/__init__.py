"""Quantizers: a real tensor in, the value an integer would stand for out. One file a kind."""

from quanttune.quantization.quantizers.dynamic import DynamicQuantizer
from quanttune.quantization.quantizers.grouped import GroupQuantizer
from quanttune.quantization.quantizers.quantizer import (
    QUANTIZERS,
    Quantizer,
    State,
    quantizer_from_state,
    straight_through,
)
from quanttune.quantization.quantizers.scaled import ScaledQuantizer
from quanttune.quantization.quantizers.uniform import UniformQuantizer

__all__ = [
    "QUANTIZERS",
    "DynamicQuantizer",
    "GroupQuantizer",
    "Quantizer",
    "ScaledQuantizer",
    "State",
    "UniformQuantizer",
    "quantizer_from_state",
    "straight_through",
]
