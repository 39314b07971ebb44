"""The contract of a granularity, and the registry that the text of a scheme is read with."""

from __future__ import annotations

from abc import ABC
from typing import TYPE_CHECKING, ClassVar, Self

from quanttune.errors import ConfigError
from quanttune.registry import Registry

if TYPE_CHECKING:
    import re

    from torch import Tensor

    from quanttune.quantization.quantizers import Quantizer
    from quanttune.quantization.ranges import RangeRule
    from quanttune.quantization.sites import Site
    from quanttune.quantization.statistics import TensorStatistics


class Granularity(ABC):
    """How many ranges a tensor has, and the quantizers that follow.

    Class attributes:
        name: The registered name, with which a suite's ``weight_granularity`` chooses.
        weight_pattern: Regular expression of what follows ``W<bits>`` in the text of a scheme; ``None`` if
            weights cannot have this granularity.
        activation_pattern: The same of what follows ``A<bits>``.
        example: How the text of a scheme names it, for messages.
        dynamic: Whether ranges are found while the network runs.
    """

    name: ClassVar[str]
    weight_pattern: ClassVar[str | None] = None
    activation_pattern: ClassVar[str | None] = None
    example: ClassVar[str] = ""
    dynamic: ClassVar[bool] = False

    @classmethod
    def from_match(cls, match: re.Match[str]) -> Self:
        """The granularity that a text matched by one of the patterns names."""
        return cls()

    @property
    def weight_text(self) -> str:
        """What follows ``W<bits>``."""
        return self.weight_pattern or ""

    @property
    def activation_text(self) -> str:
        """What follows ``A<bits>``."""
        return self.activation_pattern or ""

    def weight_quantizer(self, weight: Tensor, bits: int, symmetric: bool, axis: int) -> Quantizer:
        """The min-max quantizer of a weight whose outputs are on dimension ``axis``.

        Raises:
            ConfigError: If weights cannot have this granularity.
        """
        raise ConfigError(f"weights cannot be quantized {self}")

    def activation_quantizer(
        self, site: Site, statistics: TensorStatistics | None, bits: int, symmetric: bool, rule: RangeRule
    ) -> Quantizer:
        """The quantizer of an activation site.

        Args:
            site: The site.
            statistics: What calibration saw there; ``None`` for dynamic granularities, which need none.
            bits: Width.
            symmetric: Whether codes are signed around zero.
            rule: From statistics to a range.

        Raises:
            ConfigError: If activations cannot have this granularity.
        """
        raise ConfigError(f"activations cannot be quantized {self}")

    def __str__(self) -> str:
        return self.name.replace("_", " ")


GRANULARITIES: Registry[type[Granularity]] = Registry(
    "granularity", packages=("quanttune.quantization.granularity",)
)
"""Every granularity, by name."""
