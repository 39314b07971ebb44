"""The contract of a task: items with committed ids, batches for a model, a loss and a per-item score.

A new task is one file in this package that registers an instance with :data:`TASKS`. Nothing heavy is
imported when it is registered, so listing tasks stays quick.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from benchmark.subject.data.manifest import data_fingerprint, split_ids
from benchmark.subject.metrics.metric import CLASS, METRICS, QUANTITIES, VALUE, offered
from quanttune.digests import json_digest
from quanttune.errors import ConfigError, UnknownNameError
from quanttune.registry import Registry
from quanttune.seeds import derive_seed

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from baselines.method import Batch
    from benchmark.subject.obstacles import Obstacle
    from benchmark.subject.tasks.preprocessing import Preprocessing

SPLITS = ("train", "validation", "test")


class Task(ABC):
    """A data set, how models are trained and measured on it.

    Attributes:
        name: The registered name.
        title: What it is, for a person.
        dataset: Name of the bundled data set in ``benchmark/subject/data/manifest.json``.
        metric: Name of the leading metric: what is reported, gated and compared with an interval.
        higher_is_better: Whether a larger metric is better.
        answer: What a model's answers are, which decides the further metrics: one of those in
            :mod:`benchmark.subject.metrics.metric`; empty for a task that has the leading one only.
        reads: Names of what it calls of a model's preprocessing, by which a model of another kind is refused.
        classes: Names of the classes in the order of their numbers, where they are known.
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
    answer: str = ""
    reads: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    n_classes: int | None = None
    batch_size: int = 50
    version: int = 1
    benchmark: str | None = None

    def fingerprint(self) -> str:
        """A digest of what decides the items, their order and the metric; read from the manifest only."""
        # The leading metric stays part of it although references do not depend on it: the digest is part of
        # the identity of every reference and cell that has been measured. Further metrics are not.
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
        name = self._draw_name()
        return _drawn(ids, n, lambda item: derive_seed(seed, "calibration", name, item))

    def noise_ids(self, split: str, limit: int | None, n: int) -> list[int]:
        """Draw ``n`` of the items of a split that are measured, for the noise of rounding.

        As :meth:`calibration_ids` draws; there is one draw, whatever the model and the method.
        """
        name = self._draw_name()
        ids = self.split_ids(split, limit)
        return _drawn(ids, n, lambda item: derive_seed(0, "rounding noise", name, split, item))

    def _draw_name(self) -> str:
        """What names the task in the draws of calibration items and of those for the noise of rounding."""
        return self.name

    def _calibration_pool(self) -> list[int]:
        """The training items that calibration draws from, in the committed order: all of them by default."""
        return self.split_ids("train")

    def batches(
        self,
        split: str,
        entry: Preprocessing,
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

    def _batches(self, entry: Preprocessing, ids: Sequence[int], batch_size: int) -> Iterator[Batch]:
        for start in range(0, len(ids), batch_size):
            yield self.collate(entry, ids[start : start + batch_size])

    def training_data(self, entry: Preprocessing, ids: Sequence[int] | None = None) -> TrainingSplit:
        """The training split, or the given items of it, as endless shuffled batches for a model."""
        return TrainingSplit(self, entry, self.split_ids("train") if ids is None else list(ids))

    def training_order(
        self, entry: Preprocessing, ids: Sequence[int], batch_size: int, generator: torch.Generator
    ) -> Iterator[list[int]]:
        """One epoch of training batches, as lists of ids: shuffled, without the incomplete last batch."""
        import torch

        order = torch.randperm(len(ids), generator=generator).tolist()
        whole = max(1, len(ids) // batch_size) * batch_size
        for start in range(0, min(whole, len(ids)), batch_size):
            yield [ids[index] for index in order[start : start + batch_size]]

    @abstractmethod
    def collate(self, entry: Preprocessing, ids: Sequence[int]) -> Batch:
        """One batch of these items, prepared for a model."""

    @abstractmethod
    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of a batch, a scalar."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of all metrics of the task, the leading one first."""
        return offered(self.metric, self.answer, self.n_classes)

    @property
    def quantities(self) -> tuple[str, ...]:
        """Names of what the further metrics need of each item and the scores do not hold."""
        further = (METRICS.get(name).needs for name in self.metrics[1:])
        return tuple(sorted({need for needs in further for need in needs} - set(self._scored())))

    def judged(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The logits and targets that are judged: those of the batch, unless a task judges a part of them."""
        return logits, targets

    def item_scores(self, logits: Tensor, targets: Tensor) -> Tensor:
        """What the leading metric is made from, float64 ``(N,)``, or ``(N, k)`` if it needs ``k`` numbers."""
        import torch

        answer = self.judged(logits, targets)
        scores = [QUANTITIES.get(need)(*answer).double() for need in METRICS.get(self.metric).needs]
        return scores[0] if len(scores) == 1 else torch.stack(scores, dim=1)

    def metric_value(self, scores: np.ndarray) -> float:
        """The leading metric of a set of item scores."""
        return METRICS.get(self.metric).value(self.named(scores))

    def named(self, scores: np.ndarray) -> dict[str, np.ndarray]:
        """The item scores by the names of the quantities they are."""
        needs = self._scored()
        return {need: scores if len(needs) == 1 else scores[:, at] for at, need in enumerate(needs)}

    def _scored(self) -> tuple[str, ...]:
        # a task may bring scores and metric of its own, which nobody registered
        return METRICS.get(self.metric).needs if self.metric in METRICS else ()


def _drawn(ids: Sequence[int], n: int, key: Callable[[int], int]) -> list[int]:
    """The ``n`` ids with the smallest keys, in the order of the ids."""
    chosen = set(sorted(ids, key=key)[:n])
    return [item for item in ids if item in chosen]


class TrainingSplit:
    """Training items as a method that trains sees them; implements ``baselines.method.TrainingData``."""

    def __init__(self, task: Task, entry: Preprocessing, ids: Sequence[int]) -> None:
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
    answer = CLASS

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of logits ``(N, n_classes)`` and class ids ``(N,)``."""
        from torch.nn.functional import cross_entropy

        return cross_entropy(logits, targets)


class RegressionTask(Task):
    """A value for every item, predicted by the one output of a model; Pearson correlation times 100."""

    metric = "Pearson correlation"
    answer = VALUE
    n_classes = 1

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean squared error of outputs ``(N, 1)`` and values ``(N,)``."""
        from torch.nn.functional import mse_loss

        return mse_loss(logits.squeeze(-1), targets.to(logits.dtype))


TASKS: Registry[Task] = Registry("task", packages=("benchmark.subject.tasks",))
"""Every task, by name."""


TASK_FORMS: Registry[Callable[[str], Task]] = Registry("form of task", packages=("benchmark.subject.tasks",))
"""What makes a task from a name such as ``data:PATH``, by what stands before the colon."""


def get_task(name: str) -> Task:
    """The task called ``name``; ``data:PATH`` makes one from a file or a folder of pictures.

    Raises:
        UnknownNameError: If there is none; the message suggests close names.
        AssetError: If the data of such a name cannot be used.
    """
    form, mark, _ = name.partition(":")
    return TASK_FORMS.get(form)(name) if mark and form in TASK_FORMS else TASKS.get(name)
