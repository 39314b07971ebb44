"""Schemes: what is read, what is printed, what is refused."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quanttune.errors import ConfigError, UnknownNameError
from quanttune.quantization import Format, PerChannel, PerGroup, PerTensor, PerToken, Scheme
from quanttune.quantization.granularity import GRANULARITIES, Granularity
from tests.quantization.models import sites

CHANNEL, TENSOR, TOKEN = PerChannel(), PerTensor(), PerToken()


@pytest.mark.parametrize(
    ("text", "weights", "activations"),
    [
        ("W8A8", Format(8, CHANNEL), Format(8)),
        ("w6a7", Format(6, CHANNEL), Format(7)),
        (" W4A8 ", Format(4, CHANNEL), Format(8)),
        ("W2A2", Format(2, CHANNEL), Format(2)),
        ("W8tA8", Format(8, TENSOR), Format(8)),
        ("W4g128A8", Format(4, PerGroup(128)), Format(8)),
        ("w4g32za8-asym", Format(4, PerGroup(32), symmetric=False), Format(8, symmetric=False)),
        ("W8A8-token", Format(8, CHANNEL), Format(8, TOKEN)),
        ("W8A8-token-asym", Format(8, CHANNEL), Format(8, TOKEN, symmetric=False)),
        ("W4", Format(4, CHANNEL), None),
        ("W4g128", Format(4, PerGroup(128)), None),
        ("W16A16-int", Format(16, CHANNEL), Format(16)),
    ],
)
def test_reads_what_the_literature_writes(text: str, weights: Format, activations: Format | None) -> None:
    scheme = Scheme.parse(text, "matmul")
    assert scheme == Scheme(weights, activations, "matmul")
    assert Scheme.parse(str(scheme), "matmul") == scheme


@given(
    st.integers(2, 16),
    st.sampled_from([CHANNEL, TENSOR, PerGroup(2), PerGroup(128)]),
    st.booleans(),
    st.none() | st.tuples(st.integers(2, 16), st.sampled_from([TENSOR, TOKEN]), st.booleans()),
)
def test_what_is_printed_is_read_back(
    bits: int, granularity: Granularity, symmetric: bool, activations: tuple[int, Granularity, bool] | None
) -> None:
    form = None if activations is None else Format(*activations)
    scheme = Scheme(Format(bits, granularity, symmetric), form)
    assert Scheme.parse(str(scheme)) == scheme


def test_every_scheme_has_a_text_of_its_own() -> None:
    both = (True, False)
    weights = [Format(8, each, signed) for each in (CHANNEL, TENSOR, PerGroup(8)) for signed in both]
    activations = [None, *(Format(8, each, signed) for each in (TENSOR, TOKEN) for signed in both)]
    texts = [str(Scheme(*pair)) for pair in itertools.product(weights, activations)]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize(
    "text",
    ["", "8", "A8", "8A8", "W-8A8", "W8A-8", "W8.5A8", "WA", "INT8", "W 8 A 8", "four", "W8A8_token", "W8A"],
)
def test_refuses_another_form_and_shows_the_right_one(text: str) -> None:
    with pytest.raises(ConfigError, match=r"(is not of the form W<bits>A<bits>|no option).*"):
        Scheme.parse(text)


@pytest.mark.parametrize(
    ("text", "what", "bits"),
    [
        ("W0A8", "weights", 0),
        ("W8A0", "activations", 0),
        ("W1A8", "weights", 1),
        ("W8A17", "activations", 17),
        ("W32A32", "weights", 32),
        ("W999999999999999999999A8", "weights", 999999999999999999999),
    ],
)
def test_refuses_widths_out_of_range_and_names_them(text: str, what: str, bits: int) -> None:
    with pytest.raises(ConfigError, match=rf"'{text}', {what}: {bits} bits is outside 2 to 16"):
        Scheme.parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("W8xA8", "weights: there is no option 'x'"),
        ("W4g1A8", "groups of 1 weights share no range"),
        ("W8A8-channel", "activations: there is no option '-channel'"),
        ("W8A8-token-token", "activations: option -token is given twice"),
        ("W4A16", "A16 means floating point elsewhere; leave it out to quantize weights alone"),
    ],
)
def test_refuses_what_it_does_not_know_and_says_what_there_is(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        Scheme.parse(text)


def test_refuses_granularities_where_they_make_no_sense() -> None:
    with pytest.raises(ConfigError, match="weights cannot be quantized per token"):
        Scheme(Format(8, TOKEN), None)
    with pytest.raises(ConfigError, match="activations cannot be quantized per channel"):
        Scheme(Format(8, CHANNEL), Format(8, CHANNEL))
    with pytest.raises(UnknownNameError, match="unknown profile 'ful'; did you mean full"):
        Scheme.parse("W8A8", "ful")


def test_chooses_the_sites_of_its_profile() -> None:
    table = sites("vit")
    for profile in ("full", "matmul"):
        assert list(Scheme.parse("W8A8", profile).sites(table)) == list(table.profile(profile))
        assert list(Scheme.parse("W4", profile).sites(table)) == list(table.weights())


def test_a_granularity_of_ones_own_is_one_class() -> None:
    @GRANULARITIES.register("per_half")
    @dataclass(frozen=True)
    class PerHalf(Granularity):
        name: ClassVar[str] = "per_half"
        weight_pattern: ClassVar[str | None] = "h"

    try:
        scheme = Scheme.parse("W8hA8")
        assert scheme.weights.granularity == PerHalf()
        assert str(scheme) == "W8hA8"
    finally:
        del GRANULARITIES._items["per_half"]
