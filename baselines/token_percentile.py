"""Coarse token-wise clipping of Outlier Suppression (arXiv 2209.13325, section 4.2), as a calibrator."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from baselines.calibration import Calibrator
from baselines.method import METHODS, Context
from quanttune.errors import ConfigError
from quanttune.inputs import call_model, logits_of, to_device
from quanttune.quantization import (
    RANGE_RULES,
    Quantized,
    Quantizer,
    RangeRule,
    SiteKind,
    SiteTable,
    build_quantizers,
    simulate,
)
from quanttune.quantization.exact_walk import ExactHandlers
from quanttune.quantization.quantizers.grid import significant

STEP = 1.0
"""Percent between two candidates. The reference code divides it further above 4096 tokens a batch and then
rounds to whole percent, which leaves one or none."""
_REACH = {8: 10.0, 7: 20.0, 6: 30.0, 5: 60.0}
_WIDEST_REACH = 90.0


def candidates(bits: int) -> list[float]:
    """The percentiles that are tried, from 100 down.

    To 90 at 8 bits, to 70 at 6 and to 10 at 4, as in the reference code; 80 at 7 and 40 at 5 are ours.
    """
    reach = _REACH.get(min(bits, 8), _WIDEST_REACH)
    return [100.0 - STEP * step for step in range(round(reach / STEP) + 1)]


@METHODS.register("token_percentile")
@dataclass(frozen=True)
class TokenPercentile(Calibrator):
    """Ranges end at a percentile of the tokens' extremes, the same percentile for every site.

    See :func:`quanttune.quantization.ranges.token_percentile`. Softmax outputs keep min-max, as in the paper.
    The percentile is the one of :func:`candidates` at which the quantized network's outputs have the smallest
    squared distance ``||f(x; p) - f(x)||^2`` from the original's (the paper's loss), over all calibration
    items; ties go to the wider ranges. Ours: the outputs are all logits, of padded positions too, and tokens
    of padding count in the percentile, where the reference code leaves them out; weights are quantized while
    it is chosen; percentiles are of the whole calibration set and no mean over batches. Keys, which profile
    ``matmul`` sees transposed, have extremes for each feature of a head and not for each token. The paper's
    fine stage, which learns the steps, is not part of this calibrator.

    Args:
        p: A percentile above 0 and at most 100 in place of the chosen one; ``None`` to choose.

    Raises:
        ConfigError: If ``p`` is out of range.
    """

    name: ClassVar[str] = "token_percentile"
    source: ClassVar[str] = "arXiv 2209.13325, NeurIPS 2022"
    rule: ClassVar[str] = "token_percentile"
    p: float | None = None

    def __post_init__(self) -> None:
        if self.p is not None and not 0 < self.p <= 100:
            raise ConfigError(
                f"token percentile {self.p} is not above 0 and at most 100; 90 to 100 is usual at 8 bits"
            )

    def quantize(self, context: Context) -> Quantized:
        """Choose the percentile unless it is given, then the ranges."""
        if not context.scheme.is_static:
            return super().quantize(context)
        made = _Quantizers(context)
        p, errors = (self.p, None) if self.p is not None else self._chosen(context, made)
        details: dict[str, object] = {"token_percentile": p}
        if errors is not None:
            details["output_error"] = errors
        return Quantized(made(p), scheme=context.scheme, details=details)

    def _chosen(self, context: Context, made: _Quantizers) -> tuple[float, dict[str, float]]:
        """The best candidate, and the squared output error of each over that of no output at all."""
        assert context.scheme.activations is not None  # noqa: S101 - such schemes are not static
        tried = candidates(context.scheme.activations.bits)
        key = {
            **context.stage_key(),
            "profile": context.scheme.profile,
            "scheme": str(context.scheme),
            "version": self.version,
            "candidates": tried,
        }
        found = context.stages.tensors("token_percentile", key, lambda: _errors(context, made, tried))
        errors = found["errors"].tolist()
        best = min(range(len(tried)), key=lambda place: (errors[place], place))
        power = float(found["power"]) or 1.0
        return tried[best], {f"{p:g}": error / power for p, error in zip(tried, errors, strict=True)}


class _Quantizers:
    """The quantizers of a cell for one percentile after the other; those that it does not decide are kept."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._statistics = context.statistics()
        sites = context.profile_sites
        fixed = [site for site in sites.values() if site.kind in (SiteKind.WEIGHT, SiteKind.SOFTMAX)]
        self._kept = self._built(SiteTable(fixed, sites.known), RANGE_RULES.get("minmax"))
        self._clipped = SiteTable((site for site in sites.values() if site.id not in self._kept), sites.known)

    def __call__(self, p: float) -> dict[str, Quantizer]:
        """All of them, in the order of the sites."""
        rule: Any = RANGE_RULES.get("token_percentile")
        made = self._built(self._clipped, partial(rule, p=p))
        return {
            site_id: made[site_id] if site_id in made else self._kept[site_id]
            for site_id in self._context.profile_sites
        }

    def _built(self, sites: SiteTable, rule: RangeRule) -> dict[str, Quantizer]:
        return build_quantizers(self._context.model, sites, self._statistics, self._context.scheme, rule)


def _errors(context: Context, made: _Quantizers, tried: list[float]) -> dict[str, Tensor]:
    """Squared output errors of all candidates, and the outputs' own squares, over the calibration items."""
    quantizers = [made(p) for p in tried]
    errors, power = torch.zeros(len(tried), dtype=torch.float64), 0.0
    total = len(tried) * len(context.calibration)
    # Batch by batch: the logits of all batches of a language model would not fit the memory.
    for number, batch in enumerate(context.calibration):
        inputs = to_device(batch.inputs, context.device)
        with torch.no_grad(), ExactHandlers(context.model, {}, wide=True):
            output = logits_of(call_model(context.model, inputs))
        power += _squared(output, torch.zeros_like(output))
        for place, each in enumerate(quantizers):
            with torch.no_grad(), simulate(context.model, each, known=context.sites.known):
                errors[place] += _squared(output, logits_of(call_model(context.model, inputs)))
            context.progress("token percentiles", number * len(tried) + place + 1, total)
    # Rounded, so that the last digits of a sum decide nothing.
    return {"errors": significant(errors), "power": torch.tensor(power, dtype=torch.float64)}


def _squared(output: Tensor, other: Tensor) -> float:
    """Squared distance in float64, of what is not masked with minus infinity."""
    total = 0.0
    for left, right in zip(output, other, strict=True):
        unmasked = left > -torch.inf
        total += float((left[unmasked].double() - right[unmasked].double()).square().sum())
    return total
