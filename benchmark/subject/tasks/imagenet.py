"""ImageNet-1k: pictures of any size, prepared as each model was evaluated when it was released."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from benchmark.subject.data.rows import decode
from benchmark.subject.tasks.external import ExternalTask
from benchmark.subject.tasks.task import TASKS, ClassificationTask
from quanttune.errors import AssetError

if TYPE_CHECKING:
    from baselines.method import Batch
    from benchmark.subject.tasks.preprocessing import Preprocessing


@dataclass(frozen=True, kw_only=True)
class Pictures(ExternalTask, ClassificationTask):
    """A data set with columns ``image`` and ``label``; a batch is read and decoded when it is asked for.

    Args:
        name: Registered name.
        title: For a person.
        dataset: Name of the declaration.
        n_classes: Number of labels.
        benchmark: Its public name.
    """

    reads = ("image_batch",)

    name: str
    title: str
    dataset: str
    n_classes: int
    benchmark: str | None = None

    def collate(self, entry: Preprocessing, ids: Sequence[int]) -> Batch:
        """What the model makes of the pictures in RGB, and labels ``(N,)`` int64.

        Raises:
            AssetError: If a picture is damaged or a label is no class.
        """
        import torch

        from baselines.method import Batch

        values = self.values(ids, ("image", "label"))
        for item, label in zip(ids, values["label"], strict=True):
            if not 0 <= label < self.n_classes:
                raise AssetError(f"{self.place(item)} has label {label}, not 0 to {self.n_classes - 1}")
        images = [
            decode(data, partial(self.place, item)) for item, data in zip(ids, values["image"], strict=True)
        ]
        return Batch(entry.image_batch(images), torch.tensor(values["label"], dtype=torch.int64))


TASKS.register("imagenet")(
    Pictures(
        name="imagenet",
        title="ImageNet-1k: a thousand kinds of things; its validation pictures are the test split",
        dataset="imagenet",
        n_classes=1000,
        benchmark="ImageNet-1k",
    )
)
