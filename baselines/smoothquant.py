"""SmoothQuant: difficulty moved from activations into weights (Xiao et al. 2023, arXiv 2211.10438)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from baselines.folding import Group, find_groups, folded_state, has_groups
from baselines.method import METHODS, Context, FoldingMethod
from baselines.searching.output_error import collect_channels, output_error
from quanttune.errors import ConfigError
from quanttune.inputs import to_device
from quanttune.quantization import (
    RANGE_RULES,
    Quantized,
    ScaledPair,
    Scheme,
    SiteKind,
    SiteTable,
    TensorStatistics,
    build_quantizers,
    collect_statistics,
)
from quanttune.quantization.quantizers.grid import significant
from quanttune.quantization.statistics import statistics_from_tensors, statistics_to_tensors

AUTO = "auto"
SCOPES = ("norm", "all")
ALPHAS = tuple(step / 10 for step in range(11))
"""Candidates of ``alpha="auto"``."""
FLOOR = 1e-5
"""Smallest weight maximum and smallest factor, those of the authors' code."""
_ROWS = 512  # vectors on which a candidate is priced


@METHODS.register("smoothquant")
@dataclass(frozen=True)
class SmoothQuant(FoldingMethod):
    """``(X / s)(W s)'`` with ``s_j = max|X_j|**alpha / max|W_j|**(1 - alpha)`` (section 4, equation 4).

    The maximum of ``X_j`` is over all calibration tokens, that of ``W_j`` over the outputs of all layers that
    read ``X``, so that queries, keys and values share a factor. As in the authors' code the weights' maximum
    and the factor are not below 1e-5.

    Ours:

    - The factors stand in scaled quantizer pairs, which compute what folded weights compute and leave the
      FP32 model as it is. So post-norm models are quantized, too; there the residual costs a multiplication
      an element, which ``extra_operations`` records. :meth:`folded` gives changed weights, for pre-norm
      models.
    - The factors come from the cell's calibration items (the paper: 512 sentences). They keep 16 significant
      bits. A channel that is zero throughout calibration keeps the factor 1.
    - Maxima are over padding, too, and every linear layer behind a normalisation is a reader, the classifier
      behind the last one as well, although it may read one token of many.
    - ``alpha="auto"`` tries 0.0, 0.1 .. 1.0 at each tensor and keeps what has the least squared error of the
      quantized layers' outputs, on up to 512 tokens, ranges by min-max; the paper searches one alpha for the
      whole network.
    - ``scope="all"`` also scales the input of the layer behind the attention and, where a ReLU is in front,
      that of the second layer of the MLP. A static scale a channel there is a factor of the requantization.

    Args:
        alpha: How much of the difficulty goes into the weights, 0 to 1, or ``auto``.
        scope: ``norm`` for tensors behind a normalisation, as in the paper, or ``all``.
        rule: Range rule of the activations.

    Raises:
        ConfigError: If ``alpha`` is out of range or ``scope`` unknown.
        UnknownNameError: If there is no such range rule.
    """

    name: ClassVar[str] = "smoothquant"
    variant: ClassVar[str] = "paper"
    version: ClassVar[int] = 1
    changes: ClassVar[str] = "weights, same function"
    source: ClassVar[str] = "arXiv 2211.10438, ICML 2023"
    licence: ClassVar[str] = "MIT"
    alpha: float | str = 0.5
    scope: str = "norm"
    rule: str = "minmax"

    def __post_init__(self) -> None:
        number = isinstance(self.alpha, int | float) and not isinstance(self.alpha, bool)
        if self.alpha != AUTO and not (number and 0 <= float(self.alpha) <= 1):
            raise ConfigError(f"smoothquant alpha {self.alpha!r} is neither between 0 and 1 nor {AUTO!r}")
        if self.scope not in SCOPES:
            raise ConfigError(f"smoothquant scope {self.scope!r} is not one of {', '.join(SCOPES)}")
        RANGE_RULES.get(self.rule)

    def skip(self, sites: SiteTable, scheme: Scheme) -> str | None:
        """It needs quantized activations, and a linear layer behind a normalisation."""
        if not scheme.quantizes_activations:
            return (
                f"under {scheme} activations stay in float, so they have no difficulty to move into weights"
            )
        if has_groups(sites):
            return None
        return "no linear layer of the model reads a normalisation, behind which SmoothQuant scales"

    def quantize(self, context: Context) -> Quantized:
        """Find the factors in one pass, then calibrate what the quantizers see."""
        groups = find_groups(context)
        table = context.profile_sites
        if self.scope == "all":
            further = _further_groups(context)
            groups += further
            table = _with_carriers(table, context.sites, further)
        found = self._factors(context, groups)
        pairs = [group.pair(found[f"{group.site}|factors"]) for group in groups]
        quantizers = build_quantizers(
            context.model,
            table,
            self._statistics(context, table, pairs),
            context.scheme,
            RANGE_RULES.get(self.rule),
            pairs,
        )
        details: dict[str, Any] = {
            "scaled_tensors": len(groups),
            "largest_factor": max((float(pair.factors.max()) for pair in pairs), default=1.0),
            "smallest_factor": min((float(pair.factors.min()) for pair in pairs), default=1.0),
        }
        if self.alpha == AUTO:
            details["alphas"] = {group.site: float(found[f"{group.site}|alpha"]) for group in groups}
        return Quantized(quantizers, details=details, scheme=context.scheme, transforms=tuple(pairs))

    def folded(self, context: Context) -> dict[str, Tensor]:
        """The factors folded into normalisations and linear layers wherever nothing else reads the tensor.

        ``scope="all"`` folds no more than ``norm``: its further factors are known in pairs alone.
        """
        groups = [group for group in find_groups(context) if group.weight is not None]
        if not groups or (self.alpha == AUTO and not context.scheme.quantizes_activations):
            return folded_state(context.model, [])
        found = self._factors(context, groups)
        return folded_state(
            context.model, [(group, found[f"{group.site}|factors"], None) for group in groups]
        )

    def _factors(self, context: Context, groups: list[Group]) -> dict[str, Tensor]:
        """``|factors`` of every group's site, and ``|alpha`` where it was searched."""
        if not groups:
            return {}
        key = {
            **context.stage_key(),
            "method": self.name,
            "version": self.version,
            "alpha": self.alpha,
            "tensors": [group.site for group in groups],
        }
        if self.alpha == AUTO:
            key["scheme"] = str(context.scheme)
        return context.stages.tensors("smoothquant", key, lambda: self._search(context, groups))

    def _search(self, context: Context, groups: list[Group]) -> dict[str, Tensor]:
        searched = self.alpha == AUTO
        channels = collect_channels(context, groups, _ROWS if searched else 0, "SmoothQuant maxima")
        parameters = dict(context.model.named_parameters())
        found: dict[str, Tensor] = {}
        for done, group in enumerate(groups, start=1):
            seen = channels[group.site]
            columns = column_maxima(group, parameters)
            alpha = self.alpha
            if isinstance(alpha, str):
                error_of = output_error(context, group, seen, parameters)
                errors = [error_of(factors_of(seen.largest, columns, each)) for each in ALPHAS]
                alpha = ALPHAS[errors.index(min(errors))]
                found[f"{group.site}|alpha"] = torch.tensor(alpha, dtype=torch.float64)
                context.progress("SmoothQuant alphas", done, len(groups))
            found[f"{group.site}|factors"] = factors_of(seen.largest, columns, alpha)
        return found

    def _statistics(
        self, context: Context, table: SiteTable, pairs: list[ScaledPair]
    ) -> dict[str, TensorStatistics]:
        if not context.scheme.is_static:
            return {}
        statistics = context.statistics(pairs)
        missing = [site for site in table.activations().values() if site.id not in statistics]
        if missing:
            key = {
                **context.stage_key(),
                "method": self.name,
                "version": self.version,
                "alpha": self.alpha,
                "scheme": str(context.scheme) if self.alpha == AUTO else "",
                "sites": [site.id for site in missing],
            }

            def collect() -> dict[str, Tensor]:
                batches = (to_device(batch.inputs, context.device) for batch in context.calibration)
                chosen = SiteTable(missing, context.sites.known)
                return statistics_to_tensors(
                    collect_statistics(context.model, batches, chosen, transforms=pairs)
                )

            kept = context.stages.tensors("smoothquant_statistics", key, collect)
            statistics = statistics | statistics_from_tensors(kept)
        return statistics


