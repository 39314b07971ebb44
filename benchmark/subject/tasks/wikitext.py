"""WikiText-2: perplexity in windows of 2,048 tokens that do not overlap, as in the tables of GPTQ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmark.subject.data.external import get_external
from benchmark.subject.tasks.external import ExternalTask
from benchmark.subject.tasks.language_modelling import SlidingWindowPerplexity
from benchmark.subject.tasks.task import TASKS

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from benchmark.subject.data.external import External
    from benchmark.subject.tasks.preprocessing import Preprocessing


@dataclass(frozen=True, kw_only=True)
class ExternalText(ExternalTask, SlidingWindowPerplexity):
    """A text of rows, joined with a blank line; the data set's own splits are the splits.

    Args:
        dataset: Name of the declaration.
        benchmark: Its public name.
    """

    dataset: str
    benchmark: str | None = None

    def _counts(self) -> Mapping[str, int]:
        return self.data().windows or self.windows

    def _splits(self) -> Mapping[str, Sequence[int]]:
        return self._numbers

    def _calibration_pool(self) -> list[int]:
        return self.split_ids("train")

    def _forget_unless(self, key: tuple[External, Path | None]) -> None:
        if self._open.key != key:
            self._tokens.clear()
        super()._forget_unless(key)

    def tokens(self, entry: Preprocessing, split: str) -> Tensor:
        """Token ids of a split's text, int64 ``(tokens,)``; tokenized once for a model."""
        data = self.data()
        self._forget_unless((data, data.folder()))
        return super().tokens(entry, split)

    def text(self, split: str) -> str:
        """The rows with two line ends between them, as GPTQ joins them."""
        rows = self.rows(self.data().splits[split])
        return "\n\n".join(rows.take(range(len(rows)), ("text",))["text"])


TASKS.register("wikitext2")(
    ExternalText(
        name="wikitext2",
        title="WikiText-2, raw: windows of 2,048 tokens",
        dataset="wikitext2",
        length=2048,
        stride=2048,
        windows=get_external("wikitext2").windows or {},
        batch_size=4,
        benchmark="WikiText-2",
    )
)
