"""Image classification on bundled grey images; the model entry resizes and normalises them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from benchmark.subject.data.loader import load_bundled
from benchmark.subject.tasks.task import TASKS, ClassificationTask

if TYPE_CHECKING:
    from torch import Tensor

    from baselines.method import Batch
    from benchmark.subject.tasks.preprocessing import Preprocessing


@dataclass(frozen=True, kw_only=True)
class ImageClassification(ClassificationTask):
    """A data set with columns ``id``, ``label`` and ``pixels`` (grey, uint8, square or of the given shape).

    Args:
        name: Registered name.
        title: For a person.
        dataset: Name in the manifest.
        n_classes: Number of labels.
        shape: Height and width of an image in pixels.
    """

    reads = ("image_inputs",)

    name: str
    title: str
    dataset: str
    n_classes: int
    shape: tuple[int, int]

    @cached_property
    def _items(self) -> tuple[dict[int, int], Tensor, Tensor]:
        """Row of every id, images ``(N, 1, height, width)`` uint8, labels ``(N,)`` int64; decoded once."""
        import numpy as np
        import torch

        data = load_bundled(self.dataset)
        raw = np.frombuffer(b"".join(data["pixels"]), dtype=np.uint8)
        images = torch.from_numpy(raw.reshape(-1, 1, *self.shape).copy())
        rows = {item: row for row, item in enumerate(data["id"])}
        return rows, images, torch.tensor(data["label"], dtype=torch.int64)

    def collate(self, entry: Preprocessing, ids: Sequence[int]) -> Batch:
        """Images as the model wants them, ``(N, 3, size, size)`` float32, and labels ``(N,)`` int64."""
        from baselines.method import Batch

        rows, images, labels = self._items
        chosen = [rows[item] for item in ids]
        return Batch(entry.image_inputs(images[chosen]), labels[chosen])


TASKS.register("fashion_mnist")(
    ImageClassification(
        name="fashion_mnist",
        title="Fashion-MNIST: ten kinds of clothing, 28 x 28 grey",
        dataset="fashion_mnist",
        n_classes=10,
        shape=(28, 28),
    )
)
