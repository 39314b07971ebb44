"""Every change of weights against NumPy, written out."""

from __future__ import annotations

import numpy as np
import timm
import torch

from tests.rotation.rotating import arrays, both, drawn, identity, in_float64, loaded, rotated


def same(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-11)


def test_a_pre_norm_stream() -> None:
    old, new = both("vit", heads=False)
    turn = drawn("cls_token", 24, True).numpy()
    for name in ("cls_token", "pos_embed"):
        same(new[name], old[name] @ turn)
    patches = old["patch_embed.proj.weight"].reshape(24, -1)
    same(new["patch_embed.proj.weight"].reshape(24, -1), turn.T @ patches)
    same(new["patch_embed.proj.bias"], old["patch_embed.proj.bias"] @ turn)
    for norm, reader in (
        ("blocks.0.norm1", "blocks.0.attn.qkv"),
        ("blocks.1.norm2", "blocks.1.mlp.fc1"),
        ("norm", "head"),
    ):
        weight, gamma, beta = old[f"{reader}.weight"], old[f"{norm}.weight"], old[f"{norm}.bias"]
        same(new[f"{reader}.weight"], weight @ np.diag(gamma) @ turn)
        same(new[f"{reader}.bias"], old[f"{reader}.bias"] + weight @ beta)
        same(new[f"{norm}.weight"], np.ones(24))
        same(new[f"{norm}.bias"], np.zeros(24))
    for writer in ("blocks.0.attn.proj", "blocks.1.mlp.fc2"):
        same(new[f"{writer}.weight"], turn.T @ old[f"{writer}.weight"])
        same(new[f"{writer}.bias"], old[f"{writer}.bias"] @ turn)


def test_a_layer_scale_goes_into_what_it_scales() -> None:
    old, new = both("vit_layerscale", heads=False)
    turn = drawn("cls_token", 24, True).numpy()
    for scale, writer in (
        ("blocks.0.ls1.gamma", "blocks.0.attn.proj"),
        ("blocks.1.ls2.gamma", "blocks.1.mlp.fc2"),
    ):
        same(new[f"{writer}.weight"], turn.T @ np.diag(old[scale]) @ old[f"{writer}.weight"])
        same(new[f"{writer}.bias"], (old[scale] * old[f"{writer}.bias"]) @ turn)
        same(new[scale], np.ones(24))


def test_patch_merging_has_a_block_for_each_of_four_tokens() -> None:
    """The first stage stays, so what a merging reads is rotated from the second stage on."""
    torch.manual_seed(0)
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=16, patch_size=2, window_size=2, embed_dim=4,
        depths=(1, 1, 1), num_heads=(1, 1, 1), num_classes=3,
    )  # fmt: skip
    for parameter in model.parameters():
        parameter.data.add_(0.3 * torch.randn(parameter.shape))
    model, batch = in_float64(model), torch.randn(2, 3, 16, 16).double()
    found = rotated(model, batch, heads=False)
    with torch.no_grad():
        torch.testing.assert_close(loaded(model, found)(batch), model(batch), rtol=1e-9, atol=1e-9)
    old, new = arrays(model.state_dict()), arrays(found.weights)
    labels = ["layers.1.downsample.reduction.weight", "layers.2.downsample.reduction.weight"]
    assert found.streams == dict(zip(labels, (8, 16), strict=True))
    first, second = (drawn(label, width, True).numpy() for label, width in found.streams.items())
    blocks, merging = np.kron(np.eye(4), first), "layers.2.downsample"
    gamma, beta = old[f"{merging}.norm.weight"], old[f"{merging}.norm.bias"]
    same(
        new[f"{merging}.reduction.weight"],
        second.T @ old[f"{merging}.reduction.weight"] @ np.diag(gamma) @ blocks,
    )
    same(new[f"{merging}.norm.weight"], np.ones(32))
    # No bias takes up beta.
    same(new[f"{merging}.norm.bias"], (beta / gamma) @ blocks)
    # The first stage is written by a normalisation.
    same(new["layers.0.blocks.0.mlp.fc2.weight"], old["layers.0.blocks.0.mlp.fc2.weight"])
    same(new["layers.1.downsample.norm.weight"], old["layers.1.downsample.norm.weight"])


