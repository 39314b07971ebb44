"""FQ-ViT: post-training quantization for fully quantized vision transformers (arXiv 2111.13824)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from baselines.method import METHODS, Context, Method
from quanttune.errors import ConfigError
from quanttune.inputs import to_device
from quanttune.quantization import (
    Observer,
    Quantized,
    Quantizer,
    Scheme,
    Site,
    SiteKind,
    SiteTable,
    UniformQuantizer,
    observe,
    site_weight,
    weight_quantizer,
)
from quanttune.quantization.observation import Bounds
from quanttune.quantization.quantizers.grid import quotient, significant
from quanttune.quantization.quantizers.log2 import EXPONENTIALS, IntegerSoftmaxQuantizer, Log2Quantizer
from quanttune.quantization.quantizers.powers_of_two import shift_errors, shifted_quantizer
from quanttune.quantization.scheme import NARROWEST, WIDEST
from quanttune.quantization.statistics import no_value

ATTENTION = ("uniform", "log2", "integer")
_WIDTHS = (8, 7, 6)  # searched together, so that a table's widths share one pass
_MASKED = -1e30
_WEIGHTLESS = 60.0
"""Scores further below their row's largest weigh less than ``1e-26``: masks, also those of -100 (Swin)."""


@METHODS.register("fq_vit")
@dataclass(frozen=True)
class FqVit(Method):
    """Asymmetric min-max activations, per-channel weights, and two quantizers of its own.

    - Tensors that a layer normalisation reads get the powers-of-two factor: per-channel scales a shift apart.
    - Attention probabilities may be stored as powers of two, with the softmax in floating point or on
      integers.

    Choices where the paper, its code and our protocol differ:

    - The published tables with attention at 8 bits use uniform attention; that is the default. Those with
      attention at 4 bits are ``attention="integer"``; ``"log2"`` isolates its quantizer from its integer
      arithmetic.
    - The factor is searched on all calibration data; the reference code uses the last batch alone.
    - Zero is always representable and ranges are asymmetric whatever the suite says of symmetry, as in the
      paper.
    - The integer softmax uses the exponential of the reference code, not I-BERT's, to which the paper refers:
      its probabilities are nearer to the softmax's at every step of the scores (tests/test_fq_vit.py).
    - Scores are rounded to steps below their row's largest; the reference code rounds each on the grid of all
      scores first. Masked ones, which it does not know, are left out of the range that the step comes from.
    - Normalisations compute in floating point on the integers they read; the code can compute them on
      integers (its ``INT_NORM``).
    - The output of the final normalisation is calibrated over all tokens; the code keeps the class token
      alone there. A LayerScale, which its models lack, is one more multiplication in float.
    - Widths other than 8 do not exist in the reference code: the same formulas with ``b`` bits.
    - The paper also quantizes position embeddings, attention scores and logits. Our profiles leave these in
      float, for every method alike; ``attention="integer"`` does put scores on a grid.
    - In profile ``matmul`` no tensor in front of a normalisation is quantized, so the factor has nothing to
      act on.

    Args:
        factor: Whether the powers-of-two factor is used.
        attention: ``uniform``, ``log2`` or ``integer`` (Log-Int-Softmax).
        exponential: That of the integer softmax, ``reference-code`` or ``paper``: see
            :data:`~quanttune.quantization.quantizers.log2.EXPONENTIALS`.
        attention_bits: Width of the attention probabilities; 0 for the width of the other activations if
            uniform and for 4 otherwise.

    Raises:
        ConfigError: If ``attention`` or ``exponential`` is something else, or ``attention_bits`` no width.
    """

    name: ClassVar[str] = "fq_vit"
    variant: ClassVar[str] = "paper"
    version: ClassVar[int] = 2
    changes: ClassVar[str] = "quantizers"
    source: ClassVar[str] = "arXiv 2111.13824, IJCAI 2022"
    licence: ClassVar[str] = "Apache-2.0"
    factor: bool = True
    attention: str = "uniform"
    attention_bits: int = 0
    exponential: str = "reference-code"

    def __post_init__(self) -> None:
        if self.attention not in ATTENTION:
            raise ConfigError(f"fq_vit attention {self.attention!r} is not one of {', '.join(ATTENTION)}")
        if self.exponential not in EXPONENTIALS:
            raise ConfigError(
                f"fq_vit exponential {self.exponential!r} is not one of {', '.join(EXPONENTIALS)}"
            )
        if self.attention_bits and not NARROWEST <= self.attention_bits <= WIDEST:
            raise ConfigError(
                f"fq_vit attention_bits {self.attention_bits} is outside {NARROWEST} to {WIDEST}; "
                "0 is the usual width"
            )

    def skip(self, sites: SiteTable, scheme: Scheme) -> str | None:
        """Without a softmax or a normalisation, or without static activations, FQ-ViT is plain min-max."""
        if not scheme.is_static:
            return f"under {scheme} no activation has a static range, on which FQ-ViT differs from min-max"
        if any(site.kind in (SiteKind.SOFTMAX, SiteKind.NORM) for site in sites.values()):
            return None
        return "the model has neither attention nor layer normalisation, on which FQ-ViT differs from min-max"

    def quantize(self, context: Context) -> Quantized:
        """Calibrate all widths in one pass over the data, then build the quantizers of the cell's width."""
        assert context.scheme.activations is not None  # noqa: S101 - such cells are skipped
        bits = context.scheme.activations.bits
        widths = _WIDTHS if bits in _WIDTHS else (bits,)
        key = {
            **context.stage_key(),
            "profile": context.scheme.profile,
            "widths": list(widths),
            "version": self.version,
        }
        found = context.stages.tensors("fq_vit", key, lambda: calibrate(context, widths))
        parameters = dict(context.model.named_parameters())
        quantizers: dict[str, Quantizer] = {}
        shifted: dict[str, list[int]] = {}
        for site in context.profile_sites.values():
            if site.kind is SiteKind.WEIGHT:
                quantizers[site.id] = weight_quantizer(
                    site_weight(site, parameters), context.scheme.weights, site.channel_axis or 0
                )
            elif site.kind is SiteKind.SOFTMAX:
                quantizers[site.id] = self._attention_quantizer(site.id, found, bits)
            else:
                base = _base(found, site.id, bits)
                shifts = found.get(f"{site.id}|shifts{bits}") if self.factor else None
                if shifts is None:
                    quantizers[site.id] = base
                else:
                    quantizers[site.id] = shifted_quantizer(base, shifts, site.channel_axis or 0)
                    shifted[site.id] = torch.bincount(shifts, minlength=4).tolist()
        details = {"channels_by_shift": shifted}
        return Quantized(quantizers, details=details, scheme=context.scheme)

    def _attention_quantizer(self, site_id: str, found: Mapping[str, Tensor], bits: int) -> Quantizer:
        if self.attention == "uniform":
            return _base(found, site_id, self.attention_bits or bits)
        width = self.attention_bits or 4
        if self.attention == "log2":
            return Log2Quantizer(width)
        low, high = found[f"{site_id}|scores"]
        step = significant(quotient((high - low).clamp(min=1e-6), 2**bits - 1))
        return IntegerSoftmaxQuantizer(width, float(step), self.exponential)


