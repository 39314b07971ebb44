"""What the entries of causal language models of transformers share, wherever their weights come from."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmark.subject.models.entry import CausalTextEntry, Progress, own_random_state
from quanttune.errors import AssetError

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from torch import Tensor, nn

OUTPUT = "lm_head.weight"
"""The output layer, which is the embedding itself where the two are tied, and then in no file."""


@dataclass(frozen=True, kw_only=True)
class DecoderEntry(CausalTextEntry):
    """A causal language model of transformers with a tokenizer of the library ``tokenizers``.

    Args:
        name: Registered name.
        title: For a person.
        family: Architecture family.
        architecture: Name of the class in transformers.
        settings: Fields of its configuration; those left out have the values of the class.
        source: Name of the asset, or where else the weights come from.
        task: Name of a language-modelling task.
        max_length: Positions of the model.
        pad_id: Token id of padding.
        recipe: For the methods that fine-tune.
        expected: Perplexity on the test split.
        tolerance: How far from it the measured one may be.
    """

    name: str
    title: str
    family: str
    architecture: str
    settings: Mapping[str, Any]
    source: str
    task: str
    max_length: int
    pad_id: int
    recipe: Mapping[str, Any] = field(default_factory=dict)
    expected: float | None = None
    tolerance: float = 0.1
    version: int = 1

    def identity(self) -> dict[str, Any]:
        """Architecture, digests of weights and tokenizer, and the data."""
        return {
            "model": self.key,
            "version": self.version,
            "architecture": self.architecture,
            "settings": dict(self.settings),
            "max_length": self.max_length,
            **self.digests(),
            "task": self._task().fingerprint(),
        }

    @abstractmethod
    def digests(self) -> dict[str, Any]:
        """What pins weights and tokenizer."""

    @abstractmethod
    def tokenizer_file(self) -> Path:
        """``tokenizer.json``, checked."""

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """The float32 tensors, checked; without a tied output layer."""

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(self.tokenizer_file()))

    def tokenize(self, text: str) -> list[int]:
        """Token ids as the model's tokenizer makes them, without special tokens and uncut."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def build(self) -> nn.Module:
        """The architecture; its weights are drawn from a fixed seed."""
        import transformers

        kind = getattr(transformers, self.architecture)
        config = kind.config_class(
            **self.settings,
            max_position_embeddings=self.max_length,
            pad_token_id=self.pad_id,
            use_cache=False,  # a text is read at once
        )
        with own_random_state(0):
            model: nn.Module = kind(config)
        return model.eval()

    def _reference(self, progress: Progress, device: torch.device) -> dict[str, Tensor]:
        model = self.build()
        progress("reading weights", 0, 1)
        found = model.load_state_dict(self.weights(), strict=False)
        absent = set(found.missing_keys) - {OUTPUT}
        if absent or found.unexpected_keys:
            raise AssetError(
                f"the weights of {self.name} and this version of transformers name tensors differently: "
                f"{sorted({*absent, *found.unexpected_keys})[:3]}"
            )
        progress("reading weights", 1, 1)
        return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
