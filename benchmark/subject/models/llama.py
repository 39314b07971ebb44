"""Llama-architecture decoders with pretrained weights, used as they are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmark.subject.assets.catalogue import get_asset
from benchmark.subject.assets.fetch import fetch
from benchmark.subject.models.bundle import TOKENIZER
from benchmark.subject.models.decoder import DecoderEntry
from benchmark.subject.models.entry import MODELS

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class PretrainedDecoder(DecoderEntry):
    """A released decoder that does its task without further training; ``source`` names its asset."""

    def needs(self) -> tuple[str, ...]:
        """The released weights."""
        return (self.source,)

    def digests(self) -> dict[str, Any]:
        """Those of the asset."""
        asset = get_asset(self.source)
        return {"weights": asset.tensor_digest, "companions": dict(asset.companions)}

    def tokenizer_file(self) -> Path:
        """``tokenizer.json`` of the asset."""
        return fetch(self.source).folder / TOKENIZER

    def weights(self) -> dict[str, Tensor]:
        """The tensors of the asset."""
        return fetch(self.source).tensors()


MODELS.register("smollm2_135m")(
    PretrainedDecoder(
        name="smollm2_135m",
        title="SmolLM2-135M-Instruct (Llama); its weights have passed through a 4-bit file",
        family="llama",
        architecture="LlamaForCausalLM",
        source="smollm2_135m",
        task="moby_dick_excerpt",
        settings={
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "rms_norm_eps": 1e-5,
            "rope_theta": 100000.0,
            "tie_word_embeddings": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        max_length=8192,
        pad_id=2,
        # By study decoder_search: the residual stream reaches 26,000, which small steps do not take down in
        # time. At 1e-5 the tuner's guard refuses the weights.
        recipe={"steps": 50, "learning_rate": 1e-3, "batch_size": 4},
        expected=74.2,
    )
)
