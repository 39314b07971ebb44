"""RepQ-ViT: channels of layer-norm outputs brought to one step, and a softmax in powers of sqrt 2.

Li et al. 2023, arXiv 2212.08254.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from baselines.folding import Group, find_groups, folded_state, has_groups
from baselines.method import METHODS, Context, Method
from baselines.searching.quantile_search import (
    Vectors,
    in_parts,
    quantile_range,
    row_ranges,
    softmax_scale,
    steps_of,
    weight_quantizer_of,
)
from quanttune.inputs import batch_size_of, to_device
from quanttune.quantization import (
    PerChannel,
    PerTensor,
    Quantized,
    Quantizer,
    ScaledPair,
    Scheme,
    SiteKind,
    SiteTable,
    UniformQuantizer,
    activation_quantizer,
    observe,
    site_weight,
)
from quanttune.quantization.quantizers.grid import significant
from quanttune.quantization.quantizers.log_sqrt2 import LogSqrt2Quantizer

MEMORY = 1 << 29
"""Bytes of activations held at once; larger networks are gone through several times."""
NARROWEST_STEP = 2.0**-20
"""Smallest step of a channel, as a share of the tensor's largest."""


@METHODS.register("repq_vit")
@dataclass(frozen=True)
class RepqVit(Method):
    """Complex quantizers for calibration, simple ones for inference.

    - Tensors that a normalisation returns and linear layers read are first quantized per channel, with steps
      ``s_j`` and zero points ``z_j``. Then ``r1 = s / mean(s)`` and ``r2 = z - mean(z)`` go into the
      normalisation and the layers (section 3.2), so that one step and one zero point give the codes that the
      channels' own gave.
    - Softmax outputs are powers of the root of two: see
      :class:`~quanttune.quantization.quantizers.log_sqrt2.LogSqrt2Quantizer`.
    - Both ends of every range, of activations, weights per output channel and the softmax's scale, lie at one
      of three quantiles: that of the least squared error.

    Choices where the paper, its code and our protocol differ:

    - Symmetry follows the scheme, for weights and activations; the paper is asymmetric (``-asym``, ``z``).
      With symmetric activations there is no zero point, so ``r1`` alone acts, and scaled quantizer pairs
      compute it without a change of weights. With asymmetric ones ``r1`` and ``r2`` are folded into the
      weights.
    - The mean zero point is rounded to a code, and ``r2`` takes up the rest; the code keeps a fraction.
    - A fold needs a bias for ``r2``. Where a layer has none (the code gives it one: Swin's ``reduction``), or
      something else reads the tensor as well (post-norm models), or windows are filled up with zeros in
      between (a Swin on pictures whose size they do not divide), ``r1`` acts alone, in a pair.
    - All calibration items are used, padding included; the paper takes 32 images. Every linear layer behind a
      normalisation is a reader, the classifier behind the last one as well (the paper names the two
      normalisations of a block), although it may read one token of many.
    - A channel that is constant in calibration gets the mean step.
    - Softmax outputs have the width of the other activations, as in the paper's tables.
    - Profile ``full`` quantizes more than the paper does, with the same search.

    Args:
        reparameterise: Whether channels are brought to one step; without it each such tensor has one range
            from the start.
        log_softmax: Whether softmax outputs have the logarithmic quantizer, or a uniform one.
    """

    name: ClassVar[str] = "repq_vit"
    variant: ClassVar[str] = "paper"
    version: ClassVar[int] = 1
    changes: ClassVar[str] = "weights, same function; quantizers"
    source: ClassVar[str] = "arXiv 2212.08254, ICCV 2023"
    licence: ClassVar[str] = "Apache-2.0"
    reparameterise: bool = True
    log_softmax: bool = True

    def skip(self, sites: SiteTable, scheme: Scheme) -> str | None:
        """It needs static activations, weights without groups, and something that it treats differently."""
        if not scheme.is_static:
            return f"under {scheme} no activation has a static range, in which RepQ-ViT has its means"
        if not isinstance(scheme.weights.granularity, PerChannel | PerTensor):
            return f"the search knows weights per channel and per tensor, not those of {scheme}"
        if has_groups(sites) or any(site.kind is SiteKind.SOFTMAX for site in sites.values()):
            return None
        return "the model has neither attention nor a linear layer behind a normalisation"

    def quantize(self, context: Context) -> Quantized:
        """Per-channel steps on the reference; then everything else on what they make of it."""
        form = context.scheme.activations
        assert form is not None  # noqa: S101 - such cells are skipped
        groups = find_groups(context) if self.reparameterise else []
        found = self._steps(context, groups)
        folded = [group for group in groups if group.takes_shift and not form.symmetric]
        pairs: list[ScaledPair] = []
        given: dict[str, UniformQuantizer] = {}
        changes = []
        for group in groups:
            steps, zeros = (found[f"{group.site}|{what}"] for what in ("step", "zero"))
            merged = Merged.of(steps, zeros, form.bits, form.symmetric)
            if group in folded:
                changes.append((group, merged.factors, merged.shift))
            else:
                pairs.append(group.pair(merged.factors))
            # With zero points that r1 alone cannot bring together, a range is chosen as anywhere else.
            if group in folded or form.symmetric:
                given |= dict.fromkeys(group.carriers, merged.quantizer())
        weights = folded_state(context.model, changes) if changes else None
        changed = context if weights is None else context.changed(weights)
        quantizers = self._quantizers(changed, pairs, given)
        details = {"folded_tensors": len(folded), "paired_tensors": len(pairs)}
        return Quantized(
            quantizers,
            weights=weights,
            details=details,
            scheme=context.scheme,
            transforms=tuple(pairs),
            same_function=weights is not None,
        )

    def _quantizers(
        self,
        context: Context,
        pairs: list[ScaledPair],
        given: Mapping[str, UniformQuantizer],
    ) -> dict[str, Quantizer]:
        form = context.scheme.activations
        assert form is not None  # noqa: S101 - such cells are skipped
        statistics = context.statistics(pairs)
        parameters = dict(context.model.named_parameters())
        of_site = {site_id: pair for pair in pairs for site_id in pair.sites}
        weights = context.scheme.weights
        quantizers: dict[str, Quantizer] = {}
        for site in context.profile_sites.values():
            pair = of_site.get(site.id)
            made: Quantizer
            if site.kind is SiteKind.WEIGHT:
                weight = site_weight(site, parameters)
                made = weight_quantizer_of(
                    weight if pair is None else pair.seen(site.id, weight.detach()),
                    weights.bits,
                    weights.symmetric,
                    site.channel_axis or 0,
                    isinstance(weights.granularity, PerChannel),
                )
            elif site.id in given:
                made = given[site.id]
            elif site.kind is SiteKind.SOFTMAX and self.log_softmax:
                scale = softmax_scale(statistics[site.id].histogram, form.bits)
                made = LogSqrt2Quantizer(form.bits, _sixteen_bits(scale))
            else:
                made = activation_quantizer(site, statistics.get(site.id), form, quantile_range)
            quantizers[site.id] = made if pair is None else pair.around(site.id, made)
        return quantizers

    def _steps(self, context: Context, groups: list[Group]) -> dict[str, Tensor]:
        """``|step`` and ``|zero`` of every channel of each group's tensor."""
        form = context.scheme.activations
        assert form is not None  # noqa: S101 - such cells are skipped
        if not groups:
            return {}
        key = {
            **context.stage_key(),
            "method": self.name,
            "version": self.version,
            "bits": form.bits,
            "symmetric": form.symmetric,
            "tensors": [group.site for group in groups],
        }
        return context.stages.tensors("repq_vit", key, lambda: channel_steps(context, groups))


