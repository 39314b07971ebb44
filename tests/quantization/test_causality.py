"""The causal mask and the padding mask survive quantization, in eager and in fused attention."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quanttune.inputs import ModelInputs
from quanttune.quantization import quantize, simulate
from tests.quantization.models import CAUSAL, EAGER, FUSED, PAD, TEXT, VOCABULARY, build, logits, quantizers

SIZE = 9

causal_model = pytest.mark.parametrize("name", CAUSAL)
each_attention = pytest.mark.parametrize("attention", [EAGER, FUSED])


def tokens(items: int = 3, seed: int = 7) -> Tensor:
    return torch.randint(3, VOCABULARY, (items, SIZE), generator=torch.Generator().manual_seed(seed))


def quantized(name: str, attention: str, batch: ModelInputs, softmax_only: bool = False) -> Tensor:
    model = build(name, attention)
    chosen = quantizers(name, attention, "full", "W5A5")
    assert any("softmax" in site_id for site_id in chosen)
    if softmax_only:
        chosen = {site_id: quantizer for site_id, quantizer in chosen.items() if "softmax" in site_id}
    with simulate(model, chosen):
        return logits(model, batch)


def with_other(ids: Tensor, position: int) -> Tensor:
    changed = ids.clone()
    changed[:, position] = (changed[:, position] - 3 + 11) % (VOCABULARY - 3) + 3
    return changed


@causal_model
@each_attention
@pytest.mark.parametrize("softmax_only", [False, True])
def test_a_later_token_never_changes_earlier_logits(name: str, attention: str, softmax_only: bool) -> None:
    ids = tokens()
    for masked in (False, True):
        extra = {"attention_mask": torch.ones_like(ids)} if masked else {}
        before = quantized(name, attention, {"input_ids": ids, **extra}, softmax_only)
        for position in (1, 4, SIZE - 1):
            after = quantized(
                name, attention, {"input_ids": with_other(ids, position), **extra}, softmax_only
            )
            assert torch.equal(after[:, :position], before[:, :position])
            assert not torch.equal(after[:, position:], before[:, position:])


@causal_model
@each_attention
@pytest.mark.parametrize("profile", ["full", "matmul"])
def test_nor_does_it_where_every_token_has_its_range(name: str, attention: str, profile: str) -> None:
    ids, model = tokens(), build(name, attention)
    chosen = quantizers(name, attention, profile, "W5A5-token")
    with simulate(model, chosen):
        before = logits(model, {"input_ids": ids})
        for position in (1, 4, SIZE - 1):
            after = logits(model, {"input_ids": with_other(ids, position)})
            assert torch.equal(after[:, :position], before[:, :position])
            assert not torch.equal(after[:, position:], before[:, position:])


@causal_model
@each_attention
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_later_token_never_changes_earlier_logits_with_padding(
    name: str, attention: str, side: str
) -> None:
    ids, mask = tokens(), torch.ones(3, SIZE, dtype=torch.long)
    padding = slice(0, 3) if side == "left" else slice(SIZE - 3, SIZE)
    mask[1, padding] = 0
    ids[1, padding] = PAD
    before = quantized(name, attention, {"input_ids": ids, "attention_mask": mask})
    for position in (4, 5):
        after = quantized(name, attention, {"input_ids": with_other(ids, position), "attention_mask": mask})
        real = mask[:, :position].bool()  # a padded token that sees no real one may look anywhere
        assert torch.equal(after[:, :position][real], before[:, :position][real])
        assert not torch.equal(after[:, position:], before[:, position:])


@pytest.mark.parametrize(
    ("name", "side"),
    # BERT classifies from its first token, so it is padded on the right.
    [(name, side) for name in TEXT for side in ("left", "right") if name in CAUSAL or side == "right"],
)
@each_attention
def test_padded_tokens_never_change_the_logits_of_real_ones(name: str, attention: str, side: str) -> None:
    ids, mask = tokens(), torch.ones(3, SIZE, dtype=torch.long)
    padding = slice(0, 3) if side == "left" else slice(SIZE - 3, SIZE)
    mask[:2, padding] = 0
    first, second = ids.clone(), ids.clone()
    second[:2, padding] = PAD
    before = quantized(name, attention, {"input_ids": first, "attention_mask": mask})
    after = quantized(name, attention, {"input_ids": second, "attention_mask": mask})
    real = mask.bool() if name in CAUSAL else slice(None)
    assert torch.isfinite(after[real]).all()
    assert torch.equal(after[real], before[real])
    if name not in CAUSAL or side == "left":  # a causal model never looks at padding on its right
        assert not torch.equal(quantized(name, attention, {"input_ids": first})[real], before[real])


@causal_model
def test_attention_matrices_are_lower_triangular(name: str) -> None:
    """Seen at the site itself, in both forms of attention: no weight on what comes later."""
    from quanttune.quantization import SiteHandlers

    for attention in (EAGER, FUSED):
        model, seen = build(name, attention), {}
        site_ids = [site_id for site_id in quantizers(name, attention) if "softmax" in site_id]

        def keep(site_id: str, seen: dict[str, Tensor] = seen):  # type: ignore[no-untyped-def]
            def handle(values: Tensor) -> Tensor:
                seen[site_id] = values
                return values

            return handle

        with SiteHandlers(model, {site_id: keep(site_id) for site_id in site_ids}):
            logits(model, {"input_ids": tokens()})
        assert len(seen) == len(site_ids) == 2
        for probabilities in seen.values():
            assert torch.equal(probabilities, probabilities.tril())
            torch.testing.assert_close(probabilities.sum(dim=-1), torch.ones(probabilities.shape[:-1]))
            assert float(probabilities.tril(-1).max()) > 0


@pytest.mark.parametrize("name", TEXT)
def test_eager_and_fused_attention_agree_behind_every_mask(name: str) -> None:
    ids, mask = tokens(), torch.ones(3, SIZE, dtype=torch.long)
    mask[1, SIZE - 4 :] = 0
    for batch in ({"input_ids": ids}, {"input_ids": ids, "attention_mask": mask}):
        found = {}
        for attention in (EAGER, FUSED):
            model = build(name, attention)
            with simulate(model, quantizers(name, attention, "full", "W16A16-int")):
                found[attention] = logits(model, batch)
        torch.testing.assert_close(found[FUSED], found[EAGER], rtol=0, atol=5e-3)
        plain = logits(build(name), batch)
        assert float((found[EAGER] - plain).square().mean()) < 1e-2 * float(plain.square().mean())


@causal_model
@pytest.mark.parametrize("scheme", ["W5A5", "W5A5-token"])
@pytest.mark.parametrize("profile", ["full", "matmul"])
def test_text_is_generated_on_quantized_tensors(name: str, scheme: str, profile: str) -> None:
    """With a key-value cache as without one, and otherwise than by the model in float."""
    model, ids = build(name), tokens()
    applied = quantize(model, [{"input_ids": tokens(seed=8)}], scheme, profile=profile).apply(model)
    options = {
        "max_new_tokens": 5,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    cached, plain = (
        applied.generate(ids, use_cache=use_cache, pad_token_id=PAD, eos_token_id=None, **options)
        for use_cache in (True, False)
    )
    assert torch.equal(cached.sequences, plain.sequences)
    assert all(torch.equal(one, other) for one, other in zip(cached.logits, plain.logits, strict=True))
    in_float = model.generate(ids, pad_token_id=PAD, eos_token_id=None, **options)
    assert not torch.equal(in_float.logits[0], cached.logits[0])
