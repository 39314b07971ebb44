"""What is true of every model's sites: off changes nothing, the list is fixed, every site matters."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from quanttune.inputs import call_model, logits_of
from quanttune.quantization import SiteHandlers, discover_sites, simulate
from tests.quantization.models import (
    EAGER,
    FUSED,
    MODELS,
    SIZE,
    TEXT,
    build,
    inputs,
    logits,
    quantizers,
    sites,
)
from tests.quantization.walking import Recorder

every_model = pytest.mark.parametrize("name", MODELS)
each_attention = pytest.mark.parametrize("attention", [EAGER, FUSED])


def described(table: Any) -> list[tuple[Any, ...]]:
    return [(site.id, site.kind, site.parameter, site.source) for site in table.values()]


@every_model
@each_attention
def test_all_off_is_bit_identical(name: str, attention: str) -> None:
    model, batch = build(name, attention), inputs(name, 3)
    plain = logits(model, batch)
    with simulate(model, {}):
        assert torch.equal(logits(model, batch), plain)
    assert torch.equal(logits(model, batch), plain)


@every_model
@each_attention
def test_watching_every_site_changes_only_the_kernel_of_attention(name: str, attention: str) -> None:
    model, batch = build(name, attention), inputs(name, 3)
    plain = logits(model, batch)
    with (
        torch.no_grad(),
        SiteHandlers(model, {site_id: lambda values: values for site_id in sites(name, attention)}),
    ):
        watched = logits_of(call_model(model, batch))
    if attention == EAGER:
        assert torch.equal(watched, plain)
    torch.testing.assert_close(watched, plain, rtol=1e-4, atol=1e-5)


@every_model
@each_attention
def test_discovery_finds_the_same_sites_for_every_batch(name: str, attention: str) -> None:
    model = build(name, attention)
    expected = described(sites(name, attention))
    for items, size in ((1, SIZE), (2, SIZE), (5, SIZE), (1, 3), (3, 12)):
        assert described(discover_sites(model, inputs(name, items, seed=items, size=size))) == expected


@every_model
@each_attention
def test_every_walk_reaches_the_same_sites_for_every_batch(name: str, attention: str) -> None:
    model = build(name, attention)
    walks = []
    for items, size in ((2, SIZE), (1, SIZE), (5, SIZE), (1, 3), (3, 12)):
        with torch.no_grad(), Recorder(model) as recorder:
            call_model(model, inputs(name, items, seed=items, size=size))
        assert len(set(recorder.seen)) == len(recorder.seen)
        walks.append(recorder.seen)
    assert all(walk == walks[0] for walk in walks)


@pytest.mark.parametrize("name", TEXT)
@each_attention
def test_masks_do_not_change_the_site_list(name: str, attention: str) -> None:
    model, expected = build(name, attention), described(sites(name, attention))
    padded = dict(inputs(name))
    whole = padded | {"attention_mask": torch.ones_like(padded["attention_mask"])}
    without = {"input_ids": padded["input_ids"]}
    left = MODELS[name].inputs(4, 5, SIZE, padding="left")  # type: ignore[call-arg]
    for batch in (whole, without, left):
        assert described(discover_sites(model, batch)) == expected


@every_model
@each_attention
@pytest.mark.parametrize("profile", ["full", "matmul"])
def test_every_quantizer_of_a_profile_changes_the_output(name: str, attention: str, profile: str) -> None:
    model, batch = build(name, attention), inputs(name, 2, seed=1)
    plain = logits(model, batch)
    without_effect = []
    for site_id, quantizer in quantizers(name, attention, profile, "W3A3").items():
        with simulate(model, {site_id: quantizer}):
            if torch.equal(logits(model, batch), plain):
                without_effect.append(site_id)
    assert without_effect == []


@pytest.mark.parametrize("name", [name for name in MODELS if name != "swin"])
def test_eager_and_fused_attention_have_the_same_sites(name: str) -> None:
    assert described(sites(name, EAGER)) == described(sites(name, FUSED))


def test_swin_has_the_same_kinds_of_site_with_eager_and_fused_attention() -> None:
    # Its eager softmax is a module of its own, so that the path of this one operation differs.
    def counts(attention: str, profile: str) -> dict[str, int]:
        kinds = [str(site.kind) for site in sites("swin", attention).profile(profile).values()]
        return {kind: kinds.count(kind) for kind in kinds}

    for profile in ("full", "matmul"):
        assert counts(EAGER, profile) == counts(FUSED, profile)


@every_model
@pytest.mark.parametrize("profile", ["full", "matmul"])
@pytest.mark.parametrize("precision", ["W8A8", "W16A16-int"])
def test_eager_and_fused_attention_agree_when_quantized(name: str, profile: str, precision: str) -> None:
    batch = inputs(name, 4, seed=3)
    eager, fused = build(name, EAGER), build(name, FUSED)
    with simulate(eager, quantizers(name, EAGER, profile, precision)):
        expected = logits(eager, batch)
    with simulate(fused, quantizers(name, FUSED, profile, precision)):
        found = logits(fused, batch)
    # The kernels differ in the last bits, which now and then moves a value to the next level.
    step = 3e-2 if precision == "W8A8" else 3e-4
    assert float((found - expected).abs().max()) <= step * float(expected.abs().max())
    error = float((expected - logits(eager, batch)).abs().max())
    assert error > 0


@every_model
@each_attention
def test_more_bits_mean_less_error(name: str, attention: str) -> None:
    # On what was calibrated with: beyond a range no width helps.
    model, batch = build(name, attention), inputs(name, 3, 2)
    plain = logits(model, batch)
    errors = []
    for precision in ("W4A4", "W8A8", "W12A12"):
        with simulate(model, quantizers(name, attention, "full", precision)):
            errors.append(float((logits(model, batch) - plain).square().mean()))
    assert errors[0] > errors[1] > errors[2] > 0
    assert errors[2] < 1e-3 * float(plain.square().mean())
