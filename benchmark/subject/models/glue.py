"""``bert-base-uncased``, fine-tuned on tasks of GLUE by the suite itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from benchmark.subject.models.bert import REFERENCE_SEED, FineTunedBert
from benchmark.subject.models.checkpoint import read_tokenizer, read_transformers
from benchmark.subject.models.entry import MODELS
from benchmark.subject.models.hub import BERT_FILES, HubEntry, tokenizer_digest
from quanttune.errors import AssetError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn


RECIPE = {"steps": 500, "learning_rate": 2e-5, "batch_size": 32}
"""A starting point that nobody has searched."""

_PRETRAINING_HEAD = "cls."  # of masked words and next sentences, which the task's head takes the place of


@dataclass(frozen=True, kw_only=True)
class GlueBert(HubEntry, FineTunedBert):
    """``bert-base-uncased`` with a new head for a task of GLUE: one sentence or two, classes or a score.

    The second sentence has segment 1, which follows from the first ``[SEP]`` of an input.

    Args:
        repo: Of the pretrained encoder.
        revision: Branch, tag or commit.
    """

    repo: str = "google-bert/bert-base-uncased"
    revision: str = "main"
    source: str = "google-bert/bert-base-uncased"
    files: tuple[str, ...] = BERT_FILES
    keep_pooler: bool = True
    recipe: Mapping[str, Any] = field(default_factory=lambda: dict(RECIPE))
    max_length: int = 128
    version: int = 1

    def needs(self) -> tuple[str, ...]:
        """Nothing of the catalogue."""
        return ()

    def identity(self) -> dict[str, Any]:
        """Where the encoder comes from, the fine-tuning recipe and the data."""
        return {
            "model": self.key,
            "version": self.version,
            **self.origin(),
            "max_length": self.max_length,
            "keep_pooler": self.keep_pooler,
            "training": {**self.training, "seed": REFERENCE_SEED},
            "task": self._task().fingerprint(),
        }

    def pins(self) -> dict[str, Any]:
        """The encoder's weights and the tokenizer."""
        return {**super().pins(), "tokenizer": tokenizer_digest(self._tokenizer)}

    def _reference_key(self) -> dict[str, Any]:
        """This encoder and this tokenizer, too: other weights in their place make another reference."""
        pins = self.pins()
        return {**self.identity(), "pinned": [pins["weights"], pins["tokenizer"]]}

    @cached_property
    def _folder(self) -> Path:
        return self.folder

    @cached_property
    def _tokenizer(self) -> Any:
        tokenizer = read_tokenizer(self._folder)
        if tokenizer.pad_token_id != self.pad_id or tokenizer.sep_token_id is None:
            raise AssetError(
                f"the tokenizer in {self._folder} pads with {tokenizer.pad_token_id}, BERT with "
                f"{self.pad_id}; put the tokenizer of {self.repo} there"
            )
        return tokenizer

    def pretrained(self) -> nn.Module:
        """The model as fine-tuning finds it: pretrained encoder and pooler, new head.

        Raises:
            AssetError: If the checkpoint is not of this architecture.
        """
        from transformers import BertForSequenceClassification

        loaded, absent, unknown = read_transformers(
            BertForSequenceClassification, self._folder, num_labels=self._classes()
        )
        strangers = {name for name in unknown if not name.startswith(_PRETRAINING_HEAD)}
        strangers |= {name for name in absent if not name.startswith("classifier.")}
        if strangers:
            raise AssetError(
                f"{self._folder} holds another model than {self.repo}: {', '.join(sorted(strangers)[:3])}"
            )
        model = self.build()  # its head comes from the entry's own seed
        encoder = {
            name: tensor for name, tensor in loaded.state_dict().items() if not name.startswith("classifier.")
        }
        model.load_state_dict(encoder, strict=False)
        return model

    def text_inputs(self, tokens: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask`` and ``token_type_ids``, int64 of shape ``(N, longest)``."""
        inputs = super().text_inputs(tokens)
        ends = (inputs["input_ids"] == self._tokenizer.sep_token_id).long()
        after_first = ends.cumsum(dim=1) - ends >= 1
        return {**inputs, "token_type_ids": after_first.long() * inputs["attention_mask"]}


# Expected values: medians over five runs of bert-base-uncased on the development sets, as the examples of
# transformers (version 2) gave them: SST-2 91.74, MRPC 86.27 (accuracy), QNLI 89.31, STS-B 91.39 (Pearson).
# The tolerances cover what model cards on the Hub report: SST-2 92.3 to 93.6, MRPC 82.6 to 86.0.
for _task, _title, _epochs_of_32, _expected, _tolerance in (
    ("glue_sst2", "SST-2", 6315, 91.74, 2.0),
    ("glue_mrpc", "MRPC", 345, 86.27, 4.0),
    ("glue_qnli", "QNLI", 9822, 89.31, 2.5),
    ("glue_stsb", "STS-B", 540, 91.39, 3.5),
):
    MODELS.register(f"bert_base_{_task.removeprefix('glue_')}")(
        GlueBert(
            name=f"bert_base_{_task.removeprefix('glue_')}",
            title=f"BERT-base, fine-tuned on {_title}",
            task=_task,
            # Three epochs at 2e-5 in batches of 32: within the ranges of the BERT paper's appendix A.3.
            training={"steps": _epochs_of_32, "learning_rate": 2e-5, "batch_size": 32},
            expected=_expected,
            tolerance=_tolerance,
        )
    )
