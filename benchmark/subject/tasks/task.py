"""The contract of a task: items with committed ids, batches for a model, a loss and a per-item score.

A new task is one file in this package that registers an instance with :data:`TASKS`. Nothing heavy is
imported when it is registered, so listing tasks stays quick.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from benchmark.subject.data.manifest import data_fingerprint, split_ids
from quanttune.digests import json_digest
from quanttune.errors import ConfigError, UnknownNameError
from quanttune.registry import Registry
from quanttune.seeds import derive_seed

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from baselines.method import Batch
    from benchmark.subject.models.entry import ModelEntry
    from benchmark.subject.obstacles import Obstacle

SPLITS = ("train", "validation", "test")


class Task(ABC):
    """A data set, how models are trained and measured on it.

    Attributes:
        name: The registered name.
        title: What it is, for a person.
        dataset: Name of the bundled data set in ``benchmark/subject/data/manifest.json``.
        metric: What is reported, e.g. ``"accuracy"`` in percent.
        higher_is_better: Whether a larger metric is better.
        n_classes: Number of classes, or None where the task has none.
        batch_size: Items per evaluation batch; fixed, because the split into batches may change the last bits
            of a sum. Calibration batches are no larger.
        version: Raised when the task's code changes what it measures; part of every cell's identity.
        benchmark: Name of the public benchmark that this is, so that published values may stand beside ours
            (``ImageNet-1k``, ``LAMBADA``); None if it is none.
    """

    name: str
    title: str
    dataset: str
    metric: str
    higher_is_better: bool = True
    n_classes: int | None = None
    batch_size: int = 50
    version: int = 1
    benchmark: str | None = None

    def fingerprint(self) -> str:
        """A digest of what decides the items, their order and the metric; read from the manifest only."""
        facts = {
            "task": self.name,
            "metric": self.metric,
            "version": self.version,
            "data": self._data_fingerprint(),
        }
        return json_digest(facts | self.protocol())

    def protocol(self) -> dict[str, Any]:
        """What decides the items or the metric beside the data and the task's code, as plain JSON values."""
        return {}

    def obstacle(self) -> Obstacle | None:
        """Why the data cannot be read on this machine, None if nothing known stands in the way; quick."""
        return None

    def fetch(self, say: Callable[[str], None]) -> list[tuple[str, str]]:
        """Bring the data to this machine; nothing to do for what comes with the package.

        Args:
            say: Called with one line for each thing that happens.

        Returns:
            Each part and where it is.

        Raises:
            AssetError: If it cannot be had; the message says what to do.
        """
        return []

    def content_fingerprints(self) -> dict[str, str]:
        """Digests of the data's content by split, where :meth:`fingerprint` cannot know it; may read it."""
        return {}

    def _data_fingerprint(self) -> str:
        """A digest of the data and its splits."""
        return data_fingerprint(self.dataset)

    def _splits(self) -> Mapping[str, Sequence[int]]:
        """The ids of every split."""
        return split_ids(self.dataset)

    def split_ids(self, split: str, limit: int | None = None) -> list[int]:
        """The committed ids of a split, in their committed order.

        Args:
            split: ``train``, ``validation`` or ``test``.
            limit: Only so many, evenly spaced over the split: the order may follow a property such as length,
                so the first ones would be a biased sample.

        Raises:
            UnknownNameError: If there is no such split.
            ConfigError: If ``limit`` is not positive.
        """
        splits = self._splits()
        if split not in splits:
            raise UnknownNameError("split", split, splits)
        ids = splits[split]
        if limit is None or limit >= len(ids):
            return list(ids)
        if limit <= 0:
            raise ConfigError(f"limit is {limit}; it must be at least 1")
        return [ids[index * len(ids) // limit] for index in range(limit)]

    def calibration_ids(self, n: int, seed: int) -> list[int]:
        """Draw ``n`` training items; the draw of a smaller ``n`` with the same seed is contained in it.

        The draw sorts by a hash of seed and id, so it is the same whatever the version of any library. The
        ids come in the committed order of the split.

        Raises:
            ConfigError: If ``n`` is not between 1 and the number of items that may be drawn.
        """
        ids = self._calibration_pool()
        if not 1 <= n <= len(ids):
            raise ConfigError(f"{n} calibration items asked of task {self.name}; it has 1 to {len(ids)}")
        chosen = set(sorted(ids, key=lambda item: derive_seed(seed, "calibration", self.name, item))[:n])
        return [item for item in ids if item in chosen]

    def _calibration_pool(self) -> list[int]:
        """The training items that calibration draws from, in the committed order: all of them by default."""
        return self.split_ids("train")

    def batches(
        self,
        split: str,
        entry: ModelEntry,
        *,
        ids: Sequence[int] | None = None,
        limit: int | None = None,
        batch_size: int,
    ) -> Iterator[Batch]:
        """Batches of a split, prepared for a model, in the order of the ids.

        Args:
            split: ``train``, ``validation`` or ``test``.
            entry: Whose preprocessing is used.
            ids: Exactly these items of the split, in this order; the whole split without it.
            limit: Without ``ids``: only so many, as :meth:`split_ids` chooses them.
            batch_size: Items a batch; the last one may be smaller.

        Raises:
            ConfigError: If an id is not in the split, or ``batch_size`` is not positive.
        """
        if batch_size <= 0:
            raise ConfigError(f"batch size is {batch_size}; it must be at least 1")
        wanted = self.split_ids(split, limit) if ids is None else list(ids)
        strangers = set(wanted) - set(self.split_ids(split))
        if strangers:
            raise ConfigError(f"items {sorted(strangers)[:5]} are not in split {split!r} of task {self.name}")
        return self._batches(entry, wanted, batch_size)

    def _batches(self, entry: ModelEntry, ids: Sequence[int], batch_size: int) -> Iterator[Batch]:
        for start in range(0, len(ids), batch_size):
            yield self.collate(entry, ids[start : start + batch_size])

    def training_data(self, entry: ModelEntry, ids: Sequence[int] | None = None) -> TrainingSplit:
        """The training split, or the given items of it, as endless shuffled batches for a model."""
        return TrainingSplit(self, entry, self.split_ids("train") if ids is None else list(ids))

    def training_order(
        self, entry: ModelEntry, ids: Sequence[int], batch_size: int, generator: torch.Generator
    ) -> Iterator[list[int]]:
        """One epoch of training batches, as lists of ids: shuffled, without the incomplete last batch."""
        import torch

        order = torch.randperm(len(ids), generator=generator).tolist()
        whole = max(1, len(ids) // batch_size) * batch_size
        for start in range(0, min(whole, len(ids)), batch_size):
            yield [ids[index] for index in order[start : start + batch_size]]

    @abstractmethod
    def collate(self, entry: ModelEntry, ids: Sequence[int]) -> Batch:
        """One batch of these items, prepared for a model."""

    @abstractmethod
    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of a batch, a scalar."""

    @abstractmethod
    def item_scores(self, logits: Tensor, targets: Tensor) -> Tensor:
        """A score of every item, float64 of shape ``(N,)``, from which the metric is made."""

    @abstractmethod
    def metric_value(self, scores: np.ndarray) -> float:
        """The metric of a set of item scores."""


class TrainingSplit:
    """Training items as a method that trains sees them; implements ``baselines.method.TrainingData``."""

    def __init__(self, task: Task, entry: ModelEntry, ids: Sequence[int]) -> None:
        if not ids:
            raise ConfigError(f"no training items chosen for task {task.name}")
        self._task, self._entry, self._ids = task, entry, list(ids)

    @property
    def size(self) -> int:
        """Number of training items."""
        return len(self._ids)

    def batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        """Endless batches, reshuffled each epoch with ``generator``."""
        while True:
            for ids in self._task.training_order(self._entry, self._ids, batch_size, generator):
                yield self._task.collate(self._entry, ids)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The task's mean loss, a scalar."""
        return self._task.loss(logits, targets)


class ClassificationTask(Task):
    """One class out of ``n_classes`` for every item; accuracy in percent."""

    metric = "accuracy"

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of logits ``(N, n_classes)`` and class ids ``(N,)``."""
        from torch.nn.functional import cross_entropy

        return cross_entropy(logits, targets)

    def item_scores(self, logits: Tensor, targets: Tensor) -> Tensor:
        """1.0 where the largest logit is the target's, else 0.0; logits that are not finite never score."""
        import torch

        right = (logits.argmax(dim=-1) == targets) & torch.isfinite(logits).all(dim=-1)
        return right.double()

    def metric_value(self, scores: np.ndarray) -> float:
        """Percentage of items that are right."""
        return 100.0 * float(scores.mean())


TASKS: Registry[Task] = Registry("task", packages=("benchmark.subject.tasks",))
"""Every task, by name."""


def get_task(name: str) -> Task:
    """The task called ``name``.

    Raises:
        UnknownNameError: If there is none; the message suggests close names.
    """
    return TASKS.get(name)