def _base(found: Mapping[str, Tensor], site_id: str, bits: int) -> UniformQuantizer:
    low, high = found[f"{site_id}|range"].tolist()
    return UniformQuantizer.asymmetric(low, high, bits)


def calibrate(context: Context, widths: tuple[int, ...]) -> dict[str, Tensor]:
    """Ranges of every activation site and of the scores, and shifts in front of normalisations.

    The data are gone through twice where there are normalisations: the candidates of the factor follow from
    the range of all of it, and the values themselves would not fit the memory.
    """
    activations = context.profile_sites.activations()
    bounds = {site_id: _Bounds() for site_id in activations}
    scores = {site.id: _Scores() for site in activations.values() if site.kind is SiteKind.SOFTMAX}
    readers = {context.sites[site_id].sibling("input"): observer for site_id, observer in scores.items()}
    _observe(context, {**bounds, **readers}, "FQ-ViT ranges")
    for site_id, seen in bounds.items():
        if not seen.seen:
            raise no_value(site_id)
    found = {f"{site_id}|range": observer.range for site_id, observer in bounds.items()}
    found |= {f"{site_id}|scores": observer.range for site_id, observer in scores.items() if observer.seen}
    errors = {
        site.id: _ShiftErrors(site.channel_axis, [_base(found, site.id, bits) for bits in widths])
        for site in activations.values()
        if site.channel_axis is not None and _is_normalised(site, context.sites)
    }
    if errors:
        _observe(context, errors, "FQ-ViT factors")
    for site_id, observer in errors.items():
        for bits, of_width in zip(widths, observer.errors, strict=True):
            found[f"{site_id}|shifts{bits}"] = of_width.argmin(dim=0)
    return found


def _observe(context: Context, observers: Mapping[str, Observer], stage: str) -> None:
    total = len(context.calibration)
    observe(
        context.model,
        (to_device(batch.inputs, context.device) for batch in context.calibration),
        observers,
        progress=lambda done: context.progress(stage, done, total),
        known=context.sites.known,
    )


def _is_normalised(site: Site, sites: SiteTable) -> bool:
    """Whether a normalisation reads the tensor."""
    return any(reader in sites and sites[reader].kind is SiteKind.NORM_INPUT for reader in site.consumers)


class _Bounds(Observer):
    """The smallest and the largest value over all data."""

    def __init__(self) -> None:
        self.low, self.high = math.inf, -math.inf

    @property
    def seen(self) -> bool:
        """Whether there was any value."""
        return self.low <= self.high

    @property
    def range(self) -> Tensor:
        """Both ends, float64, shape ``(2,)``."""
        return torch.tensor((self.low, self.high), dtype=torch.float64)

    def update(self, values: Tensor, bounds: Bounds) -> None:
        self.low, self.high = min(bounds[0], self.low), max(bounds[1], self.high)


class _ShiftErrors(Observer):
    """The error of every candidate of the powers-of-two factor, summed over all data.

    Args:
        axis: The channel dimension.
        bases: The quantizers of the whole tensor, one a width.

    Attributes:
        errors: One tensor a base, of shape ``(candidates, channels)``, float64.
    """

    def __init__(self, axis: int, bases: Sequence[UniformQuantizer]) -> None:
        self._axis, self._bases = axis, bases
        self.errors: list[Tensor] = []

    def update(self, values: Tensor, bounds: Bounds) -> None:
        found = shift_errors(values.movedim(self._axis, -1).flatten(0, -2), self._bases)
        before = self.errors or [torch.zeros_like(each) for each in found]
        self.errors = [total + each for total, each in zip(before, found, strict=True)]


class _Scores(_Bounds):
    """Bounds of the attention scores; masked ones are not counted."""

    finite: ClassVar[bool] = False

    def update(self, values: Tensor, bounds: Bounds) -> None:
        largest = values.amax(dim=-1, keepdim=True)
        # Whatever stands for minus infinity.
        counted = (values >= largest - _WEIGHTLESS) & (largest > _MASKED)
        low = float(torch.where(counted, values, math.inf).amin())
        if low < math.inf:
            super().update(values, (low, float(largest.amax())))
