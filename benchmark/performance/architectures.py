"""The paper's architectures at full size with random weights: shapes decide speed and memory, not values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from benchmark.subject.models.entry import own_random_state

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from quanttune.inputs import ModelInputs

_SEED = 0
_ON_A_GPU = 32  # times as many items, or it waits for Python


@dataclass(frozen=True)
class Architecture:
    """What is built, and what one batch of it is.

    Args:
        title: For a person.
        library: ``timm`` or ``transformers``.
        name: timm's name, or the class in transformers.
        settings: What differs from the defaults of that class.
        depth: Names of the settings that hold the number of layers.
        items: Items in a batch on a CPU.
        tokens: Tokens of a text, or pixels along an image's side.
        tuned: Whether a fine-tuning step is timed.
    """

    title: str
    library: str
    name: str
    items: int
    tokens: int
    depth: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    tuned: bool = True

    def build(self, layers: int | None = None) -> nn.Module:
        """The model in evaluation mode, its weights drawn from a fixed seed.

        Args:
            layers: Number of layers (of each stage, if it has stages) in place of the architecture's own.
        """
        settings = dict(self.settings)
        if layers is not None:
            stages = isinstance(settings.get(self.depth), tuple)
            settings[self.depth] = (layers,) * 4 if stages else layers
        with own_random_state(_SEED):
            if self.library == "timm":
                import timm

                model: nn.Module = timm.create_model(self.name, pretrained=False, **settings)
            else:
                import transformers

                kind = getattr(transformers, self.name)
                model = kind(kind.config_class(**settings))
        return model.eval()

    def on(self, device: torch.device) -> Architecture:
        """The same with as many items in a batch as suit the device."""
        return self if device.type == "cpu" else replace(self, items=_ON_A_GPU * self.items)

    def batches(self, count: int, model: nn.Module) -> list[tuple[ModelInputs, Tensor]]:
        """Random inputs with targets; a language model's targets are its own tokens."""
        import torch

        generator = torch.Generator().manual_seed(_SEED)
        found: list[tuple[ModelInputs, Tensor]] = []
        for _ in range(count):
            if self.library == "timm":
                inputs = torch.randn(self.items, 3, self.tokens, self.tokens, generator=generator)
                found.append((inputs, torch.randint(1000, (self.items,), generator=generator)))
                continue
            vocabulary = int(getattr(model, "config").vocab_size)  # noqa: B009 - unknown to nn.Module
            ids = torch.randint(5, vocabulary, (self.items, self.tokens), generator=generator)
            targets = ids if "CausalLM" in self.name else torch.randint(2, (self.items,), generator=generator)
            found.append(({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, targets))
        return found


ARCHITECTURES: Mapping[str, Architecture] = {
    "vit_b": Architecture("ViT-B/16", "timm", "vit_base_patch16_224", items=4, tokens=224, depth="depth"),
    "swin_b": Architecture(
        "Swin-B",
        "timm",
        "swin_base_patch4_window7_224",
        items=4,
        tokens=224,
        depth="depths",
        settings={"depths": (2, 2, 18, 2)},
        tuned=False,
    ),
    "bert_base": Architecture(
        "BERT-base",
        "transformers",
        "BertForSequenceClassification",
        items=8,
        tokens=128,
        depth="num_hidden_layers",
    ),
    "opt_350m": Architecture(
        "OPT-350m",
        "transformers",
        "OPTForCausalLM",
        items=4,
        tokens=128,
        depth="num_hidden_layers",
        settings={
            "hidden_size": 1024,
            "word_embed_proj_dim": 512,
            "ffn_dim": 4096,
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "do_layer_norm_before": False,
        },
    ),
}
