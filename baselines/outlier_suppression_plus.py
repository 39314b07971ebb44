"""Outlier Suppression+: channels shifted and scaled before rounding (Wei et al. 2023, arXiv 2304.09145)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from baselines.folding import Group, find_groups, folded_state, has_groups
from baselines.method import METHODS, Context, FoldingMethod
from baselines.ptq4vit import first_items
from baselines.searching.attention_error import attention_error, attention_of
from baselines.searching.output_error import Channels, collect_channels, output_error
from quanttune.errors import ConfigError
from quanttune.quantization import RANGE_RULES, Quantized, Scheme, SiteTable, build_quantizers
from quanttune.quantization.quantizers.grid import significant

LOWEST = 1.0
"""The last threshold that is tried."""
_ROWS = 256  # vectors on which a candidate is priced


@METHODS.register("outlier_suppression_plus")
@dataclass(frozen=True)
class OutlierSuppressionPlus(FoldingMethod):
    """Each channel is centred, and those beyond a threshold are scaled down to it; then min-max.

    ``z_j = (max_j + min_j) / 2`` and ``s_j = max(1, max|x_j - z_j| / t)``: channels below the threshold ``t``
    stay as they are. There is one ``t`` a tensor, from a grid between the largest magnitude and 1. Shift and
    scale go into the normalisation and, inverted, into the layers that read it (:mod:`baselines.folding`), so
    the weights change and the function does not. ``t`` has the least squared error of the quantized layers'
    outputs or, where they are queries, keys and values, of the attention's output.

    Ours:

    - Layers' outputs are compared on up to 256 tokens, the attention's on the first ``images`` items.
    - Where a tensor has other readers, as in post-norm models, or a layer has no bias that could take up the
      shift, the scale alone is used, in a scaled quantizer pair; ``extra_operations`` records what it costs.
      The authors' code knows pre-norm models alone. Where windows are filled up with zeros behind the
      normalisation (a Swin on pictures whose size they do not divide), the scale alone is folded.
    - Every linear layer behind a normalisation is a reader, the classifier behind the last one as well.
    - Scale and shift keep 16 significant bits. They come from the cell's calibration items (the paper: 128
      samples), padding included.

    Args:
        shift: Whether channels are centred.
        scale: Whether channels are scaled.
        candidates: Thresholds tried, evenly spaced, at least 2; the paper takes at least 100.
        rule: Range rule of the activations.
        attention: Whether the attention's output is compared behind queries, keys and values; their own
            outputs otherwise.
        images: Items on which it is compared.

    Raises:
        ConfigError: If there are too few candidates, or there is no item.
        UnknownNameError: If there is no such range rule.
    """

    name: ClassVar[str] = "outlier_suppression_plus"
    variant: ClassVar[str] = "ours"
    version: ClassVar[int] = 2
    changes: ClassVar[str] = "weights, same function"
    source: ClassVar[str] = "arXiv 2304.09145, EMNLP 2023"
    licence: ClassVar[str] = "MIT"
    shift: bool = True
    scale: bool = True
    candidates: int = 100
    rule: str = "minmax"
    attention: bool = True
    images: int = 32

    def __post_init__(self) -> None:
        if self.candidates < 2:
            raise ConfigError(
                f"outlier_suppression_plus: {self.candidates} candidates are no grid; give at least 2"
            )
        if self.images < 1:
            raise ConfigError(
                f"outlier_suppression_plus images {self.images}: give at least one item to compare"
            )
        RANGE_RULES.get(self.rule)

    def skip(self, sites: SiteTable, scheme: Scheme) -> str | None:
        """It needs quantized activations, and a linear layer behind a normalisation."""
        if not scheme.quantizes_activations:
            return f"under {scheme} activations stay in float, so none of their channels needs to be moved"
        if has_groups(sites):
            return None
        return "no linear layer of the model reads a normalisation, behind which channels are moved"

    def quantize(self, context: Context) -> Quantized:
        """Search shifts and scales on the reference, then calibrate the changed model."""
        groups = find_groups(context)
        found = self._searched(context, groups)
        foldable = [group for group in groups if group.weight is not None]
        others = [group for group in groups if group.weight is None and self.scale]
        pairs = [group.pair(found[f"{group.site}|factors"]) for group in others]
        weights = self._weights(context, foldable, found) if foldable else None
        changed = context if weights is None else context.changed(weights)
        quantizers = build_quantizers(
            changed.model,
            context.profile_sites,
            changed.statistics(pairs),
            context.scheme,
            RANGE_RULES.get(self.rule),
            pairs,
        )
        details: dict[str, Any] = {
            "shifted_tensors": sum(bool(found[f"{group.site}|shift"].any()) for group in groups),
            "scaled_channels": {
                group.site: int((found[f"{group.site}|factors"] > 1).sum()) for group in groups
            },
            "thresholds": {group.site: float(found[f"{group.site}|threshold"]) for group in groups},
        }
        return Quantized(
            quantizers,
            weights=weights,
            details=details,
            scheme=context.scheme,
            transforms=tuple(pairs),
            same_function=weights is not None,
        )

    def folded(self, context: Context) -> dict[str, Tensor]:
        """Shifts and scales folded wherever nothing else reads the tensor; they depend on the scheme."""
        groups = [group for group in find_groups(context) if group.weight is not None]
        if not context.scheme.quantizes_activations:
            groups = []
        return self._weights(context, groups, self._searched(context, groups))

    def _weights(
        self, context: Context, groups: list[Group], found: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        return folded_state(
            context.model,
            [
                (
                    group,
                    found[f"{group.site}|factors"],
                    found[f"{group.site}|shift"] if self._shifts(group) else None,
                )
                for group in groups
            ],
        )

    def _shifts(self, group: Group) -> bool:
        return self.shift and group.takes_shift

    def _searched(self, context: Context, groups: list[Group]) -> dict[str, Tensor]:
        """``|shift``, ``|factors`` and ``|threshold`` of every group's site."""
        if not groups:
            return {}
        key = {
            **context.stage_key(),
            "method": self.name,
            "version": self.version,
            "parameters": {name: value for name, value in self.parameters().items() if name != "rule"},
            "scheme": str(context.scheme),
            "tensors": [group.site for group in groups],
        }
        return context.stages.tensors("outlier_suppression_plus", key, lambda: self._search(context, groups))

    def _search(self, context: Context, groups: list[Group]) -> dict[str, Tensor]:
        channels = collect_channels(context, groups, _ROWS, "OS+ channel bounds")
        parameters = dict(context.model.named_parameters())
        compared = list(first_items(context.calibration, self.images))
        found: dict[str, Tensor] = {}
        for done, group in enumerate(groups, start=1):
            seen = channels[group.site]
            shift = centre_of(seen) if self._shifts(group) else torch.zeros_like(seen.low)
            largest = torch.maximum((seen.low - shift).abs(), (seen.high - shift).abs())
            thresholds = thresholds_from(float(largest.max()), self.candidates if self.scale else 1)
            best = thresholds[0]
            if len(thresholds) > 1:
                if self.attention and attention_of(context, group) is not None:
                    error_of = attention_error(context, group, seen, parameters, compared, shift)
                else:
                    error_of = output_error(context, group, seen, parameters, shift)
                errors = [error_of(factors_of(largest, each)) for each in thresholds]
                best = thresholds[errors.index(min(errors))]
            found[f"{group.site}|shift"] = shift
            found[f"{group.site}|factors"] = factors_of(largest, best)
            found[f"{group.site}|threshold"] = torch.tensor(best, dtype=torch.float64)
            context.progress("OS+ thresholds", done, len(groups))
        return found


def centre_of(seen: Channels) -> Tensor:
    """``z``, the middle of every channel's range, float64."""
    return significant((seen.low + seen.high) / 2)


def thresholds_from(largest: float, count: int) -> list[float]:
    """Evenly spaced thresholds from the largest magnitude down to 1; the largest alone if it is not above 1.

    Ties go to the first, which scales the fewest channels.
    """
    if largest <= LOWEST or count < 2:
        return [largest]
    return [largest + (LOWEST - largest) * step / (count - 1) for step in range(count)]


def factors_of(largest: Tensor, threshold: float) -> Tensor:
    """``s_j = max(1, max|x_j - z_j| / t)``; all 1 where the threshold is 0, since every channel is.

    Args:
        largest: ``max|x_j - z_j|``, float64, shape ``(channels,)``.
        threshold: ``t``.
    """
    if threshold <= 0:
        return torch.ones_like(largest)
    return significant((largest / threshold).clamp(min=1.0))
