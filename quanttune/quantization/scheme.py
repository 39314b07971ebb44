"""Schemes: how every tensor of a profile is quantized, as values and as the text that the literature writes.

======================  =====================================================================================
``W8A8``                weights per output channel, activations static and per tensor, all symmetric
``W4A8``                other widths, 2 to 16 bits
``W8tA8``               weights per tensor
``W4g128A8``            weights in groups of 128 inputs
``W4g128zA8``           weights asymmetric, with a zero point
``W8A8-asym``           activations asymmetric
``W8A8-token``          activations by token, ranges found at run time
``W4``, ``W4g128``      weights alone; activations stay in float
``W8A16-int``           16-bit integer activations: elsewhere ``A16`` means floating point, so it must be said
======================  =====================================================================================
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from quanttune.errors import ConfigError, UnknownNameError
from quanttune.quantization.granularity.granularity import GRANULARITIES, Granularity
from quanttune.quantization.granularity.per_channel import PerChannel
from quanttune.quantization.granularity.per_tensor import PerTensor
from quanttune.quantization.sites import PROFILES, SiteTable

if TYPE_CHECKING:
    from collections.abc import Iterator

NARROWEST, WIDEST = 2, 16
DEFAULT_PROFILE = "full"
_FLOAT_WIDTH = 16
_FORM = "write e.g. W8A8, W4g128A8, W8A8-token or W4"
_TEXT = re.compile(r"W(\d+)((?:[a-z]\w*?)??)(z)?(?:A(\d+)((?:-[a-z]+)*))?")


@dataclass(frozen=True)
class Format:
    """How a tensor is quantized.

    Args:
        bits: Width, 2 to 16.
        granularity: How many ranges it has.
        symmetric: Whether codes are signed around zero; else they are unsigned, with a zero point.

    Raises:
        ConfigError: If the width is outside 2 to 16.
    """

    bits: int
    granularity: Granularity = field(default_factory=PerTensor)
    symmetric: bool = True

    def __post_init__(self) -> None:
        if not NARROWEST <= self.bits <= WIDEST:
            raise ConfigError(f"{self.bits} bits is outside {NARROWEST} to {WIDEST}; {_FORM}")

    @property
    def dynamic(self) -> bool:
        """Whether ranges are found while the network runs."""
        return self.granularity.dynamic


@dataclass(frozen=True)
class Scheme:
    """How the tensors of a profile are quantized.

    Args:
        weights: Format of every weight.
        activations: Format of every activation; ``None`` leaves them in float.
        profile: Which tensors; a name in :data:`~quanttune.quantization.sites.PROFILES`.

    Raises:
        ConfigError: If weights or activations cannot have the granularity they are given.
        UnknownNameError: If there is no such profile.
    """

    weights: Format
    activations: Format | None
    profile: str = DEFAULT_PROFILE

    def __post_init__(self) -> None:
        if self.profile not in PROFILES:
            raise UnknownNameError("profile", self.profile, PROFILES)
        if self.weights.granularity.weight_pattern is None:
            raise ConfigError(f"weights cannot be quantized {self.weights.granularity}")
        if self.activations is not None and self.activations.granularity.activation_pattern is None:
            raise ConfigError(f"activations cannot be quantized {self.activations.granularity}")

    @classmethod
    def parse(cls, text: str, profile: str = DEFAULT_PROFILE) -> Scheme:
        """Read a scheme such as ``W8A8``; see the module for the forms.

        Raises:
            ConfigError: If the text has another form, or a width is outside 2 to 16.
        """
        match = _TEXT.fullmatch(_spelled(text))
        if match is None:
            raise ConfigError(f"precision {text!r} is not of the form W<bits>A<bits>; {_FORM}")
        width, suffix, zero_point, activation_width, options = match.groups()
        what = "weights"
        try:
            weights = Format(int(width), _weight_granularity(suffix), zero_point is None)
            what = "activations"
            activations = None if activation_width is None else _activations(int(activation_width), options)
        except ConfigError as error:
            raise ConfigError(f"precision {text!r}, {what}: {error}") from None
        return cls(weights, activations, profile)

    def __str__(self) -> str:
        """The text without the profile; :meth:`parse` reads it back."""
        weights, activations = self.weights, self.activations
        text = f"W{weights.bits}{weights.granularity.weight_text}{'' if weights.symmetric else 'z'}"
        if activations is None:
            return text
        text += f"A{activations.bits}{activations.granularity.activation_text}"
        text += "" if activations.symmetric else "-asym"
        return text + ("-int" if activations.bits == _FLOAT_WIDTH else "")

    @property
    def quantizes_activations(self) -> bool:
        """Whether activations are quantized."""
        return self.activations is not None

    @property
    def is_static(self) -> bool:
        """Whether activations are quantized with ranges that calibration chooses."""
        return self.activations is not None and not self.activations.dynamic

    def sites(self, table: SiteTable) -> SiteTable:
        """The sites of a model that this scheme quantizes."""
        chosen = table.profile(self.profile)
        return chosen if self.quantizes_activations else chosen.weights()

    def with_profile(self, profile: str) -> Scheme:
        """The same formats for another set of tensors."""
        return replace(self, profile=profile)


def _spelled(text: str) -> str:
    """The text with the case of its letters as the forms have it: ``w8a8`` is ``W8A8``."""
    lower = text.strip().lower()
    head, dash, options = lower.partition("-")
    return re.sub(r"^w(?=\d)|a(?=\d+$)", lambda found: found[0].upper(), head) + dash + options


def _weight_granularity(suffix: str) -> Granularity:
    for _, kind in _granularities():
        if kind.weight_pattern is not None:
            match = re.fullmatch(kind.weight_pattern, suffix)
            if match is not None:
                return kind.from_match(match)
    known = [kind.example or suffix for _, kind in _granularities() if kind.weight_pattern]
    raise ConfigError(f"there is no option {suffix!r}; what may follow their width: {', '.join(known)}, z")


def _activations(bits: int, options: str) -> Format:
    given = [option for option in options.split("-") if option]
    twice = [option for option in given if given.count(option) > 1]
    if twice:
        raise ConfigError(f"option -{twice[0]} is given twice")
    symmetric = "asym" not in given
    integers = "int" in given
    if bits == _FLOAT_WIDTH and not integers:
        raise ConfigError(
            f"A{bits} means floating point elsewhere; leave it out to quantize weights alone, "
            f"or write A{bits}-int for {bits}-bit integers"
        )
    if integers and bits != _FLOAT_WIDTH:
        raise ConfigError(f"-int is for A{_FLOAT_WIDTH} alone; {bits} bits are integers anyway")
    rest = [option for option in given if option not in ("asym", "int")]
    suffix = "".join(f"-{option}" for option in rest)
    for _, kind in _granularities():
        if kind.activation_pattern is not None:
            match = re.fullmatch(kind.activation_pattern, suffix)
            if match is not None:
                return Format(bits, kind.from_match(match), symmetric)
    known = [kind.example for _, kind in _granularities() if kind.activation_pattern]
    raise ConfigError(
        f"there is no option {suffix!r}; what may follow their width: {', '.join([*known, '-asym'])}"
    )


def _granularities() -> Iterator[tuple[str, type[Granularity]]]:
    return GRANULARITIES.items()


def weight_granularity(name: str) -> Granularity:
    """The granularity of weights that a suite's ``weight_granularity`` names.

    Raises:
        ConfigError: If weights cannot have it, or it has a size, which the precision's text has to tell.
    """
    kind = GRANULARITIES.get(name)
    if kind.weight_pattern is None:
        raise ConfigError(f"weights cannot be quantized {kind()}")
    return kind()


PER_CHANNEL = PerChannel()
"""The granularity of weights that no text needs to tell."""
