"""The choice among calibrators: by validation items alone, the same for tuned weights, kept as a stage."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
from torch import nn

from baselines.best_calibrator import CANDIDATES, validated
from baselines.method import METHODS, Context
from quanttune.errors import ConfigError
from quanttune.quantization import Quantizer
from tests.method_contexts import CountingStages, HeldOut, context_for
from tests.quantization.models import inputs

LABELS = [METHODS.get(name)(**parameters).label for name, parameters in CANDIDATES]
SITE = "blocks.0/add.output"


class Preferring(HeldOut):
    """Scores that are given; what was scored is noted."""

    def __init__(self, scores: list[float]) -> None:
        super().__init__([inputs("vit", 2, 8), inputs("vit", 2, 9)])
        self.scores, self.seen = scores, list[tuple[nn.Module, float]]()
        self.items: list[int] = []

    def score(self, model: nn.Module, quantizers: Mapping[str, Quantizer], items: int) -> float:
        self.seen.append((model, float(quantizers[SITE].scale)))  # type: ignore[attr-defined]
        self.items.append(items)
        return self.scores[len(self.seen) - 1]


class SeparateStages(CountingStages):
    """Keeps nothing of what was scored."""

    def tensors(self, stage: str, key: Any, make: Any) -> Any:
        return make() if stage == "validation" else super().tensors(stage, key, make)


def chosen_by(scores: list[float], **changes: Any) -> tuple[Context, Any, Preferring]:
    validation = Preferring(scores)
    context = context_for("vit", "full", "W4A4", validation=validation, stages=SeparateStages(), **changes)
    return context, METHODS.get("best_calibrator")().quantize(context), validation


def test_the_candidates_are_the_usual_calibrators() -> None:
    assert LABELS == [
        "minmax",
        "percentile[p=99.9]",
        "percentile",
        "percentile[p=99.999]",
        "mse",
        "omse",
        "entropy",
    ]


@pytest.mark.parametrize("place", range(len(CANDIDATES)))
def test_the_best_score_decides_and_the_quantizers_are_its(place: int) -> None:
    scores = [10.0 + (each == place) for each in range(len(CANDIDATES))]
    context, quantized, validation = chosen_by(scores)
    name, parameters = CANDIDATES[place]
    expected = METHODS.get(name)(**parameters).quantize(context)
    assert quantized.quantizers_digest() == expected.quantizers_digest()
    assert quantized.details["chosen_calibrator"] == LABELS[place]
    assert quantized.details["validation_scores"] == dict(zip(LABELS, scores, strict=True))
    assert quantized.details["validation_items"] == 2  # it has no more
    assert quantized.details["validation_metric"] == "closeness"
    assert validation.items == [256] * len(CANDIDATES)


def test_of_equals_the_first_is_taken() -> None:
    _, quantized, _ = chosen_by([5.0] * len(CANDIDATES))
    assert quantized.details["chosen_calibrator"] == "minmax"


def test_what_is_no_number_is_never_the_best() -> None:
    scores = [math.nan, -math.inf, *([-1e300] * 2), math.nan, -3.0, -4.0]
    _, quantized, _ = chosen_by(scores)
    assert quantized.details["chosen_calibrator"] == "omse"
    assert quantized.details["validation_scores"]["minmax"] is None
    _, quantized, _ = chosen_by([math.nan] * len(CANDIDATES))
    assert quantized.details["chosen_calibrator"] == "minmax"


def test_the_real_scores_choose_what_comes_closest() -> None:
    context = context_for("bert", "full", "W4A4")
    quantized = METHODS.get("best_calibrator")().quantize(context)
    scores = quantized.details["validation_scores"]
    validation = context.validation
    assert validation is not None
    for (name, parameters), label in zip(CANDIDATES, LABELS, strict=True):
        made = METHODS.get(name)(**parameters).quantize(context)
        assert scores[label] == validation.score(context.model, made.quantizers, 256)
    assert scores[quantized.details["chosen_calibrator"]] == max(scores.values())
    assert len(set(scores.values())) > 3


def test_behind_a_fine_tuning_the_tuned_model_is_scored() -> None:
    validation = Preferring([0, 0, 0, 0, 1, 0, 0])
    context = context_for("vit", "full", "W4A4", validation=validation, stages=SeparateStages())
    tuned = METHODS.get("finetune")(calibrator="best_calibrator")
    assert tuned.label == "finetune+best_calibrator"
    quantized = tuned.quantize(context)
    plain = METHODS.get("finetune")(calibrator="mse").quantize(context)
    assert quantized.quantizers_digest() == plain.quantizers_digest()
    assert quantized.details["chosen_calibrator"] == "mse"
    assert quantized.details["schedule"] == plain.details["schedule"]
    assert all(model is not context.model for model, _ in validation.seen)


def test_scores_are_kept_and_told_apart_by_all_that_decides_them() -> None:
    stages = CountingStages()
    context = context_for("vit", stages=stages)
    assert context.validation is not None
    minmax, mse = (METHODS.get(name)().quantize(context) for name in ("minmax", "mse"))
    weights = {name: 1.1 * tensor for name, tensor in context.model.state_dict().items()}
    other = HeldOut([inputs("vit", 4, 5)])
    versions = [
        (context, context.validation, minmax, 2),
        (context, context.validation, mse, 2),
        (context, context.validation, minmax, 1),
        (context, other, minmax, 2),
        (context.changed(weights), context.validation, minmax, 2),
        (context_for("vit", stages=stages, identity={"model": "other"}), context.validation, minmax, 2),
    ]
    scores = [validated(*version) for version in versions]
    assert stages.made.count("validation") == len(versions)
    assert len(set(scores)) == len(versions) - 1  # the last is another one by name alone
    assert [validated(*version) for version in versions] == scores
    assert stages.made.count("validation") == len(versions)


def test_without_validation_items_it_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match="best_calibrator chooses on validation items, and the context has"):
        METHODS.get("best_calibrator")().quantize(context_for("vit", validation=None))


@pytest.mark.parametrize("items", [0, -3])
def test_a_number_of_items_that_is_none_is_refused(items: int) -> None:
    with pytest.raises(ConfigError, match=r"best_calibrator items .*: give at least 1"):
        METHODS.get("best_calibrator")(items=items)


def test_a_cell_knows_the_versions_of_what_its_method_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found: a calibrator's new version left the cells of trainings that end with it as they were."""
    finetune, best = METHODS.get("finetune"), METHODS.get("best_calibrator")
    own = str(finetune.version)
    before = {finetune(): own, finetune(calibrator="best_calibrator"): own, best(): str(best.version)}
    assert all(method.versions == version for method, version in before.items())
    monkeypatch.setattr(METHODS.get("mse"), "version", 2)
    assert finetune().versions == own
    assert finetune(calibrator="mse").versions == f"{own}+mse.2"
    assert finetune(calibrator="best_calibrator").versions == f"{own}+mse.2"
    assert best().versions == f"{best.version}+mse.2"
    assert finetune(before="outlier_suppression_plus").versions == f"{own}+outlier_suppression_plus.2"


@pytest.mark.parametrize("name", METHODS.names())
def test_every_method_that_takes_another_says_so(name: str) -> None:
    method = METHODS.get(name)()
    taken = {getattr(method, option) for option in ("calibrator", "before") if hasattr(method, option)}
    assert taken - {""} <= set(method.used())
