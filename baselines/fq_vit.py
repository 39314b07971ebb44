"""FQ-ViT: post-training quantization for fully quantized vision transformers (arXiv 2111.13824)."""

from __future__ import annotations

import math
from collections.abc import Mapping
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
from quanttune.quantization.quantizers.grid import significant
from quanttune.quantization.quantizers.log2 import SHIFTS, IntegerSoftmaxQuantizer, Log2Quantizer
from quanttune.quantization.quantizers.powers_of_two import shift_errors, shifted_quantizer
from quanttune.quantization.scheme import NARROWEST, WIDEST

ATTENTION = ("uniform", "log2", "integer")
_WIDTHS = (8, 7, 6)  # searched together, so that a table's widths share one pass
_HALF_LIMIT = 6e4  # larger activations do not fit float16
_MASKED = -1e30
_EFFECTIVE = SHIFTS * math.log(2)  # scores further below their row's largest weigh nothing


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
    - Widths other than 8 do not exist in the reference code: the same formulas with ``b`` bits.
    - The paper also quantizes position embeddings, attention scores and logits. Our profiles leave these in
      float, for every method alike; ``attention="integer"`` does put scores on a grid.
    - In profile ``matmul`` no tensor in front of a normalisation is quantized, so the factor has nothing to
      act on.

    Args:
        factor: Whether the powers-of-two factor is used.
        attention: ``uniform``, ``log2`` or ``integer`` (Log-Int-Softmax).
        attention_bits: Width of the attention probabilities; 0 for the width of the other activations if
            uniform and for 4 otherwise.

    Raises:
        ConfigError: If ``attention`` is something else, or ``attention_bits`` no width.
    """

    name: ClassVar[str] = "fq_vit"
    variant: ClassVar[str] = "paper"
    factor: bool = True
    attention: str = "uniform"
    attention_bits: int = 0

    def __post_init__(self) -> None:
        if self.attention not in ATTENTION:
            raise ConfigError(f"fq_vit attention {self.attention!r} is not one of {', '.join(ATTENTION)}")
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
        step = significant((high - low).clamp(min=1e-6) / (2**bits - 1))
        return IntegerSoftmaxQuantizer(width, float(step))


def _base(found: Mapping[str, Tensor], site_id: str, bits: int) -> UniformQuantizer:
    low, high = found[f"{site_id}|range"].tolist()
    return UniformQuantizer.asymmetric(low, high, bits)


def calibrate(context: Context, widths: tuple[int, ...]) -> dict[str, Tensor]:
    """Ranges of every activation site and of the scores, and shifts in front of normalisations."""
    values: dict[str, _Values] = {}
    scores: dict[str, _Scores] = {}
    for site in context.profile_sites.activations().values():
        values[site.id] = _Values(site.channel_axis if _is_normalised(site, context.sites) else None)
        if site.kind is SiteKind.SOFTMAX:
            scores[site.id] = _Scores()
    readers = {context.sites[site_id].sibling("input"): observer for site_id, observer in scores.items()}
    total = len(context.calibration)
    observe(
        context.model,
        (to_device(batch.inputs, context.device) for batch in context.calibration),
        {**values, **readers},
        progress=lambda done: context.progress("FQ-ViT calibration", done, total),
        known=context.sites.known,
    )
    found = {f"{site_id}|range": observer.range for site_id, observer in values.items()}
    found |= {f"{site_id}|scores": observer.range for site_id, observer in scores.items() if observer.seen}
    for site_id, observer in values.items():
        if observer.axis is None:
            continue
        bases = [_base(found, site_id, bits) for bits in widths]
        for bits, errors in zip(widths, shift_errors(observer.take(), bases), strict=True):
            found[f"{site_id}|shifts{bits}"] = errors.argmin(dim=0)
        found[f"{site_id}|axis"] = torch.tensor(observer.axis)
    return found


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


class _Values(_Bounds):
    """Bounds of a site and, in front of a normalisation, its values by channel.

    Args:
        axis: The channel dimension, if values are to be kept.
    """

    def __init__(self, axis: int | None) -> None:
        super().__init__()
        self.axis = axis
        self._kept: list[Tensor] = []

    def update(self, values: Tensor, bounds: Bounds) -> None:
        super().update(values, bounds)
        if self.axis is not None:
            rows = values.movedim(self.axis, -1).flatten(0, -2)
            small = max(-self.low, self.high) < _HALF_LIMIT
            kept = rows.half() if small else rows.clone()
            # Too much for a GPU to hold.
            self._kept.append(kept.cpu())

    def take(self) -> list[Tensor]:
        """The rows of all data, each part of shape ``(rows, channels)``; they are not kept any longer."""
        kept, self._kept = self._kept, []
        return kept


class _Scores(_Bounds):
    """Bounds of the attention scores that weigh something; masked ones are not counted."""

    finite: ClassVar[bool] = False

    def update(self, values: Tensor, bounds: Bounds) -> None:
        largest = values.amax(dim=-1, keepdim=True)
        # Whatever stands for minus infinity.
        counted = (values >= largest - _EFFECTIVE) & (largest > _MASKED)
        low = float(torch.where(counted, values, math.inf).amin())
        if low < math.inf:
            super().update(values, (low, float(largest.amax())))
