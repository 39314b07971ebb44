"""What two numbers differ by beyond rounding: values with the noise that rounding alone gives them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmark.keep.record import Result

DEVIATIONS = 2.0
"""Numbers closer than so many standard deviations of their difference are not called different."""


@dataclass(frozen=True)
class Rounded:
    """A number as rounding leaves it uncertain.

    Attributes:
        mean: Over the copies of every cell it is made from; the value itself where no noise was measured.
        deviation: Standard deviation by rounding alone; 0 where it was not measured.
        common: The part of it that all items share, see :class:`benchmark.keep.record.Noise`.
    """

    mean: float
    deviation: float = 0.0
    common: float = 0.0

    def __sub__(self, other: Rounded) -> Rounded:
        return Rounded(
            self.mean - other.mean,
            math.hypot(self.deviation, other.deviation),
            math.hypot(self.common, other.common),
        )

    @property
    def reach(self) -> float:
        """How far from the mean rounding alone may be expected to lead."""
        return DEVIATIONS * self.deviation

    def is_close_to(self, other: Rounded) -> bool:
        """Whether both may be the same but for rounding; never so where no noise was measured."""
        difference = self - other
        return difference.deviation > 0 and abs(difference.mean) <= difference.reach


def rounded(result: Result) -> Rounded:
    """The value of a cell."""
    noise = result.noise
    if noise is None or noise.mean is None or noise.deviation is None:
        return Rounded(result.value)
    return Rounded(noise.mean, noise.deviation, noise.common or 0.0)


def mean_of(numbers: Sequence[Rounded]) -> Rounded:
    """The mean of numbers that were rounded independently, such as seeds or models."""
    count = len(numbers)
    return Rounded(
        math.fsum(number.mean for number in numbers) / count,
        math.hypot(*(number.deviation for number in numbers)) / count,
        math.hypot(*(number.common for number in numbers)) / count,
    )


def mean_flips(results: Iterable[Result]) -> float | None:
    """Percentage of predictions that flip, mean over cells; ``None`` where no cell has it."""
    found = [result.noise.flips for result in results if result.noise and result.noise.flips is not None]
    return math.fsum(found) / len(found) if found else None
