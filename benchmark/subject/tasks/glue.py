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
from benchmark.subject.tasks.task import TASKS, ClassificationTask
from benchmark.subject.tasks.text_classification import TextItems
from quanttune.errors import AssetError

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from torch import Tensor

    from benchmark.subject.data.external import External
    from benchmark.subject.models.entry import ModelEntry, Text


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

    def tokens(self, entry: ModelEntry, ids: Sequence[int]) -> list[list[int]]:
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
class GlueValues(GlueItems):
    """A value for every item, predicted by the one output of a model; Pearson correlation times 100."""

    metric = "Pearson correlation"
    n_classes: int = 1

    def targets(self, ids: Sequence[int]) -> Tensor:
        """The values, float32 ``(N,)``."""
        import torch

        return torch.tensor(self.values(ids, ("label",))["label"], dtype=torch.float32)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean squared error of outputs ``(N, 1)`` and values ``(N,)``."""
        from torch.nn.functional import mse_loss

        return mse_loss(logits.squeeze(-1), targets.to(logits.dtype))

    def item_scores(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Each item's prediction and value, float64 ``(N, 2)``: a correlation is no mean over items."""
        import torch

        return torch.stack([logits.squeeze(-1).double(), targets.double()], dim=1)

    def metric_value(self, scores: np.ndarray) -> float:
        """100 times the Pearson correlation of rows ``(prediction, value)``.

        0 where there is none: predictions that are all the same say nothing of the values, nor do any that
        are not finite.
        """
        import numpy as np

        if not np.isfinite(scores).all():
            return 0.0
        centred = scores - scores.mean(axis=0)
        norms = np.sqrt((centred**2).sum(axis=0))
        if norms.min() <= np.finfo(np.float64).eps * np.abs(scores).max() * len(scores):
            return 0.0
        return 100.0 * float(centred[:, 0] @ centred[:, 1] / norms.prod())


for _name, _kind in (
    ("glue_sst2", GlueClasses),
    ("glue_mrpc", GlueClasses),
    ("glue_qnli", GlueClasses),
    ("glue_stsb", GlueValues),
):
    TASKS.register(_name)(_kind(name=_name, title=f"GLUE {get_external(_name).title}"))
