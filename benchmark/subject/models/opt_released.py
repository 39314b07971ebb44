"""OPT decoders as released, on the Hub or in a folder that stands in for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from benchmark.subject.models.checkpoint import (
    read_config,
    read_tokenizer,
    read_transformers,
    require_complete,
    weight_files,
)
from benchmark.subject.models.configuration import require_room, require_size
from benchmark.subject.models.decoder import OUTPUT
from benchmark.subject.models.entry import MODELS, CausalTextEntry, Progress, own_random_state
from benchmark.subject.models.hub import OPT_FILES, HubEntry, tokenizer_digest
from quanttune.errors import AssetError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

RECIPE = {"steps": 500, "learning_rate": 1e-5, "batch_size": 4}
"""A starting point that nobody has searched."""


@dataclass(frozen=True, kw_only=True)
class ReleasedOpt(HubEntry, CausalTextEntry):
    """``OPTForCausalLM`` with the weights, the sizes and the tokenizer of its repository.

    OPT-350m projects its embeddings from 512 to 1024 and normalises after each sublayer; both follow from its
    configuration.

    Args:
        name: Registered name.
        title: For a person.
        repo: ``owner/name``.
        task: Name of a language-modelling task.
        expected: The metric on the test split.
        tolerance: In the metric's unit.
        begin: What OPT's tokenizer puts before a text: ``</s>``.
        pad_id: ``<pad>``.
    """

    name: str
    title: str
    repo: str
    task: str
    recipe: Mapping[str, Any] = field(default_factory=lambda: dict(RECIPE))
    expected: float | None = None
    tolerance: float = 0.2
    revision: str = "main"
    files: tuple[str, ...] = OPT_FILES
    begin: tuple[int, ...] = (2,)
    pad_id: int = 1
    max_length: int = 2048
    family: str = "opt"
    version: int = 1

    @property
    def source(self) -> str:  # type: ignore[override]
        """The repository."""
        return self.repo

    @property
    def checkpoint(self) -> str:  # type: ignore[override]
        """The repository, by which published values name the weights."""
        return self.repo

    def identity(self) -> dict[str, Any]:
        """Repository, special tokens and the data."""
        return {
            "model": self.key,
            "version": self.version,
            **self.origin(),
            "begin": list(self.begin),
            "max_length": self.max_length,
            "task": self._task().fingerprint(),
        }

    def pins(self) -> dict[str, Any]:
        """The weights and the tokenizer."""
        return {**super().pins(), "tokenizer": tokenizer_digest(self._tokenizer)}

    @cached_property
    def _tokenizer(self) -> Any:
        tokenizer = read_tokenizer(self.folder)
        found = (tokenizer.bos_token_id, tokenizer.pad_token_id)
        if found != (*self.begin, self.pad_id):
            raise AssetError(
                f"the tokenizer in {self.folder} begins texts with {found[0]} and pads with {found[1]}, "
                f"OPT with {self.begin[0]} and {self.pad_id}; put the tokenizer of {self.repo} there"
            )
        return tokenizer

    def tokenize(self, text: str) -> list[int]:
        """Byte-level BPE ids of a whole text."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def build(self) -> nn.Module:
        """The architecture of the checkpoint's configuration; its weights are drawn from a fixed seed."""
        from transformers import AutoModelForCausalLM, OPTConfig

        kind = read_config(self.folder).get("model_type")
        if kind != "opt":
            raise AssetError(f"{self.folder} holds a model of type {kind}, {self.repo} is of type opt")
        require_room(read_config(self.folder), self.folder, weight_files(self.folder))
        config = OPTConfig.from_pretrained(self.folder, local_files_only=True)
        config.use_cache = False  # a text is read at once
        with own_random_state(0):
            make = partial(AutoModelForCausalLM.from_config, config, dtype="float32")
            require_size(make, self.folder, weight_files(self.folder))
            model: nn.Module = make()
        return model.eval()

    def make_reference(
        self, stages: object, progress: Progress, device: torch.device | None = None
    ) -> dict[str, Tensor]:
        """The released tensors in float32; they are already on disk, so no stage keeps a second copy."""
        import torch

        return self._reference(progress, device or torch.device("cpu"))

    def _reference(self, progress: Progress, device: torch.device) -> dict[str, Tensor]:
        from transformers import OPTForCausalLM

        progress("reading weights", 0, 1)
        model, absent, unknown = read_transformers(OPTForCausalLM, self.folder)
        require_complete(self.folder, absent - {OUTPUT}, unknown)
        progress("reading weights", 1, 1)
        return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


# WikiText-2: the FP16 row of the tables of GPTQ (2210.17323), windows of 2,048 tokens. LAMBADA: quanto's FP16
# values (benchmark/report/published/opt_lambada_quanto.csv), given to two digits and measured in another
# precision than the reference here, hence the wider tolerance.
for _size, _perplexity, _accuracy in (("125m", 27.65, 63.0), ("350m", 22.00, 67.0)):
    for _task, _about, _expected, _tolerance in (
        ("wikitext2", "perplexity on WikiText-2", _perplexity, 0.2),
        ("lambada", "last token of LAMBADA", _accuracy, 1.5),
    ):
        MODELS.register(f"opt_{_size}_{_task}")(
            ReleasedOpt(
                name=f"opt_{_size}_{_task}",
                title=f"OPT-{_size}, {_about}",
                repo=f"facebook/opt-{_size}",
                task=_task,
                expected=_expected,
                tolerance=_tolerance,
            )
        )
