"""FQ-ViT: post-training quantization for fully quantized vision transformers (arXiv 2111.13824)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from baselines.method import METHODS, Context, Method, Quantized
from quanttune.errors import ConfigError, QuantTuneError
from quanttune.inputs import call_model, to_device
from quanttune.quantization import (
    Quantizer,
    SiteHandlers,
    SiteKind,
    SiteTable,
    UniformQuantizer,
    weight_quantizer,
)
from quanttune.quantization.log2 import SHIFTS, IntegerSoftmaxQuantizer, Log2Quantizer
from quanttune.quantization.powers_of_two import shift_errors, shifted_quantizer

ATTENTION = ("uniform", "log2", "integer")
_WIDTHS = (8, 7, 6)  # searched together, so that a table's widths share one pass
_HALF_LIMIT = 6e4  # larger activations do not fit float16
_MASKED = -1e30
_NORMS = ("/layer_norm", "/rms_norm")
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
        ConfigError: If ``attention`` is something else.
    """

    name: ClassVar[str] = "fq_vit"
    variant: ClassVar[str] = "paper"
    factor: bool = True
    attention: str = "uniform"
    attention_bits: int = 0

    def __post_init__(self) -> None:
        if self.attention not in ATTENTION:
            raise ConfigError(f"fq_vit attention {self.attention!r} is not one of {', '.join(ATTENTION)}")

    def skip(self, sites: SiteTable, profile: str) -> str | None:
        """Without a softmax or a normalisation FQ-ViT is plain min-max."""
        if any(site.kind in (SiteKind.SOFTMAX, SiteKind.NORM) for site in sites.values()):
            return None
        return "the model has neither attention nor layer normalisation, on which FQ-ViT differs from min-max"

    def quantize(self, context: Context) -> Quantized:
        """Calibrate all widths in one pass over the data, then build the quantizers of the cell's width."""
        bits = context.precision.activations
        widths = _WIDTHS if bits in _WIDTHS else (bits,)
        key = {
            **context.stage_key(),
            "profile": context.profile,
            "widths": list(widths),
            "version": self.version,
        }
        found = context.stages.tensors("fq_vit", key, lambda: calibrate(context, widths))
        parameters = dict(context.model.named_parameters())
        quantizers: dict[str, Quantizer] = {}
        shifted: dict[str, list[int]] = {}
        for site in context.profile_sites.values():
            if site.kind is SiteKind.WEIGHT:
                if site.parameter is None:
                    raise ConfigError(
                        f"site {site.id}: its weight is computed and cannot be quantized statically"
                    )
                quantizers[site.id] = weight_quantizer(
                    parameters[site.parameter], context.precision.weights, context.weight_granularity
                )
            elif site.kind is SiteKind.SOFTMAX:
                quantizers[site.id] = self._attention_quantizer(site.id, found, bits)
            else:
                base = _base(found, site.id, bits)
                shifts = found.get(f"{site.id}|shifts{bits}") if self.factor else None
                if shifts is None:
                    quantizers[site.id] = base
                else:
                    quantizers[site.id] = shifted_quantizer(base, shifts, int(found[f"{site.id}|axis"]))
                    shifted[site.id] = torch.bincount(shifts, minlength=4).tolist()
        return Quantized(quantizers, details={"channels_by_shift": shifted})

    def _attention_quantizer(self, site_id: str, found: Mapping[str, Tensor], bits: int) -> Quantizer:
        if self.attention == "uniform":
            return _base(found, site_id, self.attention_bits or bits)
        width = self.attention_bits or 4
        if self.attention == "log2":
            return Log2Quantizer(width)
        low, high = found[f"{site_id}|scores"].tolist()
        return IntegerSoftmaxQuantizer(width, max(high - low, 1e-6) / (2**bits - 1))


def _base(found: Mapping[str, Tensor], site_id: str, bits: int) -> UniformQuantizer:
    low, high = found[f"{site_id}|range"].tolist()
    return UniformQuantizer.asymmetric(low, high, bits)


def calibrate(context: Context, widths: tuple[int, ...]) -> dict[str, Tensor]:
    """Ranges of every activation site and of the scores, and shifts in front of normalisations."""
    observer = _Observer(context.profile_sites)
    total = len(context.calibration)
    with torch.no_grad(), SiteHandlers(context.model, observer.handlers()):
        for done, batch in enumerate(context.calibration, start=1):
            call_model(context.model, to_device(batch.inputs, context.device))
            observer.seen.clear()
            context.progress("FQ-ViT calibration", done, total)
    if not total:
        raise QuantTuneError("the calibration set is empty; give at least one batch")
    return observer.results(widths)


