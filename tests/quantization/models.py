"""Tiny random models of the real classes: what every claim about sites is tested on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from quanttune.inputs import ModelInputs, call_model, logits_of
from quanttune.quantization import (
    RANGE_RULES,
    Quantizer,
    Scheme,
    SiteTable,
    build_quantizers,
    collect_statistics,
    discover_sites,
)

PAD, VOCABULARY, IMAGE = 1, 40, 16
FUSED, EAGER = "sdpa", "eager"


@dataclass(frozen=True)
class TinyModel:
    """One architecture.

    ``build`` takes "eager" or "sdpa"; ``blocks`` counts its Transformer blocks; ``inputs`` takes the number
    of items, a seed and a size: the sequence length of a text model, ignored by an image model.
    """

    name: str
    build: Callable[[str], nn.Module]
    inputs: Callable[[int, int, int], ModelInputs]
    blocks: int = 2
    text: bool = False
    causal: bool = False


def _images(items: int, seed: int, size: int) -> Tensor:
    return torch.randn(items, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(seed))


def _tokens(items: int, seed: int, size: int, padding: str = "right") -> dict[str, Tensor]:
    """Token ids with the second half of every second item padded."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (items, size), generator=generator)
    mask = torch.ones_like(ids)
    padded = slice(size - size // 2, None) if padding == "right" else slice(0, size // 2)
    mask[1::2, padded] = 0
    ids[1::2, padded] = PAD
    return {"input_ids": ids, "attention_mask": mask}


def _vit(attention: str, cls: str = "vit_tiny_patch16_224", **options: Any) -> nn.Module:
    sizes: dict[str, Any] = {"img_size": IMAGE, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
    model = timm.create_model(cls, **(sizes | {"num_classes": 5} | options))
    return _set_fused(model, attention)


def _distilled(attention: str) -> nn.Module:
    model = VisionTransformerDistilled(
        img_size=IMAGE, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=5, weight_init=""
    )
    return _set_fused(model, attention)


def _swin(attention: str) -> nn.Module:
    model = timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=IMAGE,
        patch_size=2,
        window_size=4,
        embed_dim=8,
        depths=(2, 2),
        num_heads=(2, 4),
        num_classes=5,
    )
    return _set_fused(model, attention)


def _set_fused(model: nn.Module, attention: str) -> nn.Module:
    switched = [module for module in model.modules() if hasattr(module, "fused_attn")]
    for module in switched:
        module.fused_attn = attention == FUSED
    assert switched
    return model


def _bert(attention: str) -> nn.Module:
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=3,
            intermediate_size=48,
            max_position_embeddings=32,
            pad_token_id=PAD,
            num_labels=3,
            attn_implementation=attention,
        )
    )


def _opt(attention: str, **options: Any) -> nn.Module:
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "ffn_dim": 48,
        "max_position_embeddings": 32,
        "word_embed_proj_dim": 24,
        "pad_token_id": PAD,
    }
    return OPTForCausalLM(OPTConfig(**(sizes | options), attn_implementation=attention))


def _opt_post_norm(attention: str) -> nn.Module:
    """As opt-350m: normalisation after the sums, and embeddings of another width, projected."""
    return _opt(attention, do_layer_norm_before=False, word_embed_proj_dim=16)


def _llama(attention: str) -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=2,
            intermediate_size=48,
            max_position_embeddings=32,
            pad_token_id=PAD,
            attn_implementation=attention,
        )
    )


MODELS = {
    model.name: model
    for model in (
        TinyModel("vit", _vit, _images),
        TinyModel(
            "vit_layerscale", lambda attention: _vit(attention, init_values=0.5, global_pool="avg"), _images
        ),
        TinyModel("deit", lambda attention: _vit(attention, "deit_tiny_patch16_224"), _images),
        TinyModel("deit_distilled", _distilled, _images),
        TinyModel("swin", _swin, _images, blocks=4),
        TinyModel("bert", _bert, _tokens, text=True),
        TinyModel("opt", _opt, _tokens, text=True, causal=True),
        TinyModel("opt_post_norm", _opt_post_norm, _tokens, text=True, causal=True),
        TinyModel("llama", _llama, _tokens, text=True, causal=True),
    )
}
CAUSAL = [name for name, model in MODELS.items() if model.causal]
TEXT = [name for name, model in MODELS.items() if model.text]

SIZE = 8
"""Default sequence length of a text model."""

_built: dict[tuple[str, str], nn.Module] = {}


def build(name: str, attention: str = EAGER) -> nn.Module:
    """The model called ``name`` in evaluation mode; the same lively weights for either attention.

    Tests that change the model take a deep copy.
    """
    key = (name, attention)
    if key not in _built:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = MODELS[name].build(attention).eval()
        generator = torch.Generator().manual_seed(1)
        for path, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            width = 0.5 * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 and "embed" not in path else 0.2
            with torch.no_grad():
                parameter.add_(noise * width)
        _built[key] = model
    return _built[key]


@contextmanager
def one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from a second thread, and wait long for it where the machine is shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def inputs(name: str, items: int = 2, seed: int = 0, size: int = SIZE) -> ModelInputs:
    """A batch for the model called ``name``; text batches are padded in every second item."""
    return MODELS[name].inputs(items, seed, size)


def logits(model: nn.Module, batch: ModelInputs) -> Tensor:
    """The logits of ``model`` without gradient."""
    with torch.no_grad():
        return logits_of(call_model(model, batch))


def sites(name: str, attention: str = EAGER) -> SiteTable:
    """All sites of the model called ``name``."""
    return discover_sites(build(name, attention), inputs(name))


def quantizers(
    name: str, attention: str = EAGER, profile: str = "full", precision: str = "W8A8", symmetric: bool = True
) -> dict[str, Quantizer]:
    """Min-max quantizers of a profile, calibrated on two batches."""
    model, table = build(name, attention), sites(name, attention).profile(profile)
    statistics = collect_statistics(model, [inputs(name, 2, 1), inputs(name, 3, 2)], table)
    scheme = Scheme.parse(precision if symmetric else f"{precision}-asym", profile)
    return build_quantizers(model, table, statistics, scheme, RANGE_RULES.get("minmax"))


def experts(kind: str, implementation: str) -> nn.Module:
    """A ``Mixtral`` or ``GptOss`` of one layer, with one of transformers' ways to run experts."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=40,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        num_local_experts=4,
        num_experts_per_tok=2,
        head_dim=8,
        pad_token_id=0,
    )
    made = getattr(transformers, f"{kind}ForCausalLM")
    model: nn.Module = made._from_config(config, experts_implementation=implementation)
    return model.eval()
