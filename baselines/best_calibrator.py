"""The best calibrator, chosen on validation items: what one would take who may not see the test items."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from baselines.method import METHODS, Context, Method
from baselines.validation import Validation
from quanttune.errors import ConfigError
from quanttune.quantization import Quantized, Scheme, SiteTable
from quanttune.quantization.exact import ARITHMETIC

CANDIDATES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("minmax", {}),
    ("percentile", {"p": 99.9}),
    ("percentile", {"p": 99.99}),
    ("percentile", {"p": 99.999}),
    ("mse", {}),
    ("omse", {}),
    ("entropy", {}),
)
"""Registered names and parameters of the calibrators to choose among; of equals the first is taken."""


@METHODS.register("best_calibrator")
@dataclass(frozen=True)
class BestCalibrator(Method):
    """Try every calibrator of :data:`CANDIDATES` on validation items and keep the best, for each cell anew.

    A table in which the best calibrator is looked up after the fact has chosen it on the test items. This is
    the choice that could have been made before: by the task's leading metric on items of the validation
    split, which no calibration draw and no test item comes from. A reference that was trained here may have
    been tuned on validation items, like every row beside it.

    In a search, whose cells are measured on the validation split, the choice has seen their items.

    One evaluation a candidate decides. The noise of rounding is not averaged out: that would cost five times
    as much, and matters less than which items the split has.

    Args:
        items: Validation items, evenly spaced over the split; all of them if it has fewer.

    Raises:
        ConfigError: If ``items`` is not positive.
    """

    name: ClassVar[str] = "best_calibrator"
    role: ClassVar[str] = "calibrator"
    validates: ClassVar[bool] = True
    items: int = 256

    def __post_init__(self) -> None:
        if self.items < 1:
            raise ConfigError(f"best_calibrator items {self.items}: give at least 1; 256 is the default")

    def skip(self, sites: SiteTable, scheme: Scheme) -> str | None:
        """Where no range is chosen in calibration all candidates are the same."""
        if scheme.is_static:
            return None
        return (
            f"under {scheme} no range is chosen in calibration, so every calibrator gives what minmax gives"
        )

    def used(self) -> tuple[str, ...]:
        """Every candidate."""
        return tuple(dict.fromkeys(name for name, _ in CANDIDATES))

    def quantize(self, context: Context) -> Quantized:
        """Quantize with every candidate, score each, keep the best.

        Raises:
            ConfigError: If the context has no validation items.
        """
        validation = context.validation
        if validation is None:
            raise ConfigError(
                "best_calibrator chooses on validation items, and the context has none; name a calibrator, "
                "such as mse"
            )
        best: Quantized | None = None
        chosen, scores = "", dict[str, float]()
        for done, (name, parameters) in enumerate(CANDIDATES, start=1):
            method = METHODS.get(name)(**parameters)
            quantized = method.quantize(context)
            score = validated(context, validation, quantized, self.items)
            if best is None or score > scores[chosen]:
                best, chosen = quantized, method.label
            scores[method.label] = score
            context.progress("calibrators", done, len(CANDIDATES))
        assert best is not None  # noqa: S101 - there are candidates; tells the type checker
        best.details |= {
            "chosen_calibrator": chosen,
            "validation_items": validation.count(self.items),
            "validation_metric": validation.metric,
            # no JSON value is infinite
            "validation_scores": {
                label: each if math.isfinite(each) else None for label, each in scores.items()
            },
        }
        return best


def validated(context: Context, validation: Validation, quantized: Quantized, items: int) -> float:
    """The score of a quantized model, higher is better; measured once for given weights and quantizers.

    Args:
        context: Whose model, or a changed copy of it, the quantizers belong to.
        validation: That of the context.
        quantized: What a method made of it.
        items: How many validation items.
    """
    if quantized.weights is not None:
        context = context.changed(quantized.weights)
    key = {
        **context.identity,
        "arithmetic": ARITHMETIC,
        "weights": context.weights_key,
        "quantizers": quantized.quantizers_digest(),
        "validation": dict(validation.key(items)),
    }

    def make() -> dict[str, torch.Tensor]:
        score = validation.score(context.model, quantized.quantizers, items)
        return {"score": torch.tensor(score, dtype=torch.float64)}

    score = float(context.stages.tensors("validation", key, make)["score"])
    # a perplexity may be beyond all numbers
    return -math.inf if math.isnan(score) else score
