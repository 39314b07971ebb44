"""DINOv2 backbones to timm's tensor names, from timm's own checkpoint or from an ONNX graph.

The ONNX graph has Hugging Face names. Its matrix weights are unnamed and stored transposed; the ``MatMul``
that uses one feeds an ``Add`` whose bias carries the name. Query, key and value become timm's ``qkv``. All
tensors are float32; the position embedding keeps its native size (class token and 37 x 37 patches), and the
model entry resamples it. DINOv2's ``mask_token`` plays no part in a forward pass, is absent from timm's model
and is left out.

Checked once against ONNX Runtime on the graph itself at 224 x 224: with the graph's own resampling of the
position embedding, timm's ``forward_features`` differs by at most 1.4e-5 where the features reach 8.5.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from quanttune.errors import AssetError

if TYPE_CHECKING:
    from onnx import GraphProto
    from torch import Tensor

_CLASS_POSITION, _PATCH_POSITION = "onnx::Concat_1957", "onnx::Reshape_1962"
_PREFIX = "backbone."
_PLAIN = {
    "embeddings.cls_token": "cls_token",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}
_IN_BLOCK = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attention.output.dense": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def from_timm(files: dict[str, Path]) -> dict[str, Tensor]:
    """Read timm's checkpoint ``model.safetensors``; names are already right."""
    from safetensors.torch import load_file

    tensors = load_file(files["model.safetensors"])
    return {name: tensor.float().contiguous() for name, tensor in tensors.items() if name != "mask_token"}


def from_onnx(files: dict[str, Path]) -> dict[str, Tensor]:
    """Read the backbone of ``vit_s_focus.onnx``.

    Raises:
        AssetError: If the graph lacks a tensor the backbone needs.
    """
    import onnx

    model = onnx.load(files["vit_s_focus.onnx"])
    named = _backbone_tensors(model.graph)
    try:
        return _to_timm(named)
    except KeyError as error:
        raise AssetError(
            f"{files['vit_s_focus.onnx']} has no tensor {error}; it is not the expected backbone"
        ) from error


def _backbone_tensors(graph: GraphProto) -> dict[str, Tensor]:
    """Tensors under Hugging Face names without the prefix, weights as in ``nn.Linear``: ``(out, in)``."""
    import numpy as np
    import torch
    from onnx import numpy_helper

    values = {item.name: numpy_helper.to_array(item).astype(np.float32) for item in graph.initializer}
    additions = {name: node for node in graph.node if node.op_type == "Add" for name in node.input}
    named = {name.removeprefix(_PREFIX): value for name, value in values.items() if name.startswith(_PREFIX)}
    for node in graph.node:
        if node.op_type != "MatMul" or node.input[1] not in values:
            continue
        addition = additions[node.output[0]]
        bias = next(name for name in addition.input if name in values)
        if bias.startswith(_PREFIX):
            named[bias.removeprefix(_PREFIX).removesuffix("bias") + "weight"] = values[node.input[1]].T
    named["position"] = np.concatenate([values[_CLASS_POSITION], values[_PATCH_POSITION]], axis=1)
    return {name: torch.from_numpy(np.array(value, copy=True)) for name, value in named.items()}


def _to_timm(named: dict[str, Tensor]) -> dict[str, Tensor]:
    import torch

    tensors = {target: named[source] for source, target in _PLAIN.items()}
    tensors["pos_embed"] = named["position"]
    depth = 1 + max(int(name.split(".")[2]) for name in named if name.startswith("encoder.layer."))
    for block in range(depth):
        source, target = f"encoder.layer.{block}.", f"blocks.{block}."
        for kind in ("weight", "bias"):
            parts = [
                named[f"{source}attention.attention.{part}.{kind}"] for part in ("query", "key", "value")
            ]
            tensors[f"{target}attn.qkv.{kind}"] = torch.cat(parts)
            for old, new in _IN_BLOCK.items():
                tensors[f"{target}{new}.{kind}"] = named[f"{source}{old}.{kind}"]
        for scale in ("1", "2"):
            tensors[f"{target}ls{scale}.gamma"] = named[f"{source}layer_scale{scale}.lambda1"]
    return {name: tensor.contiguous() for name, tensor in tensors.items()}