@dataclass(frozen=True)
class Merged:
    """Per-channel quantizers brought to one step and one zero point.

    Args:
        steps: ``s_j``, positive, float64, shape ``(channels,)``.
        zeros: ``z_j``, whole numbers.
        step: The common step.
        zero: The common zero point.
        bits: Width.
        symmetric: Whether codes are signed.
    """

    steps: Tensor
    zeros: Tensor
    step: float
    zero: int
    bits: int
    symmetric: bool

    @classmethod
    def of(cls, steps: Tensor, zeros: Tensor, bits: int, symmetric: bool) -> Merged:
        """With the mean step, and the mean zero point rounded to the nearest code."""
        step = float(significant(steps.mean()))
        zero = 0 if symmetric else int(zeros.mean().round().clamp(0, 2**bits - 1))
        return cls(steps, zeros, step, zero, bits, symmetric)

    @property
    def factors(self) -> Tensor:
        """``r1 = s / mean(s)``."""
        return self.steps / self.step

    @property
    def shift(self) -> Tensor:
        """What is subtracted before the division by ``r1``: ``-s r2``."""
        return -self.steps * (self.zeros - self.zero)

    def quantizer(self) -> UniformQuantizer:
        """The common quantizer, of ``(x + s r2) / r1``."""
        top = 2 ** (self.bits - 1) - 1 if self.symmetric else 2**self.bits - 1
        step = torch.tensor(self.step, dtype=torch.float64)
        zero = torch.tensor(float(self.zero), dtype=torch.float64)
        return UniformQuantizer(step, zero, -top if self.symmetric else 0, top)


