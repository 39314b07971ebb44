"""Outlier Suppression against its definitions: migrated gammas, tokens' quantiles, and the best share."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch

from baselines import METHODS
from baselines.folding import find_groups
from baselines.outlier_suppression import OutlierSuppression, migrated
from baselines.searching.token_clipping import (
    Batches,
    CountedTokens,
    mask_of,
    output_of,
    shares,
    squared_error,
    token_axis,
    token_range,
)
from quanttune.errors import ConfigError
from quanttune.quantization import SiteKind, simulate
from quanttune.quantization.quantizers import ScaledQuantizer
from tests.method_contexts import context_for
from tests.quantization.models import inputs, logits, sites
from tests.quantization.quantizing import significant
from tests.test_smoothquant import activations, applied

MIGRATION = OutlierSuppression(clipping=False)
CLIPPING = OutlierSuppression(migration=False)


def test_factors_are_gamma_with_its_sign_and_a_floor() -> None:
    gamma = torch.tensor([2.0, -0.7, 1e-6, 0.0, -1e-9], dtype=torch.float64)
    least = 0.1 * gamma.abs().mean()
    found, floored = migrated(gamma, 0.1)
    assert floored == 3
    expected = significant(np.array([2.0, -0.7, float(least), float(least), -float(least)]))
    np.testing.assert_array_equal(found.numpy(), expected)


@pytest.mark.parametrize("name", ["vit", "bert", "opt", "llama"])
@pytest.mark.parametrize("profile", ["full", "matmul"])
def test_quantizers_see_the_normalised_tensor_without_its_gamma(name: str, profile: str) -> None:
    """The step is that of ``(x - mean) / deviation + beta / gamma``, and weights are those times gamma."""
    context = context_for(name, profile)
    quantized = MIGRATION.quantize(context)
    parameters = dict(context.model.named_parameters())
    groups = find_groups(context)
    assert quantized.details["migrated_tensors"] == len(groups)
    for group in groups:
        gamma = parameters[str(group.scale)].detach().double().numpy()
        floor = 0.01 * np.abs(gamma).mean()
        s = np.where(gamma < 0, -1, 1) * np.maximum(np.abs(gamma), floor)
        quantizer = quantized.quantizers[group.carriers[0]]
        assert isinstance(quantizer, ScaledQuantizer)
        np.testing.assert_allclose(quantizer.factors, s, rtol=2.0**-15)
        if profile == "full" and group.carriers == (group.site,):
            x = activations(name, context, str(group.scale).rpartition(".")[0])
            limit = np.abs(x / s).max()
            assert float(quantizer.inner.scale) == pytest.approx(limit / 127, rel=2.0**-14)  # type: ignore[attr-defined]
        weight = quantized.quantizers[group.weights[0]]
        top = np.abs(parameters[group.parameters[0]].detach().numpy() * s).max(1)
        np.testing.assert_allclose(weight.inner.scale, top / 127, rtol=2.0**-14)  # type: ignore[attr-defined]


def test_a_gamma_that_makes_outliers_is_taken_out() -> None:
    context = context_for("vit", "matmul", "W8A6")
    model = copy.deepcopy(context.model)
    with torch.no_grad():
        for block in model.blocks:
            for norm, layer in ((block.norm1, block.attn.qkv), (block.norm2, block.mlp.fc1)):
                norm.weight[5] *= -40
                norm.bias[5] *= -40
                layer.weight[:, 5] /= -40
    context, batch = dataclasses.replace(context, model=model), inputs("vit", 6, 5)
    plain = logits(model, batch)
    errors = [
        float((applied(context, method.quantize(context), batch) - plain).square().mean())
        for method in (MIGRATION, METHODS.get("minmax")())
    ]
    assert errors[0] < 0.5 * errors[1]


def test_without_either_part_it_is_minmax() -> None:
    context, batch = context_for("bert"), inputs("bert", 4, 5)
    neither = OutlierSuppression(migration=False, clipping=False).quantize(context)
    assert torch.equal(
        applied(context, neither, batch), applied(context, METHODS.get("minmax")().quantize(context), batch)
    )
    assert neither.details == {}


def test_migration_is_told_its_price() -> None:
    assert len(MIGRATION.quantize(context_for("bert")).extra_operations) == 4
    assert MIGRATION.quantize(context_for("vit")).extra_operations == {}


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_shares_are_those_of_the_authors_code(bits: int) -> None:
    found = shares(bits)
    lowest = 1 - {8: 0.1, 6: 0.3, 4: 0.9}[bits]
    np.testing.assert_allclose(found, np.arange(1, lowest - 0.005, -0.01), atol=1e-9)


def test_shares_of_other_widths_lie_between() -> None:
    assert shares(7)[-1] == pytest.approx(0.8)
    assert shares(5)[-1] == pytest.approx(0.4)
    assert shares(2) == shares(4)
    assert shares(16) == shares(8)


def test_a_range_covers_a_share_of_the_tokens() -> None:
    generator = np.random.default_rng(0)
    low, high = -generator.exponential(size=101), generator.exponential(size=101)
    extremes = torch.from_numpy(np.stack([low, high]))
    assert token_range(extremes, 1.0, False) == (low.min(), high.max())
    found = token_range(extremes, 0.9, False)
    assert found[0] == pytest.approx(np.sort(low)[10])
    assert found[1] == pytest.approx(np.sort(high)[90])
    limit = np.sort(np.maximum(-low, high))[90]
    assert token_range(extremes, 0.9, True) == pytest.approx((-limit, limit))
    zeros = torch.zeros(2, 50, dtype=torch.float64)
    zeros[1, 0] = 2.0
    assert token_range(zeros, 0.9, True) == (-2.0, 2.0)
    assert token_range(zeros, 0.9, False) == (0.0, 2.0)


def test_padding_is_not_counted() -> None:
    batch = inputs("bert", 4, 1)
    assert not isinstance(batch, torch.Tensor)
    mask = mask_of(batch)
    assert mask is not None
    assert not mask.all()
    values = torch.randn(4, 8, 6, generator=torch.Generator().manual_seed(0))
    heads = torch.randn(4, 3, 8, 6, generator=torch.Generator().manual_seed(1))
    batches = Batches([batch])
    whole, flat, by_head, other = (CountedTokens(-1, batches) for _ in range(4))
    for _ in batches:
        whole.update(values, (0.0, 0.0))
        flat.update(values.flatten(0, 1), (0.0, 0.0))
        by_head.update(heads, (0.0, 0.0))
        other.update(values[:, 0], (0.0, 0.0))
    expected = torch.stack([values.amin(-1)[mask], values.amax(-1)[mask]])
    assert torch.equal(whole.extremes, expected)
    assert torch.equal(flat.extremes, expected)
    kept = mask[:, None].expand(4, 3, 8)
    assert torch.equal(by_head.extremes, torch.stack([heads.amin(-1)[kept], heads.amax(-1)[kept]]))
    assert other.extremes.shape == (2, 4)
    assert mask_of(torch.zeros(2, 3, 4, 4)) is None


def test_tokens_are_found_in_every_operand() -> None:
    table = sites("vit")
    axis = {site.id: token_axis(site, table) for site in table.profile("matmul").activations().values()}
    assert axis["patch_embed.proj/conv.input"] == 1
    assert axis["blocks.0.attn/softmax.output"] is None
    assert axis["blocks.0.attn/matmul.a"] == -1
    assert axis["blocks.0.attn/matmul.b"] == -2
    assert axis["blocks.0.attn/matmul#2.b"] == -1
    assert axis["blocks.0.mlp.fc1/linear.input"] == -1
    # The dimension of a head, of either product.
    for site_id in ("blocks.0.attn/matmul.a", "blocks.0.attn/matmul.b", "blocks.0.attn/matmul#2.b"):
        assert table[site_id].shape[axis[site_id]] == 8  # type: ignore[index]


@pytest.mark.parametrize("precision", ["W8A6", "W8A6-asym"])
def test_the_share_is_that_of_the_least_error_of_the_output(precision: str) -> None:
    """Every share is tried again by hand: ranges from hooks, logits from a simulation."""
    context = context_for("vit", "full", precision)
    quantized = CLIPPING.quantize(context)
    chosen = quantized.details["share"]
    candidates = shares(6)
    assert any(chosen == each for each in candidates)
    site = "blocks.1/add#2.output"
    x = activations("vit", context, "blocks.1").reshape(-1, 24)
    extremes = torch.from_numpy(np.stack([x.min(1), x.max(1)]))
    low, high = token_range(extremes, chosen, precision == "W8A6")
    found = quantized.quantizers[site]
    levels = 62 if precision == "W8A6" else 63
    assert float(found.scale) == pytest.approx((max(high, 0) - min(low, 0)) / levels, rel=1e-4)  # type: ignore[attr-defined]
    softmax = "blocks.0.attn/softmax.output"
    plain = METHODS.get("minmax")().quantize(context)
    assert torch.equal(found_scale(quantized, softmax), found_scale(plain, softmax))
    # The whole network's error at the chosen share is not above that of min-max, the share of all tokens.
    batches = [batch.inputs for batch in context.calibration]
    exactly = [logits(context.model, each).double() for each in batches]
    errors = []
    for each in (quantized, plain):
        with simulate(context.model, each.quantizers):
            outputs = [logits(context.model, batch).double() for batch in batches]
        errors.append(squared_error(outputs, exactly))
    assert errors[0] <= errors[1] * (1 + 1e-6)


def found_scale(quantized: object, site: str) -> torch.Tensor:
    return quantized.quantizers[site].scale  # type: ignore[attr-defined,no-any-return]


def test_a_token_of_outliers_is_clipped_where_that_helps() -> None:
    """One token of many with large values that the layers behind do not read: what clipping is for."""
    context = context_for("vit", "matmul", "W8A6")
    model = copy.deepcopy(context.model)
    with torch.no_grad():
        for block in model.blocks:
            block.norm2.weight[0] *= 30
            block.mlp.fc1.weight[:, 0] = 0
    context, batch = dataclasses.replace(context, model=model), inputs("vit", 8, 5)
    plain = logits(model, batch)
    quantized = CLIPPING.quantize(context)
    assert quantized.details["share"] < 1
    errors = [
        float((applied(context, each, batch) - plain).square().mean())
        for each in (quantized, METHODS.get("minmax")().quantize(context))
    ]
    assert errors[0] < errors[1]


def test_padded_logits_do_not_count() -> None:
    context, batch = context_for("opt"), inputs("opt", 4, 5)
    assert not isinstance(batch, torch.Tensor)
    (found,) = output_of(context.model, [batch], None, context.sites.known)
    mask = batch["attention_mask"].bool()
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.float(), logits(context.model, batch)[mask], rtol=1e-4, atol=1e-5)


CLIPPING_OF = {images: OutlierSuppression(images=images, migration=False) for images in (1, 12, 100)}
"""The contexts have 12 items."""


def test_few_images_are_enough_and_more_than_there_are_is_all() -> None:
    context = context_for("vit", "matmul", "W8A6")
    found = {images: CLIPPING_OF[images].quantize(context).details["share"] for images in CLIPPING_OF}
    assert found[12] == found[100]
    assert all(0.7 <= share <= 1 for share in found.values())


def test_softmax_sites_are_exempt() -> None:
    for name in ("vit", "bert", "swin"):
        table = sites(name)
        for site in table.values():
            assert (token_axis(site, table) is None) == (site.kind is SiteKind.SOFTMAX)


def test_refuses() -> None:
    for floor in (0.0, -1.0, 1.5):
        with pytest.raises(ConfigError, match="floor"):
            OutlierSuppression(floor=floor)
    with pytest.raises(ConfigError, match="images 0"):
        OutlierSuppression(images=0)
    context = context_for("vit", precision="W8A8-token")
    reason = OutlierSuppression().skip(context.sites, context.scheme)
    assert reason is not None
    assert "W8A8-token" in reason
