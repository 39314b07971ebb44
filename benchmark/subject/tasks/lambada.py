"""LAMBADA: the last token of a passage, which needs the whole passage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmark.subject.tasks.external import ExternalTask
from benchmark.subject.tasks.language_modelling import LastToken
from benchmark.subject.tasks.task import TASKS


@dataclass(frozen=True, kw_only=True)
class Passages(ExternalTask, LastToken):
    """A data set of passages in the column ``text``.

    Calibration and training use LAMBADA's development passages: its training split is whole novels, and text
    of another kind, such as WikiText-2, would calibrate for other activations than are measured.

    Args:
        name: Registered name.
        title: For a person.
        dataset: Name of the declaration.
        benchmark: Its public name.
    """

    name: str
    title: str
    dataset: str
    benchmark: str | None = None
    batch_size: int = 16

    def texts(self, ids: Sequence[int]) -> list[str]:
        """The passages."""
        return self.values(ids, ("text",))["text"]


TASKS.register("lambada")(
    Passages(
        name="lambada",
        title="LAMBADA: the last token of a passage",
        dataset="lambada",
        benchmark="LAMBADA",
    )
)
