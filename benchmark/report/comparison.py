"""QuantTune beside its rivals: gains in points with paired intervals, from per-item scores."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from benchmark.engine.measure import CONFIDENCE, RESAMPLES, shared_draws
from benchmark.grid.schemes import axes_of, scheme_of
from benchmark.keep.record import Record
from benchmark.report.roles import CALIBRATORS, CONTROLS, OURS, STATE_OF_THE_ART, is_chosen, role_of
from benchmark.report.rounding import Rounded, mean_of, rounded
from benchmark.report.rows import SuiteRows
from benchmark.subject.lookup import get_task
from benchmark.subject.metrics.display import in_points
from quanttune.seeds import numpy_generator

if TYPE_CHECKING:
    import pandas as pd

RIVALS: Mapping[str, Collection[str]] = {
    "calibrator": CALIBRATORS,
    "finetune": CONTROLS,
    "state_of_the_art": STATE_OF_THE_ART,
}
"""The kinds of rival that stand beside QuantTune, each with the roles of the methods that compete in it."""

CHOICE = "chosen_calibrator"
"""What a record's details call the calibrator that was chosen on validation items."""

CHOSEN: Mapping[str, Collection[str]] = {"calibrator": CALIBRATORS, "finetune": CONTROLS}
"""The kinds of which a choice on validation items may stand beside the best after the fact."""


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval; both ends ``None`` where there is none."""

    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{_tidy(self.value)}"
        return f"{_tidy(self.value)} [{_tidy(self.low)}, {_tidy(self.high)}]"


@dataclass(frozen=True)
class Scored:
    """One method on one model at one precision.

    Attributes:
        label: The method's label.
        scores: Score of every item, mean over seeds, shape ``(N,)``.
        value: The metric; with several seeds its mean.
        fp32: The reference's.
        fp32_own: That of the method's own weights, unquantized, if it trains.
        rounded: The value with the noise of rounding, by which methods are compared.
        choices: Of a method that chose on validation items: what it took, one for each seed.
    """

    label: str
    scores: np.ndarray
    value: float
    fp32: float
    fp32_own: float | None
    rounded: Rounded
    choices: tuple[str, ...] = ()

    @property
    def named(self) -> str:
        """The label, with what was chosen if anything was."""
        chosen = ", ".join(dict.fromkeys(self.choices))
        return f"{self.label} ({chosen})" if chosen else self.label

    @property
    def drop(self) -> float:
        """Drop against the reference."""
        return self.fp32 - self.value


class Comparison:
    """A suite's finished cells of its first profile, granularity and symmetry, by model, precision and label.

    Only models whose metric is in points, such as accuracy, take part.

    Args:
        rows: The suite's cells.
    """

    def __init__(self, rows: SuiteRows) -> None:
        suite = rows.suite
        profile, axes = suite.profiles[0], (suite.weight_granularity[0], suite.symmetric[0])
        wanted = {axes_of(scheme_of(precision, *axes, profile)) for precision in suite.precisions}
        precisions: dict[str, None] = {}
        self.tasks: dict[str, str] = {}
        self._methods: dict[str, str] = {}  # the method of each label
        self._chosen: set[str] = set()  # labels of those that chose on validation items
        groups: dict[tuple[str, str, str], list[Record]] = {}
        for cell in rows.cells:
            record = rows.records.get(cell.cell_id)
            if record is None or record.result is None:
                continue
            # points alone may be averaged over models
            if not in_points(record.result.metric):
                continue
            setting = (cell.precision, cell.weight_granularity, cell.symmetric)
            if not cell.is_reference and cell.profile == profile and setting in wanted:
                precision = rows.precision_of(cell)
                precisions[precision] = None
                groups.setdefault((cell.model, precision, cell.label), []).append(record)
                self.tasks[cell.model] = cell.task
                self._methods[cell.label] = cell.method
                if is_chosen(cell.method, cell.parameters):
                    self._chosen.add(cell.label)
        self.precisions = list(precisions)
        self._scored = {key: _scored(key[2], records, rows) for key, records in groups.items()}

    @property
    def models(self) -> list[str]:
        """Models of which a quantized cell is done, in the suite's order."""
        return list(self.tasks)

    def get(self, model: str, precision: str, label: str) -> Scored | None:
        """A method's scores; ``None`` if they were not measured."""
        return self._scored.get((model, precision, label))

    def rivals(self, roles: Collection[str], *, chosen: bool = False) -> list[str]:
        """Labels of the methods with one of these roles, QuantTune aside, in the suite's order.

        Args:
            roles: Some of :data:`baselines.method.ROLES`.
            chosen: Those that chose on validation items, in place of all others.
        """
        return [
            label
            for label, method in self._methods.items()
            if method != OURS and role_of(method) in roles and (label in self._chosen) == chosen
        ]

    def best(
        self, model: str, precision: str, roles: Collection[str], *, chosen: bool = False
    ) -> Scored | None:
        """The best rival with one of these roles, whatever its parameters; ``None`` if there is none.

        It is looked up after the fact, on the items that it is measured on. Where the noise of rounding was
        measured, the best is chosen by the mean over the copies.

        Args:
            model: Name of the model.
            precision: Bit widths.
            roles: Some of :data:`baselines.method.ROLES`.
            chosen: Among those that chose on validation items, of which a suite has one, so that nothing is
                looked up after the fact.
        """
        found = [self.get(model, precision, label) for label in self.rivals(roles, chosen=chosen)]
        return max((one for one in found if one is not None), key=lambda one: one.rounded.mean, default=None)

    def gain(self, pairs: dict[str, tuple[Scored, Scored]]) -> Estimate:
        """How much better the first of each pair is than the second, in points, averaged over models.

        The interval comes from the paired bootstrap: items are drawn with replacement, for each model
        apart and the same for both of a pair. The choice of a best rival is not redrawn. What rounding does
        to all items at once is added as in the interval of a drop, and the interval ends no closer to the
        mean gain over the copies than rounding alone may lead.

        Args:
            pairs: By model; at least one.
        """
        values, draws, differences = [], [], []
        for model, (ours, rival) in pairs.items():
            metric = get_task(self.tasks[model]).metric_value
            count = len(ours.scores)
            generator = numpy_generator(0, "claims", model, count)
            drawn = generator.integers(0, count, (RESAMPLES, count))
            values.append(metric(ours.scores) - metric(rival.scores))
            gains = np.array([metric(ours.scores[row]) - metric(rival.scores[row]) for row in drawn])
            difference = ours.rounded - rival.rounded
            draws.append(gains + shared_draws(difference.common, "claims", model, count))
            differences.append(difference)
        tail = 100 * (1 - CONFIDENCE) / 2
        low, high = np.percentile(np.mean(draws, axis=0), [tail, 100 - tail])
        gain = mean_of(differences)
        if gain.deviation:
            low, high = min(low, gain.mean - gain.reach), max(high, gain.mean + gain.reach)
        return Estimate(float(np.mean(values)), float(low), float(high))

    def pairs(
        self, precision: str, roles: Collection[str], *, chosen: bool = False
    ) -> dict[str, tuple[Scored, Scored]]:
        """QuantTune with min-max and the best rival as of :meth:`best`, for each model that has both."""
        found = {}
        for model in self.models:
            mine = self.get(model, precision, OURS)
            rival = self.best(model, precision, roles, chosen=chosen)
            if mine is not None and rival is not None:
                found[model] = (mine, rival)
        return found


