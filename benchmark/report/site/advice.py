"""Which method to use: an answer in one line a precision, computed from the records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmark.report.costs import seconds_text
from benchmark.report.site.board import EVERY, Group, Line


@dataclass(frozen=True)
class Advice:
    """What to use at one precision.

    Attributes:
        best: The method that keeps most of FP32, mean over the models.
        untrained: The best of those that do not train; ``None`` if it is the best itself.
        models: Over how many models.
    """

    width: str
    profile: str
    best: Line
    untrained: Line | None
    models: int

    def __str__(self) -> str:
        text = f"{self.width} {self.profile}: {_told(self.best)}"
        if self.untrained is not None:
            text += f"; without training {_told(self.untrained)}"
        return text


def advice_of(groups: Sequence[Group]) -> list[Advice]:
    """An answer for every precision of a suite, from the methods that were measured on each of its models."""
    several = any(group.setting.model == EVERY for group in groups)
    found = []
    for group in groups:
        if several and group.setting.model != EVERY:
            continue
        whole = [line for line in group.lines if len(line.parts) in (0, group.models)]
        if not whole:
            continue
        untrained = next((line for line in whole if not line.trained), None)
        best = whole[0]
        found.append(
            Advice(
                group.setting.width,
                group.setting.profile,
                best,
                None if untrained is best else untrained,
                group.models,
            )
        )
    return found


def _told(line: Line) -> str:
    cost = "" if line.seconds is None else f" in {seconds_text(line.seconds)} s"
    return f"{line.method} keeps {line.recovery:.1f} % of FP32{cost}"
