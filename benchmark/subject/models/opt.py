"""OPT-architecture decoders that come with the package."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmark.subject.models.bundle import TOKENIZER, checked_file, load_weights, read_manifest
from benchmark.subject.models.decoder import DecoderEntry
from benchmark.subject.models.entry import MODELS

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class BundledDecoder(DecoderEntry):
    """A decoder whose weights and tokenizer are in this package, in half precision.

    Args:
        folder: The bundle, see :mod:`benchmark.subject.models.bundle`.
    """

    folder: Path
    source: str = "bundled"

    def digests(self) -> dict[str, Any]:
        """The sha256 of every file of the bundle."""
        return {"files": read_manifest(self.folder)["files"]}

    def tokenizer_file(self) -> Path:
        """``tokenizer.json`` of the bundle."""
        return checked_file(self.folder, TOKENIZER)

    def weights(self) -> dict[str, Tensor]:
        """The tensors of the bundle."""
        return load_weights(self.folder)


MODELS.register("opt_mini")(
    BundledDecoder(
        name="opt_mini",
        title="OPT of 3 M parameters, trained from scratch on the task's training text",
        family="opt",
        architecture="OPTForCausalLM",
        folder=Path(__file__).parent / "opt_mini",
        task="moby_dick",
        settings={
            "vocab_size": 2048,
            "hidden_size": 192,
            "word_embed_proj_dim": 192,
            "num_hidden_layers": 6,
            "num_attention_heads": 6,
            "ffn_dim": 768,
            "dropout": 0.1,
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
        max_length=256,
        pad_id=1,
        # Validation perplexity 101.6; after 100 steps of plain fine-tuning at 5e-5, 2e-4 and 6e-4:
        # 101.3, 101.1 and 101.7.
        recipe={"steps": 100, "learning_rate": 2e-4, "batch_size": 8},
        expected=97.24,
    )
)
