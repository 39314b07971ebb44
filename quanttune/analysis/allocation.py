r"""Which tensor gets how many bits: the exact optimum under a budget, and the whole Pareto front.

Units ``i`` of ``n_i`` elements each take one width ``w`` of a few, which costs ``n_i w`` bits and a loss
``L_i(w)``. Losses are taken to add up::

    minimise  sum_i L_i(w_i)   subject to   sum_i n_i w_i <= budget

This is the integer program of HAWQ-V3 (Yao et al. 2020, arXiv 2011.10680) with the losses and the
front of ZeroQ (Cai et al. 2020, arXiv 2001.00281). It is solved by dynamic programming over the
choices that nothing dominates (Nemhauser and Ullmann 1969): a choice is dropped if another one has no more
bits and no more loss. Units of the same size are merged first, so that few sums of bits are different.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce

import numpy as np

from quanttune.errors import ConfigError

STATES = 1 << 22
"""Pairs of choices that are looked at in one step; see :attr:`Front.exact`."""


@dataclass(frozen=True)
class Unit:
    """What has one width.

    Args:
        name: Its name.
        size: Its elements, positive.
        losses: By width in bits.

    Raises:
        ConfigError: If there is no element or no width, or a loss is not finite.
    """

    name: str
    size: int
    losses: Mapping[int, float]

    def __post_init__(self) -> None:
        if self.size < 1 or not self.losses:
            counts = f"{self.size} elements and {len(self.losses)} widths"
            raise ConfigError(f"unit {self.name}: {counts}; give some of each")
        if not all(np.isfinite(loss) for loss in self.losses.values()):
            raise ConfigError(f"unit {self.name}: losses {dict(self.losses)} must be finite")


@dataclass(frozen=True)
class Front:
    """Every choice of widths that no other one dominates, from few bits to many.

    Attributes:
        bits: Sum of all elements' bits, int64 ``(choices,)``, rising.
        losses: Sum of losses, float64 ``(choices,)``, falling.
        size: Elements of all units.
        exact: Whether none was left out. Where units are many and all of different sizes, only the best of
            each of many equal parts of the bits is followed; what is found then fits every budget that it is
            said to fit, but another choice might be better.
    """

    bits: np.ndarray
    losses: np.ndarray
    size: int
    exact: bool = True
    _unit: tuple[str, tuple[int, ...]] | None = field(default=None, repr=False)
    _parts: tuple[tuple[Front, np.ndarray], ...] = field(default=(), repr=False)

    def at(self, budget: float) -> int:
        """The place of the best choice with at most so many bits an element on average.

        Raises:
            ConfigError: If even the fewest bits are more.
        """
        # Whole bits: 6.0 times the elements must not fail by a rounding of the average.
        found = int(np.searchsorted(self.bits, int(np.floor(budget * self.size + 1e-6)), side="right")) - 1
        if found < 0:
            least = self.bits[0] / self.size
            raise ConfigError(f"a budget of {budget:g} bits on average: {least:.3g} are the fewest")
        return found

    def widths(self, place: int) -> dict[str, int]:
        """The width of each unit in a choice."""
        if self._unit is not None:
            name, widths = self._unit
            return {name: widths[place]}
        return {
            name: width
            for part, places in self._parts
            for name, width in part.widths(int(places[place])).items()
        }

    def points(self, step: float = 0.25) -> list[tuple[float, float]]:
        """Average bits, a multiple of ``step``, and the loss of the best choice with at most these."""
        low, high = self.bits[0] / self.size, self.bits[-1] / self.size
        first, last = int(np.ceil(low / step - 1e-9)), int(high / step + 1e-9)
        budgets = [step * index for index in range(first, last + 1)]
        return [(budget, float(self.losses[self.at(budget)])) for budget in budgets]


def pareto_front(units: Sequence[Unit], states: int = STATES) -> Front:
    """The Pareto front of a set of units; the same to the bit wherever the losses are.

    Args:
        units: At least one; names differ.
        states: How many pairs of choices may be looked at in one step.

    Raises:
        ConfigError: If there is no unit, or two have the same name.
    """
    if len({unit.name for unit in units}) != len(units) or not units:
        raise ConfigError(f"{len(units)} units: give at least one, each with a name of its own")
    sizes: dict[int, list[Front]] = {}
    for unit in units:
        sizes.setdefault(unit.size, []).append(_leaf(unit))

    def merged(fronts: Sequence[Front]) -> Front:
        return reduce(lambda one, other: _merge(one, other, states), fronts)

    return merged([merged(sizes[size]) for size in sorted(sizes)])


def _leaf(unit: Unit) -> Front:
    widths = sorted(unit.losses)
    bits = np.array([unit.size * width for width in widths], dtype=np.int64)
    losses = np.array([unit.losses[width] for width in widths], dtype=np.float64)
    kept = _undominated(bits, losses)
    chosen = tuple(widths[place] for place in kept)
    return Front(bits[kept], losses[kept], unit.size, _unit=(unit.name, chosen))


def _merge(one: Front, other: Front, states: int) -> Front:
    exact = one.exact and other.exact
    if len(one.bits) * len(other.bits) > states:
        one, other = (_thinned(front, int(states**0.5)) for front in (one, other))
        exact = False
    bits = np.add.outer(one.bits, other.bits).ravel()
    losses = np.add.outer(one.losses, other.losses).ravel()
    kept = _undominated(bits, losses)
    first, second = np.divmod(kept, len(other.bits))
    parts = ((one, first), (other, second))
    return Front(bits[kept], losses[kept], one.size + other.size, exact, _parts=parts)


def _undominated(bits: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Places of the choices that nothing dominates, by rising bits; of equal ones the first."""
    order = np.lexsort((losses, bits))
    least = np.minimum.accumulate(losses[order])
    better = np.r_[True, losses[order][1:] < least[:-1]]
    return order[better]


def _thinned(front: Front, count: int) -> Front:
    """At most ``count`` choices: the fewest bits, and the last one of each equal part of the rest."""
    if len(front.bits) <= count:
        return front
    parts = (front.bits - front.bits[0]) * (count - 1) // max(1, int(front.bits[-1] - front.bits[0]) + 1)
    kept = np.r_[0, np.flatnonzero(np.diff(parts, append=parts[-1] + 1))]
    kept = np.unique(kept)
    return Front(front.bits[kept], front.losses[kept], front.size, False, _parts=((front, kept),))
