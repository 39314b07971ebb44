"""Tiny exported models, each written once."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

from quanttune.quantization import Quantized, Scheme
from tests.quantization import models


def quantized(name: str, profile: str, precision: str) -> Quantized:
    """A tiny model quantized by min-max."""
    quantizers = models.quantizers(name, models.FUSED, profile, precision)
    known = models.sites(name, models.FUSED).known
    return Quantized(quantizers, scheme=Scheme.parse(precision, profile), known=known)


@cache
def folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


@cache
def exported(name: str, profile: str, precision: str, weights: str = "int8") -> tuple[Quantized, Path]:
    """It and its file."""
    found = quantized(name, profile, precision)
    path = Path(folder().name) / f"{name}-{profile}-{precision}-{weights}.onnx"
    found.to_onnx(path, models.build(name, models.FUSED), models.inputs(name), weights=weights)
    return found, path
