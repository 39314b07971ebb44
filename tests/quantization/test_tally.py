"""Counts in half precision against the definition: the short code of each value, one by one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quanttune.quantization import tally
from quanttune.quantization.histogram import CodeCounts, short_codes
from quanttune.quantization.tally import ExtremesTally, Tally
from quanttune.quantization.walkers import safe_softmax

COUNT = 3 * tally._FEW


def drawn(seed: int = 0, count: int = COUNT) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def around_powers(lowest: int, highest: int) -> Tensor:
    """Every rounding case near each power of two: a few units around it, in both signs."""
    bits = torch.arange(-3 * 2**12, 3 * 2**12, 2**9 - 3, dtype=torch.int32)
    powers = (torch.arange(lowest, highest, dtype=torch.int32) + 127) << 23
    values = (powers[:, None] + bits).view(torch.float32).flatten()
    return torch.cat([values, -values])


CASES = {
    "gaussian": drawn(),
    "tails": drawn() * torch.exp(12 * drawn(1)),
    "as after GELU": torch.nn.functional.gelu(6 * drawn()),
    "as after ReLU": (drawn() * torch.exp(8 * drawn(1))).relu(),
    "signed zeros": torch.cat([drawn(), torch.zeros(COUNT), torch.full((COUNT,), -0.0)]),
    "zeros": torch.zeros(COUNT),
    "huge": drawn() * 2.0**125,
    "largest": torch.cat([drawn(), torch.full((2,), torch.finfo(torch.float32).max)]),
    "subnormal": drawn() * 2.0**-130,
    "tiny": drawn() * 2.0**-95,
    "every exponent": around_powers(-126, 127),
    "29 exponents": around_powers(-15, 15),
}


def assert_counts(values: Tensor, found: Tally) -> None:
    codes, counts = short_codes(values).long().unique(return_counts=True)
    assert torch.equal(found.counts().codes, codes)
    assert torch.equal(found.counts().counts, counts)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_counts_are_those_of_the_short_codes(case: str, dtype: torch.dtype) -> None:
    values = CASES[case].to(dtype)
    found = Tally()
    found.add(values, float(values.abs().max()))
    assert_counts(values, found)


def test_batches_of_any_size_and_reach_add_up() -> None:
    batches = [values * factor for values in CASES.values() for factor in (1.0, 2.0**-9)]
    batches = [drawn(3, 5), *batches, drawn(4, 7)]
    found = Tally()
    for number, batch in enumerate(batches):
        found.add(batch, float(batch.abs().max()))
        if number == 5:
            found.counts()  # asked for in between
    assert_counts(torch.cat(batches), found)


def test_a_count_does_not_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tally, "_MOST", 2 * COUNT)
    found = Tally()
    for _ in range(5):
        found.add(torch.ones(COUNT), 1.0)
    assert_counts(torch.ones(5 * COUNT), found)
    found.add(torch.ones(3 * COUNT), 1.0)
    assert_counts(torch.ones(8 * COUNT), found)


def test_extremes_of_many_tokens_are_those_of_few(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [drawn(seed, 5000 * 4).view(5000, 4) * 2.0 ** (20 * seed) for seed in range(3)]
    whole = ExtremesTally(tally.CodeCounts.joined([tally.CodeCounts()] * 3))
    for batch in batches:
        whole.add(batch, -1)
    monkeypatch.setattr(tally, "_MANY_TOKENS", 1)
    parts = ExtremesTally(tally.CodeCounts.joined([tally.CodeCounts()] * 3))
    for batch in batches:
        for part in batch.split(100):
            parts.add(part, -1)
    assert torch.equal(whole.counts().packed(), parts.counts().packed())
    lows = torch.cat(batches).amin(dim=-1)
    codes, counts = short_codes(lows).long().unique(return_counts=True)
    assert torch.equal(whole.counts().part(0).packed(), torch.stack([codes, counts]))


def test_softmax_of_rows_that_are_masked_throughout_and_of_others_alike() -> None:
    scores = drawn(0, 60).view(3, 4, 5).double()
    plain = torch.softmax(scores, dim=-1)
    assert torch.equal(safe_softmax(scores), plain)
    scores[1, 2] = float("-inf")
    found = safe_softmax(scores)
    assert not found[1, 2].any()
    plain[1, 2] = 0
    assert torch.equal(found, plain)


def test_extremes_of_many_batches_are_kept_in_one_block() -> None:
    batches = [torch.randn(1 + 37 * number % 50, 8) * (1 + number) for number in range(40)]
    batches[7] = batches[7].half()
    batches[9] = batches[9].double()
    several = ExtremesTally(CodeCounts())
    for batch in batches:
        several.add(batch, -1)
    tokens = sum(len(batch) for batch in batches)
    assert several._kept is not None
    assert several._kept.shape[1] <= 4 * tokens
    one = ExtremesTally(CodeCounts())
    one.add(torch.cat([batch.double() for batch in batches]), -1)
    assert torch.equal(several.counts().packed(), one.counts().packed())
