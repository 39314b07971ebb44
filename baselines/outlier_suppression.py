"""Outlier Suppression: gamma migration and token-wise clipping (Wei et al. 2022, arXiv 2209.13325)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from baselines.folding import find_groups
from baselines.method import METHODS, Context, Method
from baselines.ptq4vit import first_items
from baselines.searching.token_clipping import (
    Batches,
    CountedTokens,
    output_of,
    shares,
    squared_error,
    token_axis,
    token_range,
)
from quanttune.errors import ConfigError
from quanttune.inputs import to_device
from quanttune.quantization import (
    RANGE_RULES,
    Quantized,
    Quantizer,
    ScaledPair,
    Scheme,
    SiteTable,
    TensorStatistics,
    activation_quantizer,
    build_quantizers,
    observe,
)
from quanttune.quantization.quantizers.grid import significant


@METHODS.register("outlier_suppression")
@dataclass(frozen=True)
class OutlierSuppression(Method):
    """The normalisation's ``gamma`` goes into the weights behind it, and the ranges cover most tokens.

    - Gamma migration (section 4.1): a normalisation returns ``(x - mean) / deviation + beta / gamma``, which
      is quantized, and the linear layers read it with ``W gamma``. The residual, where it reads the tensor,
      multiplies by ``gamma``: see ``extra_operations``. Scaled quantizer pairs with the factors ``gamma``
      compute that.
    - Token-wise clipping (section 4.2), coarse stage: :mod:`baselines.searching.token_clipping`. Attention
      probabilities have min-max ranges.

    Choices where the paper, its code and our protocol differ:

    - A ``gamma`` near zero would make ``beta / gamma`` explode: magnitudes are not below ``floor`` times
      their mean, signs are kept. The record says how many channels that concerns.
    - The fine stage of the clipping, which learns the steps by gradient, is left out.
    - The output that is compared is that of the network with all its quantizers, on the first ``images``
      items of calibration; the paper uses 256 samples for ranges and search.
    - Ranges come from all calibration tokens; the code averages over batches. Padding is left out of the
      clipping's quantiles and of the error, not of the min-max ranges of probabilities.
    - Symmetry and weights follow the scheme.
    - Every linear layer behind a normalisation is a reader, the classifier behind the last one as well. A
      normalisation that multiplies by something else than its parameter (``1 + weight``) stays as it is.

    Args:
        migration: Whether gamma migrates.
        clipping: Whether ranges clip tokens; min-max otherwise.
        floor: Smallest magnitude of a factor, as a share of the mean.
        images: Items on which the network's output is compared.

    Raises:
        ConfigError: If the floor is not above 0 and at most 1, or there is no item.
    """

    name: ClassVar[str] = "outlier_suppression"
    variant: ClassVar[str] = "ours"
    version: ClassVar[int] = 1
    changes: ClassVar[str] = "weights, same function; ranges"
    source: ClassVar[str] = "arXiv 2209.13325, NeurIPS 2022"
    licence: ClassVar[str] = "none"
    migration: bool = True
    clipping: bool = True
    floor: float = 0.01
    images: int = 32

    def __post_init__(self) -> None:
        if not 0 < self.floor <= 1:
            raise ConfigError(f"outlier_suppression floor {self.floor} is not above 0 and at most 1")
        if self.images < 1:
            raise ConfigError(f"outlier_suppression images {self.images}: give at least one item to compare")

    def skip(self, sites: SiteTable, scheme: Scheme) -> str | None:
        """There must be static ranges to choose."""
        if scheme.is_static:
            return None
        return f"under {scheme} no activation has a static range that could be clipped"

    def quantize(self, context: Context) -> Quantized:
        """Migrate, collect the tokens' extremes of what the quantizers see, and search the share."""
        pairs, details = self._pairs(context) if self.migration else ([], {})
        quantizers = build_quantizers(
            context.model,
            context.profile_sites,
            context.statistics(pairs),
            context.scheme,
            RANGE_RULES.get("minmax"),
            pairs,
        )
        if self.clipping:
            extremes = self._extremes(context, pairs)
            share = self._share(context, pairs, quantizers, extremes)
            quantizers |= _clipped(context, pairs, extremes, share)
            details["share"] = share
        return Quantized(quantizers, details=details, scheme=context.scheme, transforms=tuple(pairs))

    def _pairs(self, context: Context) -> tuple[list[ScaledPair], dict[str, Any]]:
        parameters = dict(context.model.named_parameters())
        pairs, floored = [], {}
        for group in find_groups(context):
            gamma = None if group.scale is None else parameters[group.scale].detach().double().cpu()
            if gamma is None or gamma.shape != (group.channels,) or not bool(gamma.any()):
                continue
            factors, count = migrated(gamma, self.floor)
            pairs.append(group.pair(factors))
            if count:
                floored[group.site] = count
        return pairs, {"migrated_tensors": len(pairs), "floored_channels": floored}

    def _key(self, context: Context) -> dict[str, Any]:
        return {
            **context.stage_key(),
            "method": self.name,
            "version": self.version,
            "profile": context.scheme.profile,
            "migration": self.migration,
            "floor": self.floor,
        }

    def _extremes(self, context: Context, pairs: Sequence[ScaledPair]) -> dict[str, Tensor]:
        """Both extremes of every token, by site; whatever the width."""

        def collect() -> dict[str, Tensor]:
            batches = Batches([to_device(batch.inputs, context.device) for batch in context.calibration])
            of_site = _by_site(pairs)
            observers = {}
            for site in context.profile_sites.activations().values():
                axis = token_axis(site, context.sites)
                if axis is not None:
                    pair = of_site.get(site.id)
                    seen = None if pair is None else partial(pair.seen, site.id)
                    observers[site.id] = CountedTokens(axis, batches, seen)
            total = len(context.calibration)
            observe(
                context.model,
                batches,
                observers,
                progress=lambda done: context.progress("token extremes", done, total),
                known=context.sites.known,
            )
            return {site_id: observer.extremes for site_id, observer in observers.items()}

        return context.stages.tensors("token_extremes", self._key(context), collect)

    def _share(
        self,
        context: Context,
        pairs: Sequence[ScaledPair],
        quantizers: Mapping[str, Quantizer],
        extremes: Mapping[str, Tensor],
    ) -> float:
        form = context.scheme.activations
        assert form is not None  # noqa: S101 - such cells are skipped
        candidates = shares(form.bits)

        def search() -> dict[str, Tensor]:
            chosen = first_items(context.calibration, self.images)
            batches = [to_device(batch.inputs, context.device) for batch in chosen]
            known = context.sites.known
            exactly = output_of(context.model, batches, None, known)
            errors = []
            for done, share in enumerate(candidates, start=1):
                tried = {**quantizers, **_clipped(context, pairs, extremes, share)}
                errors.append(squared_error(output_of(context.model, batches, tried, known), exactly))
                context.progress("token-wise clipping", done, len(candidates))
            # Ties go to the larger share.
            return {"share": torch.tensor(candidates[errors.index(min(errors))], dtype=torch.float64)}

        key = {**self._key(context), "scheme": str(context.scheme), "images": self.images}
        return float(context.stages.tensors("token_wise_clipping", key, search)["share"])


