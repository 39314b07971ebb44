"""Causal language modelling: perplexity over windows of a text, and accuracy on the last token of a passage.

Targets are token ids of shape ``(N, tokens)``, in their own places and not shifted: ``targets[:, t]`` is what
the logits at ``t - 1`` predict, or -100 where nothing is scored.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from benchmark.subject.data.loader import load_bundled
from benchmark.subject.data.manifest import split_ids
from benchmark.subject.metrics.metric import CLASS, TEXT
from benchmark.subject.tasks.task import SPLITS, TASKS, Task
from quanttune.answers import UNSCORED
from quanttune.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from baselines.method import Batch
    from benchmark.subject.tasks.preprocessing import Preprocessing


class NextToken(Task):
    """A task of a causal language model: the loss is the mean cross-entropy of the scored tokens."""

    n_classes = None

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy in nats of logits ``(N, tokens, vocabulary)``, mean over the scored tokens."""
        from torch.nn.functional import cross_entropy

        return cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten(), ignore_index=UNSCORED)


@dataclass(frozen=True, kw_only=True)
class SlidingWindowPerplexity(NextToken):
    """Perplexity of a text, read in windows of equal length.

    Window ``i`` of a split covers the tokens ``[i * stride, i * stride + length)`` of its text, and only the
    last ``stride`` of them are scored; what comes before is context. With ``stride`` equal to ``length``, the
    windows do not overlap and each scores ``length - 1`` tokens, its first having no context: the protocol of
    the tables of OPT models by GPTQ and others.

    A text is tokenized as a whole, once for each model, without special tokens; no window crosses from one
    split into another. Items are windows, numbered through train, validation and test. How many there are is
    fixed and not counted, so that ids need no tokenizer; a text must give at least so many, and what it has
    beyond is left out. Perplexities are comparable between models with the same tokenizer only.

    Args:
        name: Registered name.
        title: For a person.
        length: Tokens of a window, at least 2.
        stride: Tokens from a window to the next, and scored of each; at most ``length``.
        windows: Number of windows of each split.
        batch_size: Windows per evaluation batch.
    """

    metric = "perplexity"
    higher_is_better = False
    answer = TEXT
    reads = ("tokenize", "text_inputs")

    name: str
    title: str
    length: int
    stride: int
    windows: Mapping[str, int]
    batch_size: int = 16
    _tokens: dict[tuple[str, str], Tensor] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.length < 2 or not 1 <= self.stride <= self.length:
            raise ConfigError(
                f"task {self.name}: windows of {self.length} tokens with stride {self.stride}; "
                "a window has at least 2 tokens and the stride is 1 to its length"
            )
        if set(self.windows) != set(SPLITS) or min(self.windows.values()) < 1:
            raise ConfigError(
                f"task {self.name}: windows {dict(self.windows)}; give at least one for each of {SPLITS}"
            )

    @abstractmethod
    def text(self, split: str) -> str:
        """The whole text of a split."""

    def protocol(self) -> dict[str, Any]:
        """Length, stride and number of the windows."""
        return {"length": self.length, "stride": self.stride, "windows": dict(self._counts())}

    def _counts(self) -> Mapping[str, int]:
        """Number of windows of each split."""
        return self.windows

    @property
    def _numbers(self) -> dict[str, range]:
        counts = self._counts()
        starts = {split: sum(counts[earlier] for earlier in SPLITS[:at]) for at, split in enumerate(SPLITS)}
        return {split: range(starts[split], starts[split] + counts[split]) for split in SPLITS}

    def _splits(self) -> Mapping[str, Sequence[int]]:
        return self._numbers

    def tokens(self, entry: Preprocessing, split: str) -> Tensor:
        """Token ids of a split's text, int64 ``(tokens,)``; tokenized once for a model.

        Raises:
            ConfigError: If they are too few for the task's windows.
        """
        import torch

        key = (entry.name, split)
        if key not in self._tokens:
            ids = torch.tensor(entry.tokenize(self.text(split)), dtype=torch.int64)
            found = (len(ids) - self.length) // self.stride + 1 if len(ids) >= self.length else 0
            wanted = self._counts()[split]
            if found < wanted:
                raise ConfigError(
                    f"task {self.name} has {wanted} windows in split {split!r}, but its text "
                    f"gives {found} with the {len(ids):,} tokens of model {entry.name}; use a model with a "
                    "smaller vocabulary or a task with fewer windows"
                )
            self._tokens[key] = ids
        return self._tokens[key]

    def collate(self, entry: Preprocessing, ids: Sequence[int]) -> Batch:
        """Token ids and mask ``(N, length)``; targets likewise, -100 where a token is not scored."""
        import torch

        from baselines.method import Batch

        windows = torch.stack([self._window(entry, item) for item in ids])
        targets = windows.clone()
        targets[:, : max(1, self.length - self.stride)] = UNSCORED
        return Batch(entry.text_inputs(windows.tolist()), targets)

    def _window(self, entry: Preprocessing, item: int) -> Tensor:
        numbers = self._numbers
        split = next(split for split, those in numbers.items() if item in those)
        start = (item - numbers[split].start) * self.stride
        return self.tokens(entry, split)[start : start + self.length]


