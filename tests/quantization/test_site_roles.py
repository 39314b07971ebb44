"""What each site is to the network, and which tensors each profile quantizes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quanttune.errors import UnknownNameError
from quanttune.inputs import call_model
from quanttune.quantization import PROFILES, SiteHandlers, SiteKind, SiteTable, discover_sites
from tests.quantization.models import EAGER, FUSED, MODELS, build, inputs, sites

every_model = pytest.mark.parametrize("name", MODELS)
each_attention = pytest.mark.parametrize("attention", [EAGER, FUSED])

LOGITS = {
    "deit_distilled": ["head/linear.output", "head_dist/linear.output"],
    "swin": ["head.fc/linear.output"],
    "bert": ["classifier/linear.output"],
    "opt": ["lm_head/linear.output"],
    "opt_post_norm": ["lm_head/linear.output"],
    "llama": ["lm_head/linear.output"],
}
EMBEDDING_SUMS = {
    "bert": ["bert.embeddings/add#2.output"],
    "opt": ["model.decoder/add.output"],
    "opt_post_norm": ["model.decoder/add.output"],
    "llama": [],  # positions are rotations inside the attention
    "swin": [],  # positions are a bias on the attention scores
}


def ids(table: SiteTable, *kinds: SiteKind) -> list[str]:
    return [site.id for site in table.values() if site.kind in kinds]


@every_model
@each_attention
def test_logits_stay_in_float(name: str, attention: str) -> None:
    table = sites(name, attention)
    for site_id in LOGITS.get(name, ["head/linear.output"]):
        assert table[site_id].kind is SiteKind.LOGITS
        assert site_id not in table.profile("full")
        assert f"{site_id.rpartition('.')[0]}.weight" in table.profile("matmul")


@every_model
@each_attention
def test_what_feeds_an_activation_function_stays_in_float(name: str, attention: str) -> None:
    table = sites(name, attention)
    activations = ids(table, SiteKind.ACTIVATION)
    assert len(activations) == MODELS[name].blocks + (name == "bert")  # BERT pools through a tanh
    before = {"llama": "gate_proj", "bert": "intermediate.dense"}.get(name, "fc1")
    left = [
        site.id
        for site in table.values()
        if site.kind is SiteKind.PRE_ACTIVATION and site.operand == "output" and f"{before}/" in site.id
    ]
    assert len(left) == MODELS[name].blocks
    assert all(site_id.endswith("linear.output") for site_id in left)


@every_model
@each_attention
def test_each_block_has_two_residual_sums(name: str, attention: str) -> None:
    assert len(ids(sites(name, attention), SiteKind.RESIDUAL_SUM)) == 2 * MODELS[name].blocks


@every_model
@each_attention
def test_the_embedding_sum_is_found_once(name: str, attention: str) -> None:
    expected = EMBEDDING_SUMS.get(name, ["/add.output"])
    assert ids(sites(name, attention), SiteKind.EMBEDDING_SUM) == expected


@every_model
@each_attention
def test_each_block_has_one_attention(name: str, attention: str) -> None:
    table, blocks = sites(name, attention), MODELS[name].blocks
    assert len(ids(table, SiteKind.SOFTMAX)) == blocks
    assert len(ids(table, SiteKind.ATTENTION_OUTPUT)) == blocks
    assert len(ids(table, SiteKind.MATMUL_INPUT)) == 4 * blocks
    scores = [site for site in table.values() if site.id.endswith("/matmul.output")]
    assert len(scores) == blocks
    assert {site.kind for site in scores} == {SiteKind.SCORES}


@every_model
@each_attention
def test_profiles_hold_the_kinds_they_promise(name: str, attention: str) -> None:
    table = sites(name, attention)
    matmul = Counter(site.kind for site in table.profile("matmul").values())
    full = Counter(site.kind for site in table.profile("full").values())
    assert set(matmul) == {
        SiteKind.WEIGHT,
        SiteKind.LINEAR_INPUT,
        SiteKind.MATMUL_INPUT,
        SiteKind.SOFTMAX,
    }
    every = Counter(site.kind for site in table.values())
    for kind in (SiteKind.WEIGHT, SiteKind.LINEAR_INPUT, SiteKind.SOFTMAX):
        assert matmul[kind] == every[kind]
    assert matmul[SiteKind.MATMUL_INPUT] == every[SiteKind.MATMUL_INPUT] - every[SiteKind.SOFTMAX]
    for kind in (
        SiteKind.WEIGHT,
        SiteKind.SOFTMAX,
        SiteKind.NORM,
        SiteKind.ACTIVATION,
        SiteKind.LINEAR_OUTPUT,
        SiteKind.ATTENTION_OUTPUT,
        SiteKind.EMBEDDING_SUM,
        SiteKind.RESIDUAL_SUM,
    ):
        assert full[kind] == every[kind]
    left_in_float = (
        SiteKind.SCORES,
        SiteKind.SOFTMAX_INPUT,
        SiteKind.LOGITS,
        SiteKind.PRE_ACTIVATION,
        SiteKind.NORM_INPUT,
        SiteKind.PARTIAL_SUM,
        SiteKind.ROTATED,
        SiteKind.MASK,
        SiteKind.FREE_SOFTMAX,
    )
    assert not {*full, *matmul}.intersection(left_in_float)
    assert {*full, *left_in_float} | set(matmul) >= set(every)


@every_model
@each_attention
@pytest.mark.parametrize("profile", PROFILES)
def test_every_operand_is_rounded_exactly_once(name: str, attention: str, profile: str) -> None:
    """Each tensor on its way from one arithmetic operation to a matrix product meets one quantizer.

    A quantizer leaves a fingerprint: it replaces every value by one constant of its own. What a product then
    sees must be the fingerprint of exactly the site that the profile names, its own or its source's.
    """
    model, table = build(name, attention), sites(name, attention)
    chosen = table.profile(profile).activations()
    constants = {site_id: 2.0 + index for index, site_id in enumerate(chosen)}
    seen: dict[str, list[float]] = {}

    def handler(site_id: str) -> Any:
        def handle(values: Tensor) -> Tensor:
            if site_id in constants:
                values = torch.full_like(values, constants[site_id])
            if table[site_id].kind in (SiteKind.LINEAR_INPUT, SiteKind.MATMUL_INPUT):
                seen[site_id] = values.unique().tolist()
            return values

        return handle

    with torch.no_grad(), SiteHandlers(model, {site_id: handler(site_id) for site_id in table.activations()}):
        call_model(model, inputs(name))
    products = [site for site in table.values() if site.id in seen]
    assert len(products) == len(seen) > 0
    for site in products:
        responsible = site.id if site.id in chosen else site.source
        assert responsible in chosen
        assert (site.id in chosen) is (site.source not in chosen)
        values = [value for value in seen[site.id] if value != 0]  # zeros come from padding a window
        if site.source in chosen and site.kind is SiteKind.MATMUL_INPUT:
            # On the way a query may be scaled by a constant, which moves no rounding.
            assert len(values) == 1
            assert values[0] / constants[responsible] <= 1.0
        else:
            assert values == [constants[responsible]]


def test_weights_name_their_parameter_and_shape() -> None:
    for name in MODELS:
        parameters = dict(build(name).named_parameters())
        weights = sites(name).weights()
        assert len(weights) > 0
        for site in weights.values():
            assert site.parameter is not None
            assert site.shape == tuple(parameters[site.parameter].shape)


def test_tied_weights_share_one_parameter() -> None:
    model = build("opt")
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight
    assert sites("opt")["lm_head/linear.weight"].parameter == "model.decoder.embed_tokens.weight"


def test_shapes_leave_out_the_batch() -> None:
    small = discover_sites(build("vit"), inputs("vit", 1))
    large = discover_sites(build("vit"), inputs("vit", 7))
    assert [site.shape for site in small.values()] == [site.shape for site in large.values()]
    assert small["blocks.0.attn/softmax.output"].shape == (3, 5, 5)


def test_layer_scale_leaves_the_linear_output_and_the_sum_as_sites() -> None:
    table = sites("vit_layerscale").profile("full")
    assert table["blocks.0.attn.proj/linear.output"].kind is SiteKind.LINEAR_OUTPUT
    assert table["blocks.0/add.output"].kind is SiteKind.RESIDUAL_SUM
    # The mean over tokens makes new numbers, so the head's input is a site of its own.
    assert "fc_norm/layer_norm.output" in table


def test_swin_keeps_position_bias_and_mask_in_float() -> None:
    for attention in (EAGER, FUSED):
        table = sites("swin", attention)
        biases = [site for site in table.values() if "attn/add" in site.id]
        assert biases
        assert {site.kind for site in biases} <= {SiteKind.SCORES, SiteKind.MASK}
        merging = table["layers.1.downsample.reduction/linear.input"]
        assert merging.source == "layers.1.downsample.norm/layer_norm.output"


def test_grouped_key_heads_are_quantized_before_they_are_repeated() -> None:
    for attention in (EAGER, FUSED):
        table = sites("llama", attention)
        assert (
            table["model.layers.0.self_attn/matmul#2.b"].source
            == "model.layers.0.self_attn.v_proj/linear.output"
        )
        for rotation in ("add", "add#2"):
            assert table[f"model.layers.0.self_attn/{rotation}.output"].kind is SiteKind.ROTATED
        for operand in ("a", "b"):
            assert f"model.layers.0.self_attn/matmul.{operand}" in table.profile("full")


def test_a_bias_buffer_of_positions_makes_an_embedding_sum() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("positions", torch.randn(5, 4))
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x) + self.positions
            return self.last(x + self.first(x))

    table = discover_sites(Fixed().eval(), torch.randn(2, 5, 4))
    assert ids(table, SiteKind.EMBEDDING_SUM) == ["/add.output"]
    assert ids(table, SiteKind.RESIDUAL_SUM) == ["/add#2.output"]
    assert list(discover_sites(Fixed().eval(), torch.randn(1, 5, 4))) == list(table)


class TestSiteTable:
    table = sites("vit")

    def test_is_a_mapping_in_execution_order(self) -> None:
        assert next(iter(self.table)) == "patch_embed.proj/conv.input"
        assert list(self.table)[-1] == "head/linear.output"
        assert len(self.table) == len(list(self.table))
        assert "blocks.0/add.output" in self.table
        assert self.table.get("blocks.0/add.output") is self.table["blocks.0/add.output"]
        assert self.table.get("nothing") is None
        assert self.table.get("nothing", 3) == 3

    def test_unknown_site_is_named_with_a_hint(self) -> None:
        with pytest.raises(
            UnknownNameError, match=r"unknown site 'blocks.0/ad.output'; did you mean .*blocks.0/add"
        ):
            self.table["blocks.0/ad.output"]

    def test_unknown_profile_is_named_with_a_hint(self) -> None:
        with pytest.raises(UnknownNameError, match="unknown profile 'ful'; did you mean full"):
            self.table.profile("ful")

    def test_splits_into_weights_and_activations(self) -> None:
        weights, activations = self.table.weights(), self.table.activations()
        assert len(weights) + len(activations) == len(self.table)
        assert set(weights).isdisjoint(activations)

    def test_rows_are_plain_json(self) -> None:
        import json

        rows = json.loads(json.dumps(self.table.to_rows()))
        assert len(rows) == len(self.table)
        row = next(row for row in rows if row["id"] == "blocks.0.attn.qkv/linear.weight")
        assert row["kind"] == "weight"
        assert row["shape"] == [72, 24]
        assert row["parameter"] == "blocks.0.attn.qkv.weight"

    def test_operation_joins_the_operands_of_one_product(self) -> None:
        operands = ("a", "b", "output")
        operations = {str(self.table[f"blocks.0.attn/matmul#2.{operand}"].call) for operand in operands}
        assert operations == {"blocks.0.attn/matmul#2"}