class _Observer:
    """What FQ-ViT needs of one pass: bounds of every site, and the values in front of normalisations."""

    def __init__(self, sites: SiteTable) -> None:
        self.seen: dict[str, Tensor] = {}
        self._sites = sites
        self._bounds: dict[str, tuple[float, float]] = {}
        self._kept: dict[str, list[Tensor]] = {}
        self._axes: dict[str, int | None] = {}

    def handlers(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """One handler for every activation site, softmax input and normalisation input."""
        handlers: dict[str, Callable[[Tensor], Tensor]] = {}
        for site in self._sites.activations().values():
            readers = list(_norm_readers(site.consumers))
            handlers[site.id] = self._watch(site.id, keep=bool(readers))
            if site.kind is SiteKind.SOFTMAX:
                handlers[f"{site.operation}.input"] = self._scores(site.id)
            for reader in readers:
                handlers[reader] = self._normalised(site.id)
        return handlers

    def results(self, widths: tuple[int, ...]) -> dict[str, Tensor]:
        """Everything as tensors that a stage can keep."""
        found = {name: torch.tensor(bounds, dtype=torch.float64) for name, bounds in self._bounds.items()}
        for site_id, axis in self._axes.items():
            if axis is None:
                continue
            bases = [_base(found, site_id, bits) for bits in widths]
            for bits, errors in zip(widths, shift_errors(self._kept.pop(site_id), bases), strict=True):
                found[f"{site_id}|shifts{bits}"] = errors.argmin(dim=0)
            found[f"{site_id}|axis"] = torch.tensor(axis)
        return found

    def _watch(self, site_id: str, keep: bool) -> Callable[[Tensor], Tensor]:
        def watch(values: Tensor) -> Tensor:
            low, high = (float(bound) for bound in torch.aminmax(values))
            if not (abs(low) < float("inf") and abs(high) < float("inf")):
                raise QuantTuneError(f"site {site_id}: a calibration activation is NaN or infinite")
            self._widen(f"{site_id}|range", low, high)
            if keep:
                self.seen[site_id] = values
            return values

        return watch

    def _normalised(self, site_id: str) -> Callable[[Tensor], Tensor]:
        """Where the normalisation reads: only here is it known which dimension holds the channels."""

        def keep(values: Tensor) -> Tensor:
            source = self.seen.pop(site_id, None)  # absent if another normalisation has read it already
            if source is not None:
                axis = self._axes.setdefault(site_id, channel_axis(source, values))
                if axis is not None:
                    rows = source.movedim(axis, -1).flatten(0, -2)
                    low, high = self._bounds[f"{site_id}|range"]
                    small = max(-low, high) < _HALF_LIMIT
                    kept = rows.half() if small else rows.clone()
                    self._kept.setdefault(site_id, []).append(kept.cpu())  # too much for a GPU to hold
            return values

        return keep

    def _scores(self, site_id: str) -> Callable[[Tensor], Tensor]:
        def watch(values: Tensor) -> Tensor:
            largest = values.amax(dim=-1, keepdim=True)
            # Masked scores, whatever stands for minus infinity, are not counted.
            counted = (values >= largest - _EFFECTIVE) & (largest > _MASKED)
            low = float(torch.where(counted, values, math.inf).amin())
            if low < math.inf:
                self._widen(f"{site_id}|scores", low, float(largest.amax()))
            return values

        return watch

    def _widen(self, name: str, low: float, high: float) -> None:
        old_low, old_high = self._bounds.get(name, (low, high))
        self._bounds[name] = (min(low, old_low), max(high, old_high))


def _norm_readers(consumers: tuple[str, ...]) -> Iterator[str]:
    return (reader for reader in consumers if any(norm in reader for norm in _NORMS))


def channel_axis(source: Tensor, normalised: Tensor) -> int | None:
    """Which dimension of ``source`` a normalisation sees as its channels.

    Args:
        source: A tensor with the batch first.
        normalised: A rearrangement of it, as the normalisation reads it.

    Returns:
        The dimension, or ``None`` if no dimension of ``source`` holds the channels. Where a patch merging
        puts several positions side by side, every channel it makes belongs to one channel of ``source``,
        whose dimension counts.
    """
    channels = normalised.shape[-1]
    fitting = [axis for axis in range(1, source.dim()) if source.shape[axis] == channels]
    if len(fitting) > 1 and source.untyped_storage().data_ptr() == normalised.untyped_storage().data_ptr():
        fitting = [axis for axis in fitting if source.stride(axis) == normalised.stride(-1)] or fitting
    if fitting:
        return fitting[-1]
    return source.dim() - 1 if channels % source.shape[-1] == 0 else None
