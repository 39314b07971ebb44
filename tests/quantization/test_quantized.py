"""Quantized models as values: applied, kept, reopened to the bit, refused when damaged."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from quanttune.errors import AssetError, ConfigError, QuantTuneError, UnknownNameError
from quanttune.quantization import (
    QUANTIZERS,
    Quantized,
    Quantizer,
    ScaledPair,
    Scheme,
    State,
    UniformQuantizer,
    quantize,
    simulate,
)
from quanttune.quantization.quantized import DOCUMENT, QUANTIZERS_FILE, WEIGHTS_FILE
from quanttune.quantization.quantizers import (
    DynamicQuantizer,
    GroupQuantizer,
    ScaledQuantizer,
    quantizer_from_state,
)
from quanttune.quantization.quantizers.adaptive_log import AdaptiveLogQuantizer
from quanttune.quantization.quantizers.log2 import EXPONENTIALS, IntegerSoftmaxQuantizer, Log2Quantizer
from quanttune.quantization.quantizers.log_sqrt2 import LogSqrt2Quantizer
from quanttune.quantization.quantizers.noisy import NoisyQuantizer
from quanttune.quantization.quantizers.powers_of_two import shifted_quantizer
from quanttune.quantization.quantizers.twin import TwinGeluQuantizer, TwinSoftmaxQuantizer
from tests.quantization.models import build, inputs, logits

WEIGHT = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
PROBABILITIES = torch.softmax(3 * WEIGHT, dim=-1)
UNEVEN = UniformQuantizer.asymmetric(-1.0, 1 / 3, 6)

QUANTIZERS_OF_EVERY_KIND: dict[str, list[Quantizer]] = {
    "uniform": [
        UniformQuantizer.symmetric(0.1, 8),
        UNEVEN,
        UniformQuantizer.symmetric(WEIGHT.abs().amax(1), 4, 0),
        shifted_quantizer(UNEVEN, torch.arange(8) % 4, 1),
    ],
    "grouped": [
        GroupQuantizer.of_weight(WEIGHT, 4, 3),
        GroupQuantizer.of_weight(WEIGHT, 4, 8, symmetric=False),
    ],
    "dynamic": [DynamicQuantizer(8), DynamicQuantizer(4, (-2,), symmetric=False)],
    "log2": [Log2Quantizer(4)],
    "integer_softmax": [IntegerSoftmaxQuantizer(4, 0.1, form) for form in EXPONENTIALS],
    "twin_softmax": [TwinSoftmaxQuantizer(1 / 3, 6)],
    "twin_gelu": [TwinGeluQuantizer(1 / 7, 6)],
    "log_sqrt2": [LogSqrt2Quantizer(4, 0.7)],
    "scaled": [ScaledQuantizer(UNEVEN, torch.linspace(-3, 2, 8))],
    "noisy": [NoisyQuantizer(UNEVEN, torch.linspace(-0.02, 0.01, 8))],
    "adaptive_log": [AdaptiveLogQuantizer(1 / 3, 20, 4), AdaptiveLogQuantizer(1.5, 41, 8, 0.17)],
}


@pytest.mark.parametrize("kind", QUANTIZERS.names())
def test_no_quantizer_makes_a_number_of_what_is_none(kind: str) -> None:
    """A broken model must show as one, whatever its tensors are rounded to."""
    values = (PROBABILITIES if "softmax" in kind or kind.startswith("log") else WEIGHT).clone()
    values[2, 3] = float("nan")
    for quantizer in QUANTIZERS_OF_EVERY_KIND[kind]:
        for given in (values, values.clone().requires_grad_()):
            found = quantizer(given).detach()
            assert found[2, 3].isnan(), quantizer
            # a range found at run time may be of a row or of a column
            assert not found[:2, :3].isnan().any(), quantizer


@pytest.mark.parametrize("kind", QUANTIZERS.names())
def test_every_quantizer_is_made_again_from_its_state_to_the_bit(kind: str) -> None:
    values = PROBABILITIES if "softmax" in kind or kind.startswith("log") else WEIGHT
    for quantizer in QUANTIZERS_OF_EVERY_KIND[kind]:
        state = quantizer.state()
        assert state.kind == kind
        kept = State(
            kind, json.loads(json.dumps(state.settings)), {k: t.clone() for k, t in state.tensors.items()}
        )
        again = quantizer_from_state(kept)
        assert type(again) is type(quantizer)
        assert torch.equal(again(values), quantizer(values))
        assert repr(again) == repr(quantizer)


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(UnknownNameError, match="unknown quantizer 'unifrom'; did you mean uniform"):
        quantizer_from_state(State("unifrom"))


@pytest.mark.parametrize("scheme", ["W8A8", "W8tA8-asym", "W4g8A8", "W8A8-token", "W4"])
@pytest.mark.parametrize("name", ["vit", "bert"])
def test_a_saved_model_gives_the_same_logits_to_the_bit(name: str, scheme: str, tmp_path: Path) -> None:
    model, batch = build(name), inputs(name, 3)
    quantized = quantize(model, [inputs(name, 4, 1)], scheme, profile="full", rule="mse")
    before = logits(quantized.apply(model), batch)
    again = Quantized.load(quantized.save(tmp_path / "model"))
    assert again.scheme == Scheme.parse(scheme)
    assert torch.equal(logits(again.apply(model), batch), before)
    assert not torch.equal(before, logits(model, batch))


def test_an_applied_model_is_a_copy_that_computes_as_simulation_does() -> None:
    model, batch = build("vit"), inputs("vit", 3)
    plain = logits(model, batch)
    quantized = quantize(model, [batch], "W6A6")
    applied = quantized.apply(model)
    with simulate(model, quantized.quantizers):
        expected = logits(model, batch)
    for _ in range(2):
        assert torch.equal(logits(applied, batch), expected)
    assert torch.equal(logits(model, batch), plain)
    assert isinstance(applied, nn.Module)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in applied.modules())


def test_weights_travel_with_the_model(tmp_path: Path) -> None:
    model, batch = build("vit"), inputs("vit", 2)
    changed = {
        name: tensor * 1.5 if tensor.is_floating_point() else tensor
        for name, tensor in model.state_dict().items()
    }
    quantized = Quantized({}, weights=changed)
    again = Quantized.load(quantized.save(tmp_path))
    applied = again.apply(model)
    assert torch.equal(applied.model.state_dict()["head.weight"], changed["head.weight"])
    assert not torch.equal(logits(applied, batch), logits(model, batch))


def test_weights_of_another_model_are_refused() -> None:
    with pytest.raises(ConfigError, match="are not those of a VisionTransformer"):
        Quantized({}, weights=dict(nn.Linear(2, 2).state_dict())).apply(build("vit"))


def test_ranges_are_not_put_upon_other_weights(tmp_path: Path) -> None:
    """Found: a model before its fine-tuning took the ranges of the one after it, and nothing said so."""
    model = build("vit")
    other = copy.deepcopy(model)
    with torch.no_grad():
        next(other.parameters()).add_(1.0)
    quantized = quantize(model, [inputs("vit", 2)])
    again = Quantized.load(quantized.save(tmp_path))
    assert again.reference == quantized.reference
    for each in (quantized, again):
        each.apply(copy.deepcopy(model))
        with pytest.raises(ConfigError, match="this VisionTransformer has other weights") as refused:
            each.apply(other)
        assert "\n" not in str(refused.value)
        applied = each.apply(other, other_weights=True)
        assert torch.equal(next(applied.model.parameters()), next(other.parameters()))
    # weights of its own are whole
    Quantized({}, weights=dict(other.state_dict()), reference=quantized.reference).apply(other)
    # what was kept before knows of none
    document, tensors = quantized.to_state()
    del document["reference"]
    Quantized.from_state(document, tensors).apply(other)


def edited(path: Path) -> None:
    path.write_text(path.read_text().replace("uniform", "dynamic"))


def other_numbers(path: Path) -> None:
    save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        (DOCUMENT, Path.unlink),
        (DOCUMENT, lambda path: path.write_text("{}")),
        (DOCUMENT, lambda path: path.write_text("[")),
        (DOCUMENT, edited),
        (QUANTIZERS_FILE, Path.unlink),
        (QUANTIZERS_FILE, lambda path: path.write_bytes(path.read_bytes()[:-3])),
        (WEIGHTS_FILE, lambda path: path.write_bytes(b"")),
        (WEIGHTS_FILE, other_numbers),
    ],
)
def test_what_is_damaged_is_refused_and_named(
    name: str, damage: Callable[[Path], object], tmp_path: Path
) -> None:
    model = build("vit")
    quantized = quantize(model, [inputs("vit", 2)])
    quantized.weights = dict(model.state_dict())
    quantized.save(tmp_path)
    assert Quantized.load(tmp_path)
    damage(tmp_path / name)
    with pytest.raises(AssetError, match=r"cannot read|damaged or was edited|not the file that was saved"):
        Quantized.load(tmp_path)


def test_nothing_but_safetensors_and_json_is_written(tmp_path: Path) -> None:
    quantize(build("vit"), [inputs("vit", 2)]).save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [DOCUMENT, QUANTIZERS_FILE]


def test_the_weights_have_to_be_those_of_the_document() -> None:
    document, tensors = Quantized({}, weights={"a": torch.ones(1)}).to_state()
    for weights in (None, {"a": torch.zeros(1)}):
        with pytest.raises(AssetError, match="are not those it was made with"):
            Quantized.from_state(document, tensors, weights)


def test_a_document_of_another_form_is_refused() -> None:
    document, tensors = quantize(build("vit"), [inputs("vit", 2)]).to_state()
    for wrong in ({**document, "schema": 99}, {**document, "quantizers": [1]}, {**document, "details": None}):
        with pytest.raises(QuantTuneError, match=r"schema 99|damaged"):
            Quantized.from_state(wrong, tensors)
    with pytest.raises(AssetError, match="damaged"):
        Quantized.from_state(document, {})


def test_quantizing_needs_data() -> None:
    with pytest.raises(QuantTuneError, match="the calibration set is empty"):
        quantize(build("vit"), [])


def test_the_package_is_imported_without_torch_until_something_needs_it() -> None:
    code = (
        "import sys; import quanttune.quantization; from quanttune.quantization.scheme import Scheme;"
        "from quanttune.quantization.sites import PROFILES; Scheme.parse('W4g128A8-token');"
        "assert 'torch' not in sys.modules, 'torch'; {extra}"
    )
    run = [sys.executable, "-c"]
    subprocess.run([*run, code.format(extra="")], check=True)
    # The guard can fail: whatever computes does import it.
    eager = "from quanttune.quantization import simulate; assert 'torch' not in sys.modules"
    assert subprocess.run([*run, code.format(extra=eager)], capture_output=True, check=False).returncode != 0


def test_every_public_name_is_there() -> None:
    import quanttune.quantization as package

    for name in package.__all__:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        package.nothing  # noqa: B018


def test_scaled_pairs_are_kept(tmp_path: Path) -> None:
    pair = ScaledPair(
        ("a/add.output",),
        ("b/linear.weight",),
        torch.tensor([1.0, 2.0]),
        {"c/add": "1 multiplication an element"},
    )
    again = Quantized.load(Quantized({}, transforms=(pair,)).save(tmp_path))
    (found,) = again.transforms
    assert isinstance(found, ScaledPair)
    assert found.sites == pair.sites
    assert torch.equal(found.factors, pair.factors)
    assert again.extra_operations == {"c/add": "1 multiplication an element"}


def test_a_rule_is_a_name_or_a_function() -> None:
    with pytest.raises(ConfigError, match="rule = 3: give a range rule or the name of one"):
        quantize(build("vit"), [inputs("vit", 2, 1)], "W8A8", rule=3)  # type: ignore[arg-type]
