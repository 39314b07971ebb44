"""Bit widths of weights and activations, written the way the literature writes them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from quanttune.errors import ConfigError

_PATTERN = re.compile(r"W(\d+)A(\d+)")
_NARROWEST, _WIDEST = 2, 16


@dataclass(frozen=True, order=True)
class Precision:
    """Widths in bits, e.g. W8A8.

    Args:
        weights: Bits of every weight, 2 to 16.
        activations: Bits of every activation, 2 to 16.

    Raises:
        ConfigError: If a width is outside 2 to 16.
    """

    weights: int
    activations: int

    def __post_init__(self) -> None:
        for what, bits in (("weights", self.weights), ("activations", self.activations)):
            if not _NARROWEST <= bits <= _WIDEST:
                raise ConfigError(
                    f"precision {self}: {bits} bits for {what} is outside {_NARROWEST} to {_WIDEST}; "
                    "write e.g. W8A8"
                )

    @classmethod
    def parse(cls, text: str) -> Precision:
        """Read ``"W8A8"``.

        Raises:
            ConfigError: If the text has another form or a width outside 2 to 16.
        """
        match = _PATTERN.fullmatch(text.strip().upper())
        if match is None:
            raise ConfigError(f"precision {text!r} is not of the form W<bits>A<bits>; write e.g. W8A8")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"W{self.weights}A{self.activations}"