def comparison_frame(comparison: Comparison) -> pd.DataFrame:
    """A line per model and precision: the best rivals' drops, QuantTune's, and its gains with intervals."""
    import pandas as pd

    lines = []
    for model in comparison.models:
        for precision in comparison.precisions:
            ours = comparison.get(model, precision, OURS)
            if ours is None:
                continue
            control = comparison.best(model, precision, CONTROLS)
            known = [ours.fp32, *([control.fp32_own] if control and control.fp32_own is not None else [])]
            line: dict[str, str | float | None] = {
                "model": model,
                "precision": precision,
                "fp32": ours.fp32,
                "quanttune": ours.value,
                "quanttune_drop": ours.drop,
                "quanttune_drop_against_better_fp32": max(known) - ours.value,
            }
            for name, roles in RIVALS.items():
                line |= _beside(
                    comparison, model, ours, comparison.best(model, precision, roles), "best", name
                )
            for name, roles in CHOSEN.items():
                rival = comparison.best(model, precision, roles, chosen=True)
                line |= _beside(comparison, model, ours, rival, "chosen", name)
            lines.append(line)
    return pd.DataFrame(lines)


def _beside(
    comparison: Comparison, model: str, ours: Scored, rival: Scored | None, how: str, name: str
) -> dict[str, str | float | None]:
    """The columns of one rival, ``None`` in each if there is none.

    Args:
        comparison: Gives the gain.
        model: Name of the model.
        ours: QuantTune with min-max.
        rival: The rival.
        how: ``best``, after the fact, or ``chosen``, on validation items.
        name: The kind of rival.
    """
    gain = None if rival is None else comparison.gain({model: (ours, rival)})
    over = f"gain_over_{name}" if how == "best" else f"gain_over_{how}_{name}"
    return {
        f"{how}_{name}": None if rival is None else rival.named,
        f"{how}_{name}_drop": None if rival is None else rival.drop,
        over: None if gain is None else gain.value,
        f"{over}_low": None if gain is None else gain.low,
        f"{over}_high": None if gain is None else gain.high,
    }


def _scored(label: str, records: list[Record], rows: SuiteRows) -> Scored:
    results = [record.result for record in records if record.result is not None]
    owns = [result.fp32_own for result in results if result.fp32_own is not None]
    return Scored(
        label,
        rows.scores_of(records),
        float(np.mean([result.value for result in results])),
        results[0].fp32,
        float(np.mean(owns)) if owns else None,
        mean_of([rounded(result) for result in results]),
        tuple(str(record.details[CHOICE]) for record in records if CHOICE in record.details),
    )


def _tidy(value: float) -> str:
    return f"{round(value, 1) + 0.0:.1f}"  # + 0.0 turns a negative zero into zero
