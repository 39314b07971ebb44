"""Text classification: the polarity of rated sentences; the model entry brings the tokenizer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from benchmark.subject.data.loader import load_bundled
from benchmark.subject.tasks.task import TASKS, ClassificationTask, Task

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from baselines.method import Batch
    from benchmark.subject.tasks.preprocessing import Preprocessing, Text

_POOL = 50  # batches whose items are sorted by length together: little padding, still well shuffled


@dataclass(frozen=True, kw_only=True)
class TextItems(Task):
    """Items that are a text, or a pair of texts, with one target each; tokenized once for a model."""

    reads = ("encode", "text_inputs")

    _tokens: dict[tuple[str, int], list[int]] = field(default_factory=dict, repr=False, compare=False)

    @abstractmethod
    def texts(self, ids: Sequence[int]) -> Sequence[Text]:
        """The text or the pair of texts of each id."""

    @abstractmethod
    def targets(self, ids: Sequence[int]) -> Tensor:
        """What is to be predicted, ``(N,)``: classes int64, or values float32."""

    def tokens(self, entry: Preprocessing, ids: Sequence[int]) -> list[list[int]]:
        """Token ids of these items; each is encoded once for a model."""
        missing = [item for item in ids if (entry.name, item) not in self._tokens]
        if missing:
            encoded = entry.encode(self.texts(missing))
            self._tokens.update(
                {(entry.name, item): tokens for item, tokens in zip(missing, encoded, strict=True)}
            )
        return [self._tokens[entry.name, item] for item in ids]

    def collate(self, entry: Preprocessing, ids: Sequence[int]) -> Batch:
        """Token ids and mask ``(N, longest)``, padded to the batch's longest, and targets ``(N,)``."""
        from baselines.method import Batch

        return Batch(entry.text_inputs(self.tokens(entry, ids)), self.targets(ids))

    def _batches(self, entry: Preprocessing, ids: Sequence[int], batch_size: int) -> Iterator[Batch]:
        self.tokens(entry, ids)  # one call of the tokenizer for the whole split
        return super()._batches(entry, ids, batch_size)

    def training_order(
        self, entry: Preprocessing, ids: Sequence[int], batch_size: int, generator: torch.Generator
    ) -> Iterator[list[int]]:
        """One epoch: shuffled, then items of similar length put into the same batch to save padding."""
        import torch

        lengths = dict(zip(ids, map(len, self.tokens(entry, ids)), strict=True))
        shuffled = [ids[index] for index in torch.randperm(len(ids), generator=generator).tolist()]
        for start in range(0, len(ids), _POOL * batch_size):
            pool = sorted(shuffled[start : start + _POOL * batch_size], key=lengths.__getitem__)
            batches = [pool[first : first + batch_size] for first in range(0, len(pool), batch_size)]
            whole = [batch for batch in batches if len(batch) == batch_size] or batches
            for index in torch.randperm(len(whole), generator=generator).tolist():
                yield whole[index]


@dataclass(frozen=True, kw_only=True)
class Polarity(TextItems, ClassificationTask):
    """A data set with columns ``id``, ``text`` and ``rating``; class 1 where the rating is above zero.

    Sentences rated exactly zero have no polarity; the committed splits leave them out.

    Args:
        name: Registered name.
        title: For a person.
        dataset: Name in the manifest.
    """

    name: str
    title: str
    dataset: str
    n_classes: int = 2

    @cached_property
    def _items(self) -> tuple[dict[int, str], dict[int, int]]:
        """Text and class of every id."""
        data = load_bundled(self.dataset)
        texts = dict(zip(data["id"], data["text"], strict=True))
        labels = {item: int(rating > 0) for item, rating in zip(data["id"], data["rating"], strict=True)}
        return texts, labels

    def texts(self, ids: Sequence[int]) -> Sequence[Text]:
        """The sentences."""
        texts, _ = self._items
        return [texts[item] for item in ids]

    def targets(self, ids: Sequence[int]) -> Tensor:
        """1 where the rating is above zero, else 0; int64 ``(N,)``."""
        import torch

        _, labels = self._items
        return torch.tensor([labels[item] for item in ids], dtype=torch.int64)


TASKS.register("movie_reviews")(
    Polarity(
        name="movie_reviews",
        title="Movie reviews: is a sentence positive or negative",
        dataset="movie_reviews",
    )
)