def column_maxima(group: Group, parameters: Mapping[str, Tensor]) -> Tensor:
    """``max |W_j|`` of every input over the outputs of all layers of a group, float64, on the CPU."""
    columns = [parameters[name].detach().abs().amax(dim=0) for name in group.parameters]
    return torch.stack(columns).amax(dim=0).double().cpu()


def factors_of(largest: Tensor, columns: Tensor, alpha: float) -> Tensor:
    """Equation 4.

    Args:
        largest: ``max |X_j|``, float64, shape ``(channels,)``.
        columns: ``max |W_j|`` likewise.
        alpha: Between 0 and 1.
    """
    factors = largest**alpha / columns.clamp(min=FLOOR) ** (1 - alpha)
    return significant(torch.where(largest == 0, 1.0, factors.clamp(min=FLOOR)))


def _further_groups(context: Context) -> list[Group]:
    """Inputs of the layers behind attention and behind a ReLU; nothing else may read them."""
    sites, chosen = context.sites, context.profile_sites
    groups = []
    for site in sites.values():
        attention = site.kind is SiteKind.ATTENTION_OUTPUT
        relu = site.kind is SiteKind.ACTIVATION and site.operation == "relu"
        inputs = [sites[name] for name in site.consumers if name in sites]
        linear = [each for each in inputs if each.kind is SiteKind.LINEAR_INPUT]
        if not (attention or relu) or len(site.consumers) != 1 or len(linear) != 1:
            continue
        (reader,) = linear
        weight = sites[reader.sibling("weight")]
        if weight.parameter is None or weight.view is not None or reader.operation != "linear":
            continue
        # Heads are joined between the attention and the layer, so its channels are those of the input.
        here = relu and site.id in chosen and site.shape == reader.shape
        groups.append(
            Group(
                site=reader.id,
                carriers=(site.id,) if here else (reader.id,),
                inputs=(reader.id,),
                weights=(weight.id,),
                parameters=(weight.parameter,),
                biases=(None,),
                channels=reader.shape[-1],
                weight=None,
                bias=None,
                scale=None,
                extra={},
            )
        )
    return groups


def _with_carriers(table: SiteTable, sites: SiteTable, groups: list[Group]) -> SiteTable:
    """The sites to quantize, with a group's input in place of the attention output that it is a view of."""
    added = {name for group in groups for name in group.carriers if name not in table}
    replaced = {sites[name].source for name in added}
    return SiteTable(
        (
            site
            for site in sites.values()
            if site.id in added or (site.id in table and site.id not in replaced)
        ),
        table.known,
    )