def test_an_rms_stream_takes_any_rotation() -> None:
    old, new = both("llama", heads=False)
    turn = drawn("model.embed_tokens.weight", 24, False).numpy()
    assert abs(turn.sum(axis=1) - 1).max() > 0.1
    same(new["model.embed_tokens.weight"], old["model.embed_tokens.weight"] @ turn)
    gamma = old["model.norm.weight"]
    same(new["lm_head.weight"], old["lm_head.weight"] @ np.diag(gamma) @ turn)
    layer = "model.layers.1"
    gamma = old[f"{layer}.post_attention_layernorm.weight"]
    for reader in ("gate_proj", "up_proj"):
        same(new[f"{layer}.mlp.{reader}.weight"], old[f"{layer}.mlp.{reader}.weight"] @ np.diag(gamma) @ turn)
    same(new[f"{layer}.mlp.down_proj.weight"], turn.T @ old[f"{layer}.mlp.down_proj.weight"])


def test_heads_of_a_fused_layer() -> None:
    old, new = both("vit", streams=False)
    qkv, proj = "blocks.1.attn.qkv", "blocks.1.attn.proj.weight"
    for head in range(3):
        queries, keys, values = (np.arange(8) + 8 * head + 24 * part for part in range(3))
        turn = drawn(f"values {qkv}.weight {values[0]}", 8, False).numpy()
        same(new[f"{qkv}.weight"][values], turn.T @ old[f"{qkv}.weight"][values])
        same(new[f"{qkv}.bias"][values], old[f"{qkv}.bias"][values] @ turn)
        columns = slice(8 * head, 8 * head + 8)
        same(new[proj][:, columns], old[proj][:, columns] @ turn)
        turn = drawn(f"queries {qkv}.weight {queries[0]}", 8, False).numpy()
        for rows in (queries, keys):
            same(new[f"{qkv}.weight"][rows], turn.T @ old[f"{qkv}.weight"][rows])
            same(new[f"{qkv}.bias"][rows], old[f"{qkv}.bias"][rows] @ turn)
    untouched = set(old) - {
        f"blocks.{n}.attn.{part}" for n in (0, 1) for part in ("qkv.weight", "qkv.bias", "proj.weight")
    }
    assert all(np.array_equal(new[name], old[name]) for name in untouched)


def test_heads_that_share_values() -> None:
    """Three heads of queries read one of values; the rotary embedding bars queries and keys."""
    old, new = both("llama", streams=False)
    layer = "model.layers.0.self_attn"
    for group in range(2):
        turn = drawn(f"values {layer}.v_proj.weight {4 * group}", 4, False).numpy()
        rows = slice(4 * group, 4 * group + 4)
        same(new[f"{layer}.v_proj.weight"][rows], turn.T @ old[f"{layer}.v_proj.weight"][rows])
        for head in range(3 * group, 3 * group + 3):
            columns = slice(4 * head, 4 * head + 4)
            same(new[f"{layer}.o_proj.weight"][:, columns], old[f"{layer}.o_proj.weight"][:, columns] @ turn)
    for name in ("q_proj", "k_proj"):
        same(new[f"{layer}.{name}.weight"], old[f"{layer}.{name}.weight"])


def test_the_identity_leaves_the_absorption_of_gamma_and_beta() -> None:
    old, new = both("vit", draw=identity)
    for name in old:
        module, _, part = name.rpartition(".")
        if "norm" in module:
            expected = np.full_like(old[name], part == "weight")
        elif module.endswith(("qkv", "fc1")) or module == "head":
            block = module.rsplit(".", 2)[0]
            norm = {"qkv": f"{block}.norm1", "fc1": f"{block}.norm2"}.get(module.rpartition(".")[2], "norm")
            gamma, beta = old[f"{norm}.weight"], old[f"{norm}.bias"]
            expected = old[name] * gamma if part == "weight" else old[name] + old[f"{module}.weight"] @ beta
        else:
            expected = old[name]
        same(new[name], expected)
