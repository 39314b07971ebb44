"""The interval of a drop covers the expected drop as often as it says, items and rounding both being drawn.

Scores are simulated: an item has a difficulty, the quantized model a shift, and rounding moves it, each item
by itself and all items of a copy at once. The expected drop is known in closed form.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from benchmark.engine import measure
from benchmark.engine.measure import Items, drop_interval
from benchmark.engine.noise import SHARE, spreads
from quanttune.quantization.perturbation import COPIES

N = 2000
SHIFT = 0.3


@dataclass(frozen=True)
class Regime:
    """Standard deviations of what rounding does, in those of the items' difficulty."""

    independent: float
    common: float
    everywhere: bool
    """Whether the copies are measured on all items, or on a tenth."""


class Score:
    """A task with one metric, a mean: enough for what is tested."""

    metric, metrics = "score", ("score",)

    @staticmethod
    def metric_value(scores: np.ndarray) -> float:
        return 100 * float(scores.mean())

    @staticmethod
    def named(scores: np.ndarray) -> dict[str, np.ndarray]:
        return {}


def coverage(regime: Regime, accuracy: bool, trials: int) -> tuple[float, float]:
    """How often the interval holds the expected drop, and its mean width."""
    generator = np.random.default_rng(7)
    task: Any = Score()
    moved = math.hypot(regime.independent, regime.common)
    if accuracy:
        # P(ability > 0) of a normal ability with mean 1
        chance = [0.5 * math.erfc(-at / math.sqrt(2)) for at in (1, (1 - SHIFT) / math.hypot(1, 0.3, moved))]
        expected = 100 * (chance[0] - chance[1])
    else:
        expected = 100 * SHIFT
    held, widths = 0, []
    for _ in range(trials):
        ability = 1 + generator.standard_normal(N)
        quantized = ability - SHIFT + 0.3 * generator.standard_normal(N)
        copies = quantized + regime.independent * generator.standard_normal((COPIES + 1, N))
        copies += regime.common * generator.standard_normal((COPIES + 1, 1))
        if accuracy:
            ability, copies = (ability > 0).astype(float), (copies > 0).astype(float)
        items = Items(np.arange(N), copies[0], None)
        chosen = np.arange(0, N, 1 if regime.everywhere else SHARE)
        found = spreads(task, items, [Items(chosen, copy[chosen], None) for copy in copies[1:]])["score"]
        low, high = drop_interval(ability, copies[0], task.metric_value, found.common)
        held += low <= expected <= high
        widths.append(high - low)
    return held / trials, float(np.mean(widths))


REGIMES = {
    "no rounding": Regime(0, 0, False),
    "independent": Regime(0.4, 0, False),
    "independent, all items": Regime(0.4, 0, True),
    "common": Regime(0, 0.05, False),
    "common, all items": Regime(0, 0.05, True),
    "large common": Regime(0, 0.3, False),
    "both": Regime(0.1, 0.05, False),
    "both, all items": Regime(0.4, 0.05, True),
}
STORM = Regime(0.4, 0.05, False)
"""Both, where a tenth of the items cannot tell the common part from the independent one."""


@pytest.mark.parametrize("accuracy", [True, False], ids=["accuracy", "continuous"])
@pytest.mark.parametrize("name", ["no rounding", "independent", "common, all items", "both, all items"])
def test_coverage(name: str, accuracy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "RESAMPLES", 200)
    # 150 trials: three standard errors are 5 %
    covered, _ = coverage(REGIMES[name], accuracy, 150)
    assert 0.89 <= covered <= 0.995


def test_without_the_common_part_too_little_would_be_covered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "RESAMPLES", 200)
    monkeypatch.setattr(measure, "FEW_COPIES", 0.0)
    assert coverage(REGIMES["large common"], False, 100)[0] < 0.5


@pytest.mark.slow
@pytest.mark.parametrize("accuracy", [True, False], ids=["accuracy", "continuous"])
@pytest.mark.parametrize("name", REGIMES)
def test_coverage_over_many_trials(name: str, accuracy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "RESAMPLES", 500)
    regime = REGIMES[name]
    covered, _ = coverage(regime, accuracy, 800)
    # What moves all items at once changes the class of few among a tenth of them, so that copies tell its
    # size but roughly. The standard error of 800 trials is 0.8 %.
    coarse = accuracy and regime.common > 0 and not regime.everywhere
    assert (0.89 if coarse else 0.92) <= covered <= 0.98


@pytest.mark.slow
@pytest.mark.parametrize("accuracy", [True, False], ids=["accuracy", "continuous"])
def test_what_a_tenth_of_the_items_cannot_tell(accuracy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "RESAMPLES", 500)
    covered, _ = coverage(STORM, accuracy, 800)
    assert 0.8 <= covered < 0.97
