"""Four tasks of GLUE: classes of sentences and of pairs of sentences, and how alike two sentences are.

The labels of GLUE's own test splits are hidden; its validation splits are the test splits here. MRPC is
measured by accuracy and not by F1: it is what the other tasks report, and a mean over items, so that a drop
in points means the same everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmark.subject.data.external import get_external
from benchmark.subject.tasks.external import ExternalTask
from benchmark.subject.tasks.task import TASKS, ClassificationTask, RegressionTask
from benchmark.subject.tasks.text_classification import TextItems
from quanttune.errors import AssetError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from benchmark.subject.data.external import External
    from benchmark.subject.tasks.preprocessing import Preprocessing, Text


@dataclass(frozen=True, kw_only=True)
class GlueItems(ExternalTask, TextItems):
    """Sentences, or pairs of them, and a label.

    Args:
        name: Registered name, and of the declaration.
        title: For a person.
        benchmark: Its public name.
    """

    name: str
    title: str
    benchmark: str | None = None

    @property
    def dataset(self) -> str:  # type: ignore[override]
        """The declaration has the task's name."""
        return self.name

    def _forget_unless(self, key: tuple[External, Path | None]) -> None:
        if self._open.key != key:
            self._tokens.clear()
        super()._forget_unless(key)

    def tokens(self, entry: Preprocessing, ids: Sequence[int]) -> list[list[int]]:
        """Token ids of these items; each is encoded once for a model."""
        data = self.data()
        self._forget_unless((data, data.folder()))
        return super().tokens(entry, ids)

    def texts(self, ids: Sequence[int]) -> Sequence[Text]:
        """The sentences, or pairs of them in the order of the columns."""
        columns = get_external(self.dataset).columns[:-1]
        values = self.values(ids, columns)
        if len(columns) == 1:
            return values[columns[0]]
        return list(zip(values[columns[0]], values[columns[1]], strict=True))


@dataclass(frozen=True, kw_only=True)
class GlueClasses(GlueItems, ClassificationTask):
    """A class for every item; accuracy in percent."""

    n_classes: int = 2

    def targets(self, ids: Sequence[int]) -> Tensor:
        """Classes, int64 ``(N,)``.

        Raises:
            AssetError: If a label is no class, as in GLUE's own test splits.
        """
        import torch

        labels = self.values(ids, ("label",))["label"]
        for item, label in zip(ids, labels, strict=True):
            if label not in range(self.n_classes):
                raise AssetError(f"{self.place(item)} has label {label}, not 0 to {self.n_classes - 1}")
        return torch.tensor(labels, dtype=torch.int64)


@dataclass(frozen=True, kw_only=True)
class GlueValues(GlueItems, RegressionTask):
    """A value for every item, predicted by the one output of a model; Pearson correlation times 100."""

    def targets(self, ids: Sequence[int]) -> Tensor:
        """The values, float32 ``(N,)``."""
        import torch

        return torch.tensor(self.values(ids, ("label",))["label"], dtype=torch.float32)


for _name, _kind in (
    ("glue_sst2", GlueClasses),
    ("glue_mrpc", GlueClasses),
    ("glue_qnli", GlueClasses),
    ("glue_stsb", GlueValues),
):
    TASKS.register(_name)(
        _kind(
            name=_name,
            title=f"GLUE {get_external(_name).title}",
            benchmark=f"GLUE {_name.removeprefix('glue_')}",
        )
    )
