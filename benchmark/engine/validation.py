"""Scores on validation items, for methods that choose; implements ``baselines.validation.Validation``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmark.engine.measure import evaluate
from benchmark.grid.cells import ENGINE_VERSION
from quanttune.digests import json_digest
from quanttune.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import nn

    from benchmark.subject.models.entry import ModelEntry
    from benchmark.subject.tasks.task import Task
    from quanttune.quantization import Quantizer

SPLIT = "validation"


@dataclass(frozen=True)
class TaskValidation:
    """The leading metric of a task on its validation split.

    Attributes:
        task: Gives items and scores.
        entry: Gives the preprocessing.
        device: Where to compute.
        progress: Report of long work.
        known: Ids of all sites of the model, where they are known.
    """

    task: Task
    entry: ModelEntry
    device: torch.device
    progress: Callable[[str, int, int], None]
    known: frozenset[str] | None = None

    @property
    def metric(self) -> str:
        """The task's leading one."""
        return self.task.metric

    def count(self, items: int) -> int:
        """How many items there are, if so many are asked for."""
        return len(self._ids(items))

    def key(self, items: int) -> dict[str, Any]:
        """The items, the metric and the engine."""
        return {
            "engine": ENGINE_VERSION,
            "split": SPLIT,
            "ids": json_digest(self._ids(items)),
            "metric": self.metric,
        }

    def score(self, model: nn.Module, quantizers: Mapping[str, Quantizer], items: int) -> float:
        """The metric, its sign turned where lower is better.

        A batch that does not fit into memory is halved, as in every evaluation.
        """
        from quanttune.quantization import simulate

        with simulate(model, quantizers, known=self.known):
            found = evaluate(
                model,
                self.task,
                self.entry,
                split=SPLIT,
                ids=self._ids(items),
                device=self.device,
                progress=self.progress,
                stage=SPLIT,
            )
        value = float(self.task.metric_value(found.scores))
        return value if self.task.higher_is_better else -value

    def _ids(self, items: int) -> list[int]:
        ids = self.task.split_ids(SPLIT, items)
        if not ids:
            raise ConfigError(
                f"task {self.task.name} has no validation items to choose a method on; name the method"
            )
        return ids
