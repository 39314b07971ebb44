"""Measuring published cells again, and what may be expected of the second number.

Three rules, of which the record says the one that holds:

- *to the bit*: where the weights are the same, the quantized model is computed exactly
  (docs/reproducibility.md), so each prediction and score of each item must be the published one, and so must
  the noise of rounding, whatever the processor.
- *up to rounding*: FP32 is computed by the model's own kernels, which round differently on another processor.
  Of at most one item in a thousand may a score differ by more than 1e-4 of itself and 1e-5.
- *within the interval*: where weights were trained here, on another processor or by another version of a
  library, their last digits differ. The drop must then lie within the published 95 % interval, widened by
  that of the new one: two estimates of one number whose intervals touch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from benchmark.grid.order import phase_of
from benchmark.keep.record import DONE, Record, Result
from quanttune.digests import json_digest

if TYPE_CHECKING:
    from benchmark.engine.runner import CellRunner
    from benchmark.keep.store import Store

TO_THE_BIT, ROUNDED, WITHIN = "to the bit", "up to rounding", "within the interval"
_ROUNDING = 1e-4
_ITEMS_APART = 1000


@dataclass(frozen=True)
class Verdict:
    """What a second measurement of a cell says of the first.

    Attributes:
        published: The record that came with the code.
        again: The new one; ``None`` where the cell could not be measured.
        rule: :data:`TO_THE_BIT`, :data:`ROUNDED` or :data:`WITHIN`; empty where there is no second number.
        holds: Whether the second number is as the rule says.
        why: What is not, or why there is no number; empty if it holds.
    """

    published: Record
    again: Record | None
    rule: str
    holds: bool
    why: str = ""

    def __str__(self) -> str:
        record = self.published
        cell = record.cell
        name = f"{cell.cell_id[:12]} {cell.model} {cell.label} {cell.scheme_text} {cell.profile}"
        value = "" if record.result is None else f"{record.result.value:.2f}"
        if self.holds:
            return f"agrees {self.rule}: {name}  {value}"
        return f"differs: {name}  {value}: {self.why}"


def measured_again(chosen: Iterable[Record], published: Store, runner: CellRunner) -> Iterator[Verdict]:
    """Measure cells and compare, one after another.

    Args:
        chosen: Records of ``published``.
        published: Where their items are.
        runner: Measures into a store of its own; what that has is not measured again.
    """
    runner.store.prepare()
    for record in chosen:
        outcome = runner.run(record.cell)
        again = runner.store.load(record.cell)
        yield compare(record, published.measured_like(record), again, runner.store, outcome.message)


def summary(verdicts: Sequence[Verdict]) -> str:
    """How many cells agree, and by which rule."""
    agree = sum(verdict.holds for verdict in verdicts)
    by_rule = {
        rule: sum(verdict.rule == rule and verdict.holds for verdict in verdicts)
        for rule in (TO_THE_BIT, ROUNDED, WITHIN)
    }
    counts = ", ".join(f"{count} {rule}" for rule, count in by_rule.items() if count)
    return f"{agree} of {len(verdicts)} cells agree" + (f": {counts}" if counts else "")


def sample(records: Iterable[Record], count: int | None, trained: bool = False) -> list[Record]:
    """Records to measure again: of each model and kind of method some, drawn by a hash of their ids.

    Args:
        records: Published records.
        count: How many; ``None`` for all.
        trained: Only those of methods that train or optimise, in place of the others.

    Returns:
        In the order in which their models and methods take turns.
    """
    groups: dict[tuple[str, str, str], list[Record]] = defaultdict(list)
    for record in sorted(records, key=lambda each: json_digest([each.cell.cell_id])):
        cell = record.cell
        expensive = phase_of(cell) > 1
        if record.status == DONE and not cell.is_reference and expensive == trained:
            groups[cell.model, cell.profile, cell.method].append(record)
    by_model: dict[str, list[list[Record]]] = defaultdict(list)
    for key in sorted(groups, key=lambda each: json_digest(list(each))):
        by_model[key[0]].append(groups[key])
    # Models take turns, and within a model the methods do: a small sample then has some of each.
    turns = {model: _in_turn(found) for model, found in sorted(by_model.items())}
    chosen = _in_turn(list(turns.values()))
    return chosen if count is None else chosen[:count]


def _in_turn(lists: list[list[Record]]) -> list[Record]:
    longest = max((len(found) for found in lists), default=0)
    return [found[index] for index in range(longest) for found in lists if index < len(found)]


def compare(published: Record, old: Store, again: Record | None, new: Store, failure: str = "") -> Verdict:
    """Hold a second measurement against the published one.

    Args:
        published: The record that came with the code.
        old: Where its items are.
        again: The new record of the same cell.
        new: Where its items are.
        failure: Why there is none.
    """
    if again is None or again.result is None or published.result is None:
        return Verdict(published, again, "", False, failure or "no number was measured")
    weights = (published.reference_digest, published.weights_digest)
    first, second = published.result, again.result
    if (again.reference_digest, again.weights_digest) == weights:
        items = old.items(published.cell.cell_id), new.items(again.cell.cell_id)
        why = _unequal_items(*items) or _unequal(first, second)
        if why and published.cell.is_reference:
            why = _unequal_items(*items, rounded=True)
            return Verdict(published, again, ROUNDED, not why, why)
        return Verdict(published, again, TO_THE_BIT, not why, why)
    why = _apart(first, second)
    return Verdict(published, again, WITHIN, not why, why)


def _unequal_items(
    old: Mapping[str, np.ndarray], new: Mapping[str, np.ndarray], rounded: bool = False
) -> str:
    """What differs of the items although nothing may, or nothing but by ``rounded``."""
    for name in sorted(old):
        if name not in new or old[name].shape != new[name].shape:
            return f"{name} of the items are others"
        apart = old[name] != new[name]
        if rounded and name != "ids":
            apart = ~np.isclose(new[name], old[name], rtol=_ROUNDING, atol=_ROUNDING / 10, equal_nan=True)
        differing = int(apart.reshape(len(old[name]), -1).any(axis=1).sum())
        if differing > (len(old[name]) // _ITEMS_APART if rounded else 0):
            return f"{name} of {differing} of {len(old[name])} items differ"
    return ""


def _unequal(first: Result, second: Result) -> str:
    """What differs of the numbers although nothing may."""
    if first.value != second.value:
        return f"the metric is {second.value!r} and not {first.value!r}"
    return "" if first.noise == second.noise else "the noise of rounding differs"


def _apart(first: Result, second: Result) -> str:
    """By how much the intervals of two drops do not touch; nothing if they do."""
    ends = (first.ci_low, first.ci_high, second.ci_low, second.ci_high)
    known = [end for end in ends if end is not None]
    if len(known) < len(ends):
        return "a drop has no interval"
    low, high, other_low, other_high = known
    gap = max(other_low - high, low - other_high)
    if gap <= 0:
        return ""
    return f"drop {second.drop:.2f} and not {first.drop:.2f}: the intervals are {gap:.2f} apart"
