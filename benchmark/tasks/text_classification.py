"""Text classification: the polarity of rated sentences; the model entry brings the tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from benchmark.data.loader import load_bundled
from benchmark.tasks.task import TASKS, ClassificationTask

if TYPE_CHECKING:
    import torch

    from baselines.method import Batch
    from benchmark.models.entry import ModelEntry

_POOL = 50  # batches whose items are sorted by length together: little padding, still well shuffled


@dataclass(frozen=True, kw_only=True)
class Polarity(ClassificationTask):
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
    _tokens: dict[tuple[str, int], list[int]] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def _items(self) -> tuple[dict[int, str], dict[int, int]]:
        """Text and class of every id."""
        data = load_bundled(self.dataset)
        texts = dict(zip(data["id"], data["text"], strict=True))
        labels = {item: int(rating > 0) for item, rating in zip(data["id"], data["rating"], strict=True)}
        return texts, labels

    def tokens(self, entry: ModelEntry, ids: Sequence[int]) -> list[list[int]]:
        """Token ids of these items; each is encoded once for a model."""
        missing = [item for item in ids if (entry.name, item) not in self._tokens]
        if missing:
            texts, _ = self._items
            encoded = entry.encode([texts[item] for item in missing])
            self._tokens.update(
                {(entry.name, item): tokens for item, tokens in zip(missing, encoded, strict=True)}
            )
        return [self._tokens[entry.name, item] for item in ids]

    def collate(self, entry: ModelEntry, ids: Sequence[int]) -> Batch:
        """Token ids and mask ``(N, longest)``, padded to the batch's longest, and classes ``(N,)``."""
        import torch

        from baselines.method import Batch

        _, labels = self._items
        targets = torch.tensor([labels[item] for item in ids], dtype=torch.int64)
        return Batch(entry.text_inputs(self.tokens(entry, ids)), targets)

    def _batches(self, entry: ModelEntry, ids: Sequence[int], batch_size: int) -> Iterator[Batch]:
        self.tokens(entry, ids)  # one call of the tokenizer for the whole split
        return super()._batches(entry, ids, batch_size)

    def training_order(
        self, entry: ModelEntry, ids: Sequence[int], batch_size: int, generator: torch.Generator
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


TASKS.register("movie_reviews")(
    Polarity(
        name="movie_reviews",
        title="Movie reviews: is a sentence positive or negative",
        dataset="movie_reviews",
    )
)
