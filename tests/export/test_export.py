"""The exported file: what is in it, and that its codes are the simulation's."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from quanttune.errors import ConfigError
from quanttune.export.agreement import code_agreement, runtime_codes
from quanttune.export.graph import SITE_KEY
from quanttune.export.runtime import feed_of, kernels, open_session
from quanttune.quantization import Quantized, Scheme
from quanttune.quantization.quantizers import UniformQuantizer
from quanttune.quantization.quantizers.twin import TwinSoftmaxQuantizer
from tests.export.exporting import exported, quantized
from tests.quantization import models

CASES = [
    ("vit", "full", "W8A8"),
    ("vit", "matmul", "W6A6"),
    ("bert", "full", "W6A6"),
    ("opt", "matmul", "W7A7"),
    ("swin", "full", "W7A7"),
]


@pytest.mark.parametrize(("name", "profile", "precision"), CASES)
def test_the_codes_are_those_of_the_simulation(name: str, profile: str, precision: str) -> None:
    found, path = exported(name, profile, precision)
    batch = models.inputs(name, 5, seed=9, size=12)
    # What is quantized is quantized alike, to the last code.
    for site_id, site in runtime_codes(path, batch).items():
        values = torch.from_numpy(site.values.reshape(site.codes.shape))
        own = found.quantizers[site_id].encode(values)
        assert own is not None
        codes = own.codes.numpy()
        if name == "opt" and site_id.endswith("fc2/linear.input"):
            codes = np.maximum(codes, 0)  # the activation function is part of the clip
        assert np.array_equal(codes, site.codes), site_id
    # What is computed in between differs by the rounding of biases: by one code, of one in four hundred.
    compared = code_agreement(path, found, models.build(name, models.FUSED), batch)
    assert set(compared) == {key for key in found.quantizers if _is_activation(key, path)}
    assert max(each.largest for each in compared.values()) <= 1
    number, different = (
        sum(getattr(each, of) for each in compared.values()) for of in ("number", "different")
    )
    assert different <= number / 400
    # Where the simulation rounds them too, hardly any is left.
    led = code_agreement(path, found, models.build(name, models.FUSED), batch, biases=True)
    assert sum(each.different for each in led.values()) <= different / 10


def _is_activation(site_id: str, path: Path) -> bool:
    return f"{site_id}.codes" not in _initializers(path) and f"{site_id}.codes.T" not in _initializers(path)


def _initializers(path: Path) -> dict[str, np.ndarray]:
    return {each.name: onnx.numpy_helper.to_array(each) for each in onnx.load(path).graph.initializer}


@pytest.mark.parametrize(("name", "profile", "precision"), CASES)
def test_every_product_is_computed_on_integers(name: str, profile: str, precision: str) -> None:
    found = kernels(exported(name, profile, precision)[1])
    products = {site.rpartition(".")[0] for site in quantized(name, profile, precision).quantizers}
    matrix = [call for call in products if call.rpartition("/")[2].partition("#")[0] in ("linear", "matmul")]
    # A convolution needs a quantized result: profile matmul leaves it in float.
    assert found.integers >= len(matrix) - 4 * (name == "swin")
    assert found.floats <= (name == "vit" and profile == "matmul") + 4 * (name == "swin")


def test_batch_and_tokens_are_free() -> None:
    for name, items, size in (("vit", 1, 0), ("bert", 3, 7), ("bert", 1, 20)):
        found, path = exported(name, *CASES[0 if name == "vit" else 2][1:])
        batch = models.inputs(name, items, seed=3, size=size or models.SIZE)
        session = open_session(path)
        (logits,) = session.run(None, feed_of(session, batch))
        expected = models.logits(found.apply(models.build(name, models.FUSED)), batch)
        assert logits.shape == tuple(expected.shape)
        assert np.abs(logits - expected.numpy()).max() < 0.1 * np.abs(expected.numpy()).max()


@pytest.mark.parametrize("name", ["vit", "bert", "opt"])
def test_between_layers_everything_has_two_dimensions(name: str) -> None:
    """What is left of Reshapes opens heads of attention and closes them, or stands at an end."""
    _, path = exported(name, "full", "W8A8")
    graph = onnx.load(path).graph
    counts = Counter(node.op_type for node in graph.node)
    blocks = counts["Softmax"]
    assert counts["Gemm"] >= 4 * blocks
    assert counts["Reshape"] <= 5 * blocks + 8
    made = {name: node for node in graph.node for name in node.output}
    joined = [node for node in graph.node if node.op_type == "LayerNormalization"]
    assert sum(made[node.input[0]].op_type == "Reshape" for node in joined if node.input[0] in made) <= 1


def test_a_row_without_a_token_gives_numbers() -> None:
    _, path = exported("bert", "full", "W6A6")
    batch = models.inputs("bert", 2)
    assert isinstance(batch, dict)
    batch["attention_mask"] = torch.zeros_like(batch["attention_mask"])
    session = open_session(path)
    assert np.isfinite(session.run(None, feed_of(session, batch))[0]).all()


def test_weights_are_the_quantizers_codes_in_either_container() -> None:
    found, signed = exported("vit", "full", "W8A8")
    _, unsigned = exported("vit", "full", "W8A8", "uint8")
    first, second = _initializers(signed), _initializers(unsigned)
    site_id = "blocks.0.mlp.fc1/linear.weight"
    weight = dict(models.build("vit", models.FUSED).named_parameters())["blocks.0.mlp.fc1.weight"]
    own = found.quantizers[site_id].encode(weight.detach())
    assert own is not None
    codes = first[f"{site_id}.codes.T"]
    assert codes.dtype == np.int8
    assert np.array_equal(codes, own.codes.numpy().T)
    shifted = second[f"{site_id}.codes.T"]
    assert shifted.dtype == np.uint8
    assert np.array_equal(shifted.astype(int) - 128, codes)
    session, other = open_session(signed), open_session(unsigned)
    batch = models.inputs("vit", 3, seed=5)
    assert np.array_equal(
        session.run(None, feed_of(session, batch))[0], other.run(None, feed_of(other, batch))[0]
    )


def test_the_file_says_what_it_is_and_not_where_it_was_made() -> None:
    found, path = exported("bert", "full", "W6A6")
    model = onnx.load(path)
    said = {prop.key: prop.value for prop in model.metadata_props}
    assert said["quanttune.scheme"] == "W6A6"
    assert said["quanttune.profile"] == "full"
    assert said["quanttune.quantizers"] == found.quantizers_digest()
    sites = {prop.value for node in model.graph.node for prop in node.metadata_props if prop.key == SITE_KEY}
    assert sites == set(found.quantizers)
    assert b"/quanttune/" not in path.read_bytes()
    assert b".py" not in path.read_bytes()
    assert [axis.dim_param for axis in model.graph.input[0].type.tensor_type.shape.dim] == ["batch", "tokens"]


def test_factors_of_channels_are_folded_away() -> None:
    from quanttune.quantization import ScaledPair, build_quantizers, collect_statistics
    from quanttune.quantization.ranges import RANGE_RULES

    model, table = models.build("vit", models.FUSED), models.sites("vit", models.FUSED)
    scheme = Scheme.parse("W8A8", "full")
    chosen = scheme.sites(table)
    factors = torch.linspace(0.5, 2.0, 24)
    pair = ScaledPair.at(table, ["blocks.0.norm1/layer_norm.output"], factors)
    batches = [models.inputs("vit", 2, 1)]
    statistics = collect_statistics(model, batches, chosen, transforms=[pair])
    quantizers = build_quantizers(model, chosen, statistics, scheme, RANGE_RULES.get("minmax"), [pair])
    found = Quantized(quantizers, scheme=scheme, transforms=(pair,), known=table.known)
    path = Path(exported("vit", "full", "W8A8")[1]).with_name("scaled.onnx")
    found.to_onnx(path, model, models.inputs("vit"))
    assert not [node for node in onnx.load(path).graph.node if node.op_type in ("Div", "Mul")]
    compared = code_agreement(path, found, model, models.inputs("vit", 5, seed=9))
    assert max(each.largest for each in compared.values()) <= 1


def test_what_onnx_cannot_express_is_refused_by_name(tmp_path: Path) -> None:
    found = quantized("vit", "full", "W8A8")
    twin = TwinSoftmaxQuantizer(0.125, 8)
    channels = UniformQuantizer.symmetric(torch.ones(24), 8, axis=2)
    wide = UniformQuantizer.symmetric(1.0, 12)
    for site_id, other, words in (
        ("blocks.0.attn/softmax.output", twin, twin.kind),
        ("blocks.0.norm1/layer_norm.output", channels, "a range for each channel"),
        ("blocks.0.norm1/layer_norm.output", wide, "which no byte holds"),
    ):
        changed = Quantized({**found.quantizers, site_id: other}, scheme=found.scheme)
        with pytest.raises(ConfigError, match=words):
            changed.to_onnx(tmp_path / "no.onnx", models.build("vit", models.FUSED), models.inputs("vit"))
    assert not list(tmp_path.iterdir())


def test_arguments_are_checked_first(tmp_path: Path) -> None:
    found, model = quantized("vit", "full", "W8A8"), models.build("vit", models.FUSED)
    with pytest.raises(ConfigError, match="int8 or uint8"):
        found.to_onnx(tmp_path / "a.onnx", model, models.inputs("vit"), weights="int4")
    with pytest.raises(ConfigError, match="no folder"):
        found.to_onnx(tmp_path / "absent" / "a.onnx", model, models.inputs("vit"))