def channel_steps(context: Context, groups: list[Group]) -> dict[str, Tensor]:
    """Steps and zero points of every channel of each group's tensor, by the search of three quantiles."""
    form = context.scheme.activations
    assert form is not None  # noqa: S101 - the method skips such cells
    by_site = {group.site: group for group in groups}
    parts = in_parts({site: _bytes(context, group) for site, group in by_site.items()}, MEMORY)
    total = len(context.calibration) * len(parts)
    found: dict[str, Tensor] = {}

    def report(before: int, batches: int) -> None:
        context.progress("RepQ-ViT channels", before + batches, total)

    for done, part in enumerate(parts):
        observers = {site: Vectors() for site in part}
        observe(
            context.model,
            (to_device(batch.inputs, context.device) for batch in context.calibration),
            observers,
            progress=partial(report, done * len(context.calibration)),
            known=context.sites.known,
        )
        for site, observer in observers.items():
            # Ranges need not hold zero: the zero point may lie beyond the codes, r2 takes it up.
            low, high = row_ranges(observer.by_channel(), form.bits, form.symmetric, holds_zero=False)
            found[f"{site}|step"], found[f"{site}|zero"] = _usable(low, high, form.bits, form.symmetric)
    return found


def _usable(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Steps that can be divided by, of 16 significant bits, and their zero points."""
    steps, _, _, _ = steps_of(low, high, bits, symmetric)
    constant = (high if symmetric else high - low) <= 0
    mean = steps[~constant].mean() if not bool(constant.all()) else torch.ones((), dtype=torch.float64)
    steps = torch.where(constant, mean, steps)
    steps = significant(torch.maximum(steps, steps.max() * NARROWEST_STEP))
    zeros = torch.zeros_like(steps) if symmetric else torch.round(-low / steps)
    return steps, zeros


def _bytes(context: Context, group: Group) -> int:
    """What the calibration values of a tensor take up."""
    shape = context.sites[group.site].shape
    items = sum(batch_size_of(batch.inputs) for batch in context.calibration)
    tokens = math.prod(shape[:-1])
    for batch in context.calibration:
        # Where tokens are joined with the items, the site's shape does not tell how many there are.
        named = batch.inputs.values() if isinstance(batch.inputs, Mapping) else ()
        tokens = max([tokens, *(each.shape[1] for each in named if each.dim() == 2)])
    return 4 * items * tokens * group.channels


def _sixteen_bits(value: float) -> float:
    return float(significant(torch.tensor(value, dtype=torch.float64)))
