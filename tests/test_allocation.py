"""Which tensor gets how many bits: against every choice there is, and where there are too many to follow."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from quanttune.analysis import Unit, pareto_front
from quanttune.errors import ConfigError

WIDTHS = (4, 6, 8)


def units(count: int, seed: int, sizes: tuple[int, ...] = (3, 5, 7, 12)) -> list[Unit]:
    generator = np.random.default_rng(seed)
    return [
        Unit(
            f"unit {index}",
            int(generator.choice(sizes)),
            # of equal losses, and of some that do not fall with the bits, as measurements do not always
            {width: float(generator.choice([0.0, generator.random() * 4.0**-width])) for width in WIDTHS},
        )
        for index in range(count)
    ]


@pytest.mark.parametrize("seed", range(20))
def test_the_front_is_the_best_of_all_choices(seed: int) -> None:
    found = units(1 + seed % 6, seed)
    front = pareto_front(found)
    size = sum(unit.size for unit in found)
    assert front.exact
    assert front.size == size
    assert (np.diff(front.bits) > 0).all()
    assert (np.diff(front.losses) < 0).all()
    choices = [
        (
            sum(unit.size * width for unit, width in zip(found, widths, strict=True)),
            sum(unit.losses[width] for unit, width in zip(found, widths, strict=True)),
        )
        for widths in itertools.product(WIDTHS, repeat=len(found))
    ]
    for budget in (4, 4.3, 5, 6, 7.7, 8, 20):
        place = front.at(budget)
        assert front.bits[place] <= budget * size
        least = min(loss for bits, loss in choices if bits <= budget * size)
        assert front.losses[place] == pytest.approx(least, rel=1e-12, abs=1e-18)
        widths = front.widths(place)
        assert set(widths) == {unit.name for unit in found}
        assert sum(unit.size * widths[unit.name] for unit in found) == front.bits[place]
        assert sum(unit.losses[widths[unit.name]] for unit in found) == pytest.approx(front.losses[place])


def test_the_points_are_the_best_at_round_averages() -> None:
    front = pareto_front(units(6, 3))
    points = front.points(0.5)
    assert [budget for budget, _ in points] == sorted({budget for budget, _ in points})
    assert all(loss == front.losses[front.at(budget)] for budget, loss in points)
    assert points[0][0] * front.size >= front.bits[0]


def test_one_width_is_one_choice() -> None:
    front = pareto_front([Unit("a", 3, {8: 0.1}), Unit("b", 4, {8: 0.2})])
    assert front.bits.tolist() == [56]
    assert front.widths(front.at(8)) == {"a": 8, "b": 8}


def test_where_choices_are_too_many_what_is_found_fits_and_is_close() -> None:
    found = units(60, 1, tuple(range(1001, 1400)))
    whole, thinned = pareto_front(found), pareto_front(found, states=1 << 9)
    assert whole.exact
    assert not thinned.exact
    assert len(thinned.bits) < len(whole.bits)
    for budget in (4, 5, 6, 7, 8):
        place = thinned.at(budget)
        widths = thinned.widths(place)
        assert sum(unit.size * widths[unit.name] for unit in found) == thinned.bits[place]
        assert thinned.bits[place] <= budget * thinned.size
        best = whole.losses[whole.at(budget)]
        assert best <= thinned.losses[place] + 1e-15
        if budget > 4:
            assert thinned.losses[place] <= 1.2 * best


def test_a_budget_below_the_narrowest_says_what_is_least() -> None:
    with pytest.raises(ConfigError, match=r"a budget of 3.9 bits on average: 4 are the fewest"):
        pareto_front([Unit("a", 3, dict.fromkeys(WIDTHS, 0.0))]).at(3.9)


@pytest.mark.parametrize(
    ("size", "losses", "what"),
    [(0, {4: 0.0}, "0 elements"), (3, {}, "0 widths"), (3, {4: float("nan")}, "must be finite")],
)
def test_a_unit_without_bits_or_losses_is_refused(size: int, losses: dict[int, float], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        Unit("a", size, losses)


def test_no_unit_and_two_of_one_name_are_refused() -> None:
    unit = Unit("a", 3, {4: 0.0})
    for found in ([], [unit, unit]):
        with pytest.raises(ConfigError, match="give at least one, each with a name of its own"):
            pareto_front(found)
