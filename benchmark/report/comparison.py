"""QuantTune beside its rivals: gains in points with paired intervals, from per-item scores."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from benchmark.engine.measure import CONFIDENCE, RESAMPLES
from benchmark.keep.record import Record
from benchmark.keep.store import Store
from benchmark.report.rows import SuiteRows
from benchmark.subject.metrics.display import POINTS
from benchmark.subject.tasks.task import get_task
from quanttune.errors import StoreError
from quanttune.seeds import numpy_generator

if TYPE_CHECKING:
    import pandas as pd

OURS = "quanttune"
CONTROL = "finetune"
CALIBRATORS = ("minmax", "percentile", "mse", "omse")
STATE_OF_THE_ART = ("fq_vit", "ptq4vit")


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
    """

    label: str
    scores: np.ndarray
    value: float
    fp32: float
    fp32_own: float | None

    @property
    def drop(self) -> float:
        """Drop against the reference."""
        return self.fp32 - self.value


class Comparison:
    """A suite's finished cells of its first profile, granularity and symmetry, by model, precision and label.

    Only models measured in accuracy take part.

    Args:
        rows: The suite's cells.
        store: Holds the per-item scores.
    """

    def __init__(self, rows: SuiteRows, store: Store) -> None:
        suite = rows.suite
        self.precisions = list(dict.fromkeys(suite.precisions))
        self.tasks: dict[str, str] = {}
        self._methods: dict[str, str] = {}
        groups: dict[tuple[str, str, str], list[Record]] = {}
        for cell in rows.cells:
            record = rows.records.get(cell.cell_id)
            setting = (cell.profile, cell.weight_granularity, cell.symmetric)
            first = (suite.profiles[0], suite.weight_granularity[0], suite.symmetric[0])
            if (
                record is None or record.result is None or record.result.metric != POINTS
            ):  # points alone may be averaged over models
                continue
            if not cell.is_reference and setting == first:
                groups.setdefault((cell.model, cell.precision, cell.label), []).append(record)
                self.tasks[cell.model] = cell.task
                self._methods[cell.label] = cell.method
        self._scored = {key: _scored(key[2], records, store) for key, records in groups.items()}

    @property
    def models(self) -> list[str]:
        """Models of which a quantized cell is done, in the suite's order."""
        return list(self.tasks)

    def get(self, model: str, precision: str, label: str) -> Scored | None:
        """A method's scores; ``None`` if they were not measured."""
        return self._scored.get((model, precision, label))

    def best(self, model: str, precision: str, methods: Iterable[str]) -> Scored | None:
        """The best of these methods, with whatever parameters and calibrator; ``None`` if there is none."""
        wanted = set(methods)
        found = [
            scored
            for (other, width, label), scored in self._scored.items()
            if (other, width) == (model, precision) and self._methods[label] in wanted
        ]
        return max(found, key=lambda scored: scored.value, default=None)

    def gain(self, pairs: dict[str, tuple[Scored, Scored]]) -> Estimate:
        """How much better the first of each pair is than the second, in points, averaged over models.

        The interval comes from the paired bootstrap: items are drawn with replacement, for each model
        apart and the same for both of a pair. The choice of a best rival is not redrawn.

        Args:
            pairs: By model; at least one.
        """
        values, draws = [], []
        for model, (ours, rival) in pairs.items():
            metric = get_task(self.tasks[model]).metric_value
            count = len(ours.scores)
            generator = numpy_generator(0, "claims", model, count)
            drawn = generator.integers(0, count, (RESAMPLES, count))
            values.append(metric(ours.scores) - metric(rival.scores))
            draws.append([metric(ours.scores[row]) - metric(rival.scores[row]) for row in drawn])
        tail = 100 * (1 - CONFIDENCE) / 2
        low, high = np.percentile(np.mean(draws, axis=0), [tail, 100 - tail])
        return Estimate(float(np.mean(values)), float(low), float(high))

    def pairs(self, precision: str, rivals: Iterable[str]) -> dict[str, tuple[Scored, Scored]]:
        """QuantTune with min-max and the best of the rivals, for each model that has both."""
        rivals = tuple(rivals)
        found = {}
        for model in self.models:
            mine, rival = self.get(model, precision, OURS), self.best(model, precision, rivals)
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
            control = comparison.best(model, precision, [CONTROL])
            known = [ours.fp32, *([control.fp32_own] if control and control.fp32_own is not None else [])]
            line: dict[str, str | float | None] = {
                "model": model,
                "precision": precision,
                "fp32": ours.fp32,
                "quanttune": ours.value,
                "quanttune_drop": ours.drop,
                "quanttune_drop_against_better_fp32": max(known) - ours.value,
            }
            for name, methods in (
                ("calibrator", CALIBRATORS),
                ("finetune", (CONTROL,)),
                ("state_of_the_art", STATE_OF_THE_ART),
            ):
                rival = comparison.best(model, precision, methods)
                gain = None if rival is None else comparison.gain({model: (ours, rival)})
                line |= {
                    f"best_{name}": None if rival is None else rival.label,
                    f"best_{name}_drop": None if rival is None else rival.drop,
                    f"gain_over_{name}": None if gain is None else gain.value,
                    f"gain_over_{name}_low": None if gain is None else gain.low,
                    f"gain_over_{name}_high": None if gain is None else gain.high,
                }
            lines.append(line)
    return pd.DataFrame(lines)


def _scored(label: str, records: list[Record], store: Store) -> Scored:
    results = [record.result for record in records if record.result is not None]
    items = [store.items(record.cell.cell_id) for record in records]
    if any(not np.array_equal(other["ids"], items[0]["ids"]) for other in items):
        raise StoreError(f"cells of {label} were measured on different items; run them again")
    owns = [result.fp32_own for result in results if result.fp32_own is not None]
    return Scored(
        label,
        np.mean([other["scores"] for other in items], axis=0),
        float(np.mean([result.value for result in results])),
        results[0].fp32,
        float(np.mean(owns)) if owns else None,
    )


def _tidy(value: float) -> str:
    return f"{round(value, 1) + 0.0:.1f}"  # + 0.0 turns a negative zero into zero
