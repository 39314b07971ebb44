"""What the calibrators share: they differ in the range rule alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from baselines.method import Context, Method
from quanttune.quantization import RANGE_RULES, Quantized, RangeRule, Scheme, SiteTable, build_quantizers


@dataclass(frozen=True)
class Calibrator(Method):
    """Post-training quantization with static ranges from one range rule; weights by min-max.

    Class attributes:
        rule: Registered name of the range rule.
    """

    role: ClassVar[str] = "calibrator"
    rule: ClassVar[str]

    def range_rule(self) -> RangeRule:
        """The rule with this method's parameters."""
        parameters: dict[str, Any] = self.parameters()
        rule = RANGE_RULES.get(self.rule)
        return partial(rule, **parameters) if parameters else rule

    def skip(self, sites: SiteTable, scheme: Scheme) -> str | None:
        """Where no range is chosen in calibration every rule gives what min-max gives."""
        if scheme.is_static or self.rule == "minmax":
            return None
        what = "ranges are found at run time" if scheme.quantizes_activations else "activations stay in float"
        return f"under {scheme} {what}, so the rule {self.rule} has nothing to choose; see minmax"

    def quantize(self, context: Context) -> Quantized:
        """Choose a range per site from statistics that every rule and width shares."""
        quantizers = build_quantizers(
            context.model,
            context.profile_sites,
            context.statistics(),
            context.scheme,
            self.range_rule(),
        )
        return Quantized(quantizers, scheme=context.scheme)