def migrated(gamma: Tensor, floor: float) -> tuple[Tensor, int]:
    """The factors of a migration, float64, and how many of them are floored.

    Args:
        gamma: The normalisation's weight, float64, not all zero.
        floor: Smallest magnitude as a share of the mean one.
    """
    magnitudes = gamma.abs()
    least = floor * magnitudes.mean()
    sign = torch.where(gamma < 0, -1.0, 1.0).double()
    return significant(sign * magnitudes.clamp(min=float(least))), int((magnitudes < least).sum())


def _by_site(pairs: Sequence[ScaledPair]) -> dict[str, ScaledPair]:
    return {site_id: pair for pair in pairs for site_id in pair.sites}


def _clipped(
    context: Context, pairs: Sequence[ScaledPair], extremes: Mapping[str, Tensor], share: float
) -> dict[str, Quantizer]:
    """The quantizers of all sites that have tokens, at a share."""
    form = context.scheme.activations
    assert form is not None  # noqa: S101 - such cells are skipped
    of_site = _by_site(pairs)
    quantizers: dict[str, Quantizer] = {}
    for site_id, values in extremes.items():
        ends = token_range(values, share, form.symmetric)
        # The rule looks at tokens; the statistics of all values have no say.
        made = activation_quantizer(
            context.sites[site_id], TensorStatistics(), form, lambda *_, ends=ends: ends
        )
        pair = of_site.get(site_id)
        quantizers[site_id] = made if pair is None else pair.around(site_id, made)
    return quantizers
