"""Ranges by the extremes of tokens, as of Outlier Suppression's coarse clipping."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from quanttune.errors import ConfigError
from quanttune.quantization import RANGE_RULES, TensorStatistics

# Values that float16 holds exactly, so that statistics and raw values are the same numbers.


def summary(*batches: np.ndarray) -> TensorStatistics:
    statistics = TensorStatistics()
    for batch in batches:
        statistics.update(torch.from_numpy(np.asarray(batch, dtype=np.float32)))
    return statistics


def tokens(seed: int = 0) -> np.ndarray:
    """399 tokens of 16 channels; three of them are massive, and one channel is always large."""
    values = np.random.default_rng(seed).normal(size=(3, 133, 16))
    values[..., 5] += 6
    values[0, :3] *= 40
    return values.astype(np.float32)


@pytest.mark.parametrize("p", [50.0, 90.0, 99.0, 99.9])
def test_token_percentile_is_that_of_the_tokens_extremes(p: float) -> None:
    values = tokens()
    statistics = summary(*values)
    rule: Any = partial(RANGE_RULES.get("token_percentile"), p=p)
    lows, highs, peaks = values.min(axis=-1), values.max(axis=-1), np.abs(values).max(axis=-1)
    near = partial(pytest.approx, rel=2**-11)
    low, high = rule(statistics, 8, True)
    assert -low == high == near(np.quantile(peaks, p / 100, method="inverted_cdf"))
    low, high = rule(statistics, 8, False)
    assert low == near(np.quantile(lows, 1 - p / 100, method="inverted_cdf"))
    assert high == near(np.quantile(highs, p / 100, method="inverted_cdf"))


def test_token_percentile_keeps_what_every_token_has_and_clips_what_few_have() -> None:
    """A percentile of the values clips the large channel first: it is a sixteenth of them."""
    statistics = summary(*tokens())
    low, high = partial(RANGE_RULES.get("token_percentile"), p=99.0)(statistics, 8, True)
    assert 6 < high < 15 < statistics.high
    assert partial(RANGE_RULES.get("percentile"), p=95.0)(statistics, 8, True)[1] < 6.5
    assert RANGE_RULES.get("token_percentile")(statistics, 8, True) == (low, high)


@pytest.mark.parametrize("symmetric", [True, False])
def test_token_percentile_of_all_tokens_is_minmax(symmetric: bool) -> None:
    statistics = summary(*tokens())
    rule: Any = partial(RANGE_RULES.get("token_percentile"), p=100.0)
    assert rule(statistics, 8, symmetric) == RANGE_RULES.get("minmax")(statistics, 8, symmetric)


def test_token_percentile_where_most_tokens_are_nothing_cuts_nothing() -> None:
    values = np.zeros((50, 4))
    values[0] = [20.0, 10.0, -4.0, 0.0]
    rule: Any = partial(RANGE_RULES.get("token_percentile"), p=90.0)
    assert rule(summary(values), 8, True) == (-20.0, 20.0)
    assert rule(summary(values), 8, False) == (-4.0, 20.0)


@pytest.mark.parametrize("p", [0.0, -1.0, 100.1, float("nan")])
def test_token_percentile_outside_its_bounds_is_refused(p: float) -> None:
    with pytest.raises(ConfigError, match=r"token percentile .* is not above 0 and at most 100; 90 to 100"):
        partial(RANGE_RULES.get("token_percentile"), p=p)(summary(np.ones(3)), 8, True)


# Every rule