class LastToken(NextToken):
    """Accuracy in percent of the greedy prediction of a passage's last token.

    This is how the values of ``published/opt_lambada_quanto.csv`` were measured. It is not the task of the
    LAMBADA paper, the last word: of a word of several tokens the last is predicted, the others being given.
    """

    metric = "accuracy"
    answer = CLASS
    reads = ("encode", "tokenize", "text_inputs")

    @abstractmethod
    def texts(self, ids: Sequence[int]) -> list[str]:
        """The passages of these ids; the model's own tokenizer adds the special tokens it begins with."""

    def collate(self, entry: Preprocessing, ids: Sequence[int]) -> Batch:
        """Token ids and mask ``(N, longest)``, padded on the right; targets likewise, all but the last -100.

        Raises:
            ConfigError: If a passage has fewer than two tokens.
        """
        import torch

        from baselines.method import Batch

        passages = entry.encode(self.texts(ids))
        for item, tokens in zip(ids, passages, strict=True):
            if len(tokens) < 2:
                raise ConfigError(f"item {item} of task {self.name} has {len(tokens)} tokens; it needs two")
        inputs = entry.text_inputs(passages)
        targets = torch.full_like(inputs["input_ids"], UNSCORED)
        for row, tokens in enumerate(passages):
            targets[row, len(tokens) - 1] = tokens[-1]
        return Batch(inputs, targets)

    def judged(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The logits before each passage's last token, ``(N, vocabulary)``, and that token, ``(N,)``."""
        rows, places = (targets != UNSCORED).nonzero(as_tuple=True)
        return logits[rows, places - 1], targets[rows, places]


@dataclass(frozen=True, kw_only=True)
class BundledText(SlidingWindowPerplexity):
    """A bundled data set with columns ``id`` and ``text``: the rows of a split, in its order, are its text.

    Args:
        dataset: Name in the manifest.
    """

    dataset: str

    def text(self, split: str) -> str:
        """The rows of a split with a blank line between them."""
        data = load_bundled(self.dataset)
        rows = dict(zip(data["id"], data["text"], strict=True))
        return "\n".join(rows[item] for item in split_ids(self.dataset)[split])


for _task in (
    BundledText(
        name="moby_dick",
        title="Moby Dick: the last eighth of the novel, in windows of 256 tokens",
        dataset="moby_dick",
        length=256,
        stride=256,
        windows={"train": 1180, "validation": 115, "test": 180},
    ),
    BundledText(
        name="moby_dick_excerpt",
        title="Moby Dick: 32 windows of 256 tokens, for models that are large for two cores",
        dataset="moby_dick",
        length=256,
        stride=256,
        windows={"train": 900, "validation": 16, "test": 32},
        batch_size=4,
    ),
):
    TASKS.register(_task.name)(_task)
