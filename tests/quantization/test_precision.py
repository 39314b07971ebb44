"""Precisions: what is read, and what is refused."""

from __future__ import annotations

import pytest

from quanttune.errors import ConfigError
from quanttune.quantization import Precision


class TestPrecision:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [("W8A8", (8, 8)), ("w6a7", (6, 7)), (" W4A16 ", (4, 16)), ("W2A2", (2, 2)), ("W16A16", (16, 16))],
    )
    def test_reads_what_the_literature_writes(self, text: str, expected: tuple[int, int]) -> None:
        precision = Precision.parse(text)
        assert (precision.weights, precision.activations) == expected
        assert Precision.parse(str(precision)) == precision

    @pytest.mark.parametrize(
        "text",
        ["", "8", "W8", "A8", "8A8", "W-8A8", "W8A-8", "W8.5A8", "W8A8x", "WA", "INT8", "W 8 A 8", "four"],
    )
    def test_refuses_another_form_and_shows_the_right_one(self, text: str) -> None:
        with pytest.raises(ConfigError, match=r"is not of the form W<bits>A<bits>; write e\.g\. W8A8"):
            Precision.parse(text)

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
    def test_refuses_widths_out_of_range_and_names_them(self, text: str, what: str, bits: int) -> None:
        with pytest.raises(ConfigError, match=rf"{text}: {bits} bits for {what} is outside 2 to 16"):
            Precision.parse(text)

    def test_refuses_negative_widths(self) -> None:
        with pytest.raises(ConfigError, match="-8 bits for weights"):
            Precision(-8, 8)

    def test_orders_and_hashes(self) -> None:
        assert Precision(6, 6) < Precision(7, 7) < Precision(8, 8)
        assert len({Precision(8, 8), Precision.parse("W8A8")}) == 1
