"""The token percentile of a network: which candidates, by which error, and what it leaves alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from baselines.method import METHODS
from baselines.token_percentile import _squared, candidates
from quanttune.errors import ConfigError
from quanttune.quantization import SiteKind, simulate
from quanttune.quantization.exact_walk import ExactHandlers
from tests.method_contexts import CountingStages, context_for
from tests.quantization.models import logits

KIND = METHODS.get("token_percentile")
NORM = "blocks.0.norm1/layer_norm.output"


def test_candidates_reach_as_far_as_the_width_needs() -> None:
    assert candidates(8) == [100.0 - step for step in range(11)]
    assert candidates(16) == candidates(8)
    assert [(candidates(bits)[-1], len(candidates(bits))) for bits in (7, 6, 5, 4, 2)] == [
        (80.0, 21),
        (70.0, 31),
        (40.0, 61),
        (10.0, 91),
        (10.0, 91),
    ]


@pytest.mark.parametrize("precision", ["W8A8", "W8A8-asym"])
def test_a_given_percentile_is_that_of_the_tokens_of_every_site_but_softmax(precision: str) -> None:
    context = context_for("vit", "full", precision)
    quantizers = KIND(p=80.0).quantize(context).quantizers
    minmax = METHODS.get("minmax")().quantize(context).quantizers
    assert list(quantizers) == list(minmax)
    for site in context.profile_sites.values():
        if site.kind in (SiteKind.SOFTMAX, SiteKind.WEIGHT):
            assert torch.equal(quantizers[site.id].scale, minmax[site.id].scale)
    seen: list[torch.Tensor] = []
    with torch.no_grad(), ExactHandlers(context.model, {NORM: lambda x: (seen.append(x), x)[1]}, wide=True):
        for batch in context.calibration:
            logits(context.model, batch.inputs)
    tokens = torch.cat([values.flatten(0, -2) for values in seen]).double().numpy()
    high = np.quantile(tokens.max(axis=1), 0.8, method="inverted_cdf")
    low = np.quantile(tokens.min(axis=1), 0.2, method="inverted_cdf")
    if precision == "W8A8":
        expected = np.quantile(np.abs(tokens).max(axis=1), 0.8, method="inverted_cdf") / 127
    else:
        expected = (high - low) / 255
    assert float(quantizers[NORM].scale) == pytest.approx(expected, rel=2e-3)
    assert float(quantizers[NORM].scale) < 0.95 * float(minmax[NORM].scale)


@pytest.mark.parametrize(("model", "precision"), [("vit", "W8A8"), ("bert", "W6A6"), ("bert", "W8A8-asym")])
def test_the_chosen_percentile_has_the_smallest_output_error(model: str, precision: str) -> None:
    context = context_for(model, "full", precision)
    quantized = KIND().quantize(context)
    errors = quantized.details["output_error"]
    tried = candidates(context.scheme.activations.bits)  # type: ignore[union-attr]
    assert [float(p) for p in errors] == tried
    chosen = quantized.details["token_percentile"]
    assert errors[f"{chosen:g}"] == min(errors.values())
    same = KIND(p=chosen).quantize(context)
    assert same.quantizers_digest() == quantized.quantizers_digest()
    assert "output_error" not in same.details
    for p in (tried[0], tried[-1], chosen):
        quantizers = KIND(p=p).quantize(context).quantizers
        error = power = 0.0
        for batch in context.calibration:
            plain = logits(context.model, batch.inputs).double()
            with simulate(context.model, quantizers):
                found = logits(context.model, batch.inputs).double()
            error += float((found - plain).square().sum())
            power += float(plain.square().sum())
        assert errors[f"{p:g}"] == pytest.approx(error / power, rel=1e-3)


def test_the_search_is_made_once_and_not_for_a_given_percentile() -> None:
    stages = CountingStages()
    for method in (KIND(), KIND(), KIND(p=95.0)):
        method.quantize(context_for("vit", stages=stages))
    assert stages.made == ["statistics", "token_percentile"]
    KIND().quantize(context_for("vit", precision="W7A7", stages=stages))
    assert stages.made == ["statistics", "token_percentile", "token_percentile"]


def test_masked_logits_do_not_count() -> None:
    left = torch.tensor([[1.0, -torch.inf, 2.0]])
    assert _squared(left, torch.tensor([[0.0, -torch.inf, 4.0]])) == 5.0


@pytest.mark.parametrize("p", [0.0, -1.0, 100.5])
def test_a_percentile_out_of_range_is_refused(p: float) -> None:
    with pytest.raises(ConfigError, match=r"token percentile .* is not above 0 and at most 100"):
        KIND(p=p)
