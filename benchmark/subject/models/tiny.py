"""Tiny random models of the real classes, for the smoke suite and tests: quick, and without meaning.

They are built from the same timm and transformers classes as the real models, so whatever works on them
reaches the same modules and functions. Their weights are drawn from a fixed seed; nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from benchmark.subject.models.entry import (
    MODELS,
    CausalTextEntry,
    ImageEntry,
    ModelEntry,
    Progress,
    TextEntry,
    as_one,
    own_random_state,
)
from benchmark.subject.tasks.preprocessing import Text
from quanttune.seeds import derive_seed

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

RECIPE = {"steps": 12, "learning_rate": 1e-3, "batch_size": 16}
_WORD = re.compile(r"\w+|[^\w\s]")
_FIRST_WORD = 4  # smaller token ids are special


class RandomEntry(ModelEntry):
    """A model whose reference is its own random initialisation.

    Attributes:
        architecture: Name of the class to build.
        settings: Arguments of the class, as plain JSON values.
        seed: Of the initial weights.
    """

    architecture: str
    settings: Mapping[str, Any]
    source: str = "random"
    seed: int = 0

    @abstractmethod
    def _construct(self) -> nn.Module:
        """The model, its weights drawn from torch's global generator."""

    def identity(self) -> dict[str, Any]:
        """Architecture, seed and the data."""
        return {
            "model": self.key,
            "version": self.version,
            "architecture": self.architecture,
            "settings": dict(self.settings),
            "seed": self.seed,
            "task": self._task().fingerprint(),
        }

    def build(self) -> nn.Module:
        """The architecture with its random weights, in evaluation mode."""
        with own_random_state(derive_seed(self.seed, "tiny", self.key)):
            model = self._construct()
        return model.eval()

    def _reference(self, progress: Progress, device: torch.device) -> dict[str, Tensor]:
        progress("reference", 0, 1)
        state = {name: tensor.detach().clone() for name, tensor in self.build().state_dict().items()}
        progress("reference", 1, 1)
        return state


@dataclass(frozen=True, kw_only=True)
class TinyImageModel(ImageEntry, RandomEntry):
    """A small vision transformer built by timm."""

    name: str
    title: str
    family: str
    architecture: str
    settings: Mapping[str, Any]
    task: str = "fashion_mnist"
    image_size: int = 32
    recipe: Mapping[str, Any] = field(default_factory=lambda: dict(RECIPE))
    seed: int = 0
    version: int = 1

    def _construct(self) -> nn.Module:
        import timm

        model: nn.Module = timm.create_model(
            self.architecture,
            pretrained=False,
            img_size=self.image_size,
            num_classes=self._classes(),
            **self.settings,
        )
        return model


@dataclass(frozen=True, kw_only=True)
class TinyTextModel(TextEntry, RandomEntry):
    """A small language-model architecture of transformers with a classification head.

    Words become token ids by hashing, so no vocabulary file is needed.
    """

    name: str
    title: str
    family: str
    architecture: str
    settings: Mapping[str, Any]
    task: str = "movie_reviews"
    max_length: int = 32
    pad_id: int = 0
    recipe: Mapping[str, Any] = field(default_factory=lambda: dict(RECIPE))
    seed: int = 0
    version: int = 1

    def _construct(self) -> nn.Module:
        import transformers

        kind = getattr(transformers, self.architecture)
        config = kind.config_class(num_labels=self._classes(), pad_token_id=self.pad_id, **self.settings)
        model: nn.Module = kind(config)
        return model

    def encode(self, texts: Sequence[Text]) -> list[list[int]]:
        """A begin token, a hash of every word, an end token; at most ``max_length`` in all."""
        begin, end = 2, 3
        words = int(self.settings["vocab_size"]) - _FIRST_WORD

        def token(word: str) -> int:
            return _FIRST_WORD + int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "big") % words

        found = [_WORD.findall(as_one(text).lower())[: self.max_length - 2] for text in texts]
        return [[begin, *map(token, line), end] for line in found]


@dataclass(frozen=True, kw_only=True)
class TinyCausalModel(CausalTextEntry, RandomEntry):
    """A small causal language model of transformers, whose tokens are the bytes of a text."""

    name: str
    title: str
    family: str
    architecture: str
    settings: Mapping[str, Any]
    task: str = "moby_dick_excerpt"
    max_length: int = 256
    pad_id: int = 256
    recipe: Mapping[str, Any] = field(default_factory=lambda: {**RECIPE, "batch_size": 4})
    seed: int = 0
    version: int = 1

    def _construct(self) -> nn.Module:
        import transformers

        kind = getattr(transformers, self.architecture)
        config = kind.config_class(
            vocab_size=self.pad_id + 1,
            pad_token_id=self.pad_id,
            max_position_embeddings=self.max_length,
            use_cache=False,
            **self.settings,
        )
        model: nn.Module = kind(config)
        return model

    def tokenize(self, text: str) -> list[int]:
        """The bytes of the text in UTF-8."""
        return list(text.encode())


_VIT = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}

for _entry in (
    TinyImageModel(
        name="tiny_vit",
        title="tiny random ViT (timm)",
        family="vit",
        architecture="vit_tiny_patch16_224",
        settings=_VIT,
    ),
    TinyImageModel(
        name="tiny_deit",
        title="tiny random distilled DeiT (timm)",
        family="vit",
        architecture="deit_tiny_distilled_patch16_224",
        settings=_VIT,
    ),
    TinyImageModel(
        name="tiny_swin",
        title="tiny random Swin (timm)",
        family="swin",
        architecture="swin_tiny_patch4_window7_224",
        # 8 x 8 patches in windows of 4 x 4: every second block shifts its windows, as in the real model
        settings={"window_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]},
    ),
    TinyTextModel(
        name="tiny_bert",
        title="tiny random BERT (transformers)",
        family="bert",
        architecture="BertForSequenceClassification",
        settings={
            "vocab_size": 512,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "max_position_embeddings": 64,
        },
    ),
    TinyTextModel(
        name="tiny_opt",
        title="tiny random OPT (transformers)",
        family="opt",
        architecture="OPTForSequenceClassification",
        pad_id=1,
        settings={
            "vocab_size": 512,
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "ffn_dim": 64,
            "max_position_embeddings": 64,
        },
    ),
    TinyCausalModel(
        name="tiny_opt_lm",
        title="tiny random OPT language model (transformers)",
        family="opt",
        architecture="OPTForCausalLM",
        settings={
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "ffn_dim": 64,
            "bos_token_id": 256,
            "eos_token_id": 256,
        },
    ),
    TinyCausalModel(
        name="tiny_llama",
        title="tiny random Llama language model (transformers)",
        family="llama",
        architecture="LlamaForCausalLM",
        settings={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "bos_token_id": 256,
            "eos_token_id": 256,
        },
    ),
):
    MODELS.register(_entry.name)(_entry)
