"""Statistics collected from a model: each site is seen as it is, whatever the batches."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from quanttune.errors import QuantTuneError
from quanttune.quantization import (
    SiteKind,
    SiteTable,
    TensorStatistics,
    collect_statistics,
)
from quanttune.quantization.exact_walk import ExactHandlers
from tests.quantization.models import build, inputs, logits, sites
from tests.quantization.test_statistics import BIN, assert_same


class TestCollection:
    @pytest.mark.parametrize("name", ["vit", "bert", "llama"])
    def test_sees_exactly_what_each_site_holds(self, name: str) -> None:
        model, table = build(name), sites(name).profile("full").activations()
        batches = [inputs(name, 2, 1), inputs(name, 3, 2)]
        seen: dict[str, list[torch.Tensor]] = {site_id: [] for site_id in table}

        def keep(site_id: str) -> Any:
            return lambda values: (seen[site_id].append(values.clone()), values)[1]

        with ExactHandlers(model, {site_id: keep(site_id) for site_id in table}, wide=True):
            for batch in batches:
                logits(model, batch)
        collected = collect_statistics(model, batches, sites(name).profile("full"))
        assert list(collected) == list(table)
        for site_id, statistics in collected.items():
            expected = TensorStatistics()
            for values in seen[site_id]:
                expected.update(values, axis=table[site_id].channel_axis)
            assert_same(statistics, expected)
            assert statistics.batches == 2

    def test_takes_the_channels_from_the_site(self) -> None:
        """A picture has its channels first: a token is a pixel there."""
        name = "patch_embed.proj/conv.input"
        batch = inputs("vit", 3, 1)
        assert isinstance(batch, torch.Tensor)
        found = collect_statistics(build("vit"), [batch], sites("vit").profile("full"))[name]
        assert found.tokens == batch[:, 0].numel()
        assert found.token_highs.histogram(-1e3, 1e3).quantile(0.5) == pytest.approx(
            np.quantile(batch.amax(dim=1).double().numpy(), 0.5, method="inverted_cdf"), rel=BIN
        )

    @pytest.mark.parametrize("seed", [1, 2])
    def test_counts_padding_like_any_token(self, seed: int) -> None:
        batch = inputs("bert", 4, seed)
        assert not isinstance(batch, torch.Tensor)
        positions, real = batch["attention_mask"].numel(), int(batch["attention_mask"].sum())
        assert real < positions
        found = collect_statistics(build("bert"), [batch], sites("bert").profile("full"))
        assert found["bert.embeddings/add#2.output"].tokens == positions

    def test_serves_parts_that_are_merged(self) -> None:
        model, table = build("vit"), sites("vit").profile("full")
        batches = [inputs("vit", 2, seed) for seed in range(4)]
        whole = collect_statistics(model, batches, table)
        first, second = (collect_statistics(model, part, table) for part in (batches[:1], batches[1:]))
        for site_id, expected in whole.items():
            assert_same(first[site_id].merge(second[site_id]), expected)

    def test_leaves_the_model_alone_and_reports_progress(self) -> None:
        model = copy.deepcopy(build("vit"))
        state = copy.deepcopy(model.state_dict())
        done: list[int] = []
        batches = (inputs("vit", 2, seed) for seed in range(3))
        collect_statistics(model, batches, sites("vit").profile("matmul"), progress=done.append)
        assert done == [1, 2, 3]
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        assert all(not module._forward_hooks for module in model.modules())
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_of_no_batch_is_an_error(self) -> None:
        with pytest.raises(QuantTuneError, match="calibration set is empty; give at least one batch"):
            collect_statistics(build("vit"), [], sites("vit"))

    def test_of_a_broken_model_names_the_first_broken_site(self) -> None:
        model = copy.deepcopy(build("vit"))
        with torch.no_grad():
            model.blocks[1].mlp.fc1.weight[0, 0] = float("nan")
        with pytest.raises(
            QuantTuneError, match=r"site blocks\.1\.mlp\.act/gelu\.output: .*NaN or infinite; check the model"
        ):
            collect_statistics(model, [inputs("vit")], sites("vit").profile("full"))
        assert all(not module._forward_hooks for module in model.modules())

    def test_of_another_models_sites_is_an_error(self) -> None:
        site = next(site for site in sites("swin").values() if site.kind is SiteKind.RESIDUAL_SUM)
        with pytest.raises(QuantTuneError, match=f"site {site.id} was never reached"):
            collect_statistics(build("vit"), [inputs("vit")], SiteTable([site]))
