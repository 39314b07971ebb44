"""The unquantized reference, as a method of its own so that it is measured and stored like every rival."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from baselines.method import METHODS, Context, Method
from quanttune.quantization import Quantized


@METHODS.register("fp32")
@dataclass(frozen=True)
class FullPrecision(Method):
    """No quantizer anywhere."""

    name: ClassVar[str] = "fp32"
    role: ClassVar[str] = "reference"

    def quantize(self, context: Context) -> Quantized:
        """Leave every tensor as it is."""
        return Quantized({})
