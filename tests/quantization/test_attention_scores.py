"""Whatever an attention computes between its product and its softmax stays in float, and so does its mask."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn

from quanttune.inputs import ModelInputs
from quanttune.quantization import SiteKind, SiteTable, discover_sites, quantize, simulate
from tests.quantization.models import logits

IDS = torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def swin_v2() -> tuple[nn.Module, ModelInputs]:
    """Cosine attention: scores times a learned factor, plus a bias by position and a mask."""
    sizes: dict[str, Any] = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 16}
    return timm.create_model(
        "swinv2_tiny_window8_256", depths=(2, 2), num_heads=(2, 4), num_classes=3, **sizes
    ), IMAGES


def gemma_2() -> tuple[nn.Module, ModelInputs]:
    """Scores are capped by a tanh."""
    config = transformers.Gemma2Config(
        vocab_size=40, head_dim=8, num_key_value_heads=1, attn_logit_softcapping=5.0, **SMALL
    )
    config._attn_implementation = "eager"
    return transformers.Gemma2ForCausalLM(config), {"input_ids": IDS}


def beit(attention: str = "eager") -> tuple[nn.Module, ModelInputs]:
    """A bias by position, added to the scores or to the mask of the fused attention."""
    config = transformers.BeitConfig(
        image_size=32, patch_size=8, use_relative_position_bias=True, num_labels=3, **SMALL
    )
    config._attn_implementation = attention
    return transformers.BeitForImageClassification(config), {"pixel_values": IMAGES}


def table_of(build: Any) -> SiteTable:
    torch.manual_seed(0)
    model, batch = build()
    return discover_sites(model.eval(), batch)


@pytest.mark.parametrize("build", [swin_v2, gemma_2, beit], ids=lambda build: build.__name__)
def test_of_published_models(build: Any) -> None:
    found = table_of(build).profile("full")
    inside = [site_id for site_id in found if "attn" in site_id or "attention" in site_id]
    assert inside
    assert not [site_id for site_id in inside if site_id.split("/")[1].startswith(("add", "tanh"))]


def test_either_attention_has_the_same_sums() -> None:
    eager, fused = table_of(beit), table_of(lambda: beit("sdpa"))
    sums = [
        [site.id for site in each.profile("full").values() if site.operation == "add"]
        for each in (eager, fused)
    ]
    assert sums[0] == sums[1]


class Scored(nn.Module):
    """Self-attention whose scores go through a chain of functions."""

    def __init__(self, chain: Any) -> None:
        super().__init__()
        self.project, self.head, self.chain = nn.Linear(8, 8), nn.Linear(8, 2), chain
        self.first, self.second = (nn.Parameter(torch.randn(5, 5)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(x)
        weights = self.chain(self, y @ y.mT).softmax(-1)
        return self.head(x + weights @ y)


CHAINS = {
    "factor": lambda model, scores: scores * model.first + model.second.expand_as(scores),
    "cap": lambda model, scores: torch.tanh(scores / 3) * 3,
    "clamp": lambda model, scores: scores.clamp(-3, 3) + (model.first + model.second).expand_as(scores),
    "where": lambda model, scores: torch.where(scores > 9, 9.0, scores) + scores,
    "in place": lambda model, scores: scores.mul_(2).add_(model.first.expand_as(scores)),
}


@pytest.mark.parametrize("name", CHAINS)
def test_of_any_arithmetic(name: str) -> None:
    model, x = Scored(CHAINS[name]).eval(), torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    full = discover_sites(model, x).profile("full")
    sums = [site.id for site in full.values() if site.operation in ("add", "tanh")]
    residual = [site.id for site in full.values() if site.kind is SiteKind.RESIDUAL_SUM]
    assert len(sums) == 1
    assert residual == sums


def test_capped_scores_hide_what_comes_later() -> None:
    """With a range for every token no number depends on later ones, not even through what they score."""
    torch.manual_seed(0)
    model, batch = gemma_2()
    quantized = quantize(model.eval(), [batch], "W5A5-token")
    changed = IDS.clone()
    changed[:, -1] = (changed[:, -1] + 5) % 37 + 3
    with simulate(model, quantized.quantizers):
        before, after = logits(model, batch), logits(model, {"input_ids": changed})
    assert torch.equal(before[:, :-1], after[:, :-1])
    assert not torch.equal(before, after)
