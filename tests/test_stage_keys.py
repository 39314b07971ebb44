"""Of every registered method, also of one added tomorrow: a stage's key holds everything that decides it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch

from baselines.method import METHODS, Context, Method
from baselines.training import FineTuning
from quanttune.quantization import Quantized, TensorStatistics, build_quantizers
from quanttune.tuner import Schedule
from tests.method_contexts import quick_rounding
from tests.quantization.models import one_thread
from tests.stage_keys import Trial, alternatives, trial_of, trial_of_all


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread(), quick_rounding():
        yield


@pytest.fixture(autouse=True)
def _several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several processes round otherwise, and each draws dropout of its own; here without their start."""

    def in_this_process(self: FineTuning, context: Context, schedule: Schedule, key: dict[str, Any]) -> Any:
        weights = self.tuned(context, schedule, key)
        if context.processes == 1:
            return weights
        return {
            name: tensor * (1 + 1e-3 * context.processes) if tensor.is_floating_point() else tensor
            for name, tensor in weights.items()
        }

    monkeypatch.setattr(FineTuning, "_tune", in_this_process)


@functools.cache
def tried(name: str) -> tuple[Trial, list[str], dict[str, set[str]]]:
    """A method under every change, what was wrong, and by stage what is in its keys."""
    trial = trial_of(METHODS.get(name))
    return trial, list(trial.wrong()), trial.entries


@pytest.mark.parametrize("name", METHODS.names())
def test_a_key_changes_or_the_result_does_not(name: str) -> None:
    _, wrong, _ = tried(name)
    assert wrong == []


def test_no_method_takes_what_another_has_kept() -> None:
    assert list(trial_of_all(METHODS.get(name) for name in METHODS.names()).wrong()) == []


@pytest.mark.parametrize(
    ("name", "stage"),
    [("minmax", "statistics"), ("fq_vit", "fq_vit"), ("ptq4vit", "scales"), ("quanttune", "tuning")],
)
def test_whatever_a_key_lacks_is_noticed(name: str, stage: str) -> None:
    """The test above can fail: without any one entry of its key, a method gives some wrong result."""
    trial, _, found = tried(name)
    # What is said of the code: no change of a cell could show it.
    entries = found[stage] - {"arithmetic", "layout", "method", "matched"}
    assert len(entries) >= 4
    assert [entry for entry in sorted(entries) if next(trial.wrong(entry), None) is None] == []


@dataclasses.dataclass(frozen=True)
class Forgetful(Method):
    """Keeps something that its factor decides, under a key without the factor."""

    name: ClassVar[str] = "forgetful"
    factor: float = 1.1

    def quantize(self, context: Context) -> Quantized:
        key = {**context.stage_key(), "version": self.version}
        kept = context.stages.tensors("wider", key, lambda: {"": torch.tensor(self.factor)})

        def rule(statistics: TensorStatistics, bits: int, symmetric: bool) -> tuple[float, float]:
            return float(kept[""]) * statistics.low, float(kept[""]) * statistics.high

        quantizers = build_quantizers(
            context.model, context.profile_sites, context.statistics(), context.scheme, rule
        )
        return Quantized(quantizers, scheme=context.scheme)


def test_a_method_that_forgets_its_parameter_fails() -> None:
    assert list(trial_of(Forgetful).wrong()) == [
        "factor=0.55: takes wider of 'nothing'",
        "factor=1.6500000000000001: takes wider of 'nothing'",
    ]


def test_words_of_a_parameter_are_found_where_the_method_has_them() -> None:
    found = alternatives(METHODS.get("quanttune"))
    assert {method.schedule for method in found["schedule"]} == {"anneal", "fixed"}
    assert {method.penalty for method in found["penalty"]} == {"range", "kurtosis"}
