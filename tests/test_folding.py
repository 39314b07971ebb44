"""Factors and shifts folded into normalisations and linear layers: the function stays, on every model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from baselines.folding import Group, find_groups, fold, folded_state, has_groups
from baselines.method import METHODS, Batch, Context
from quanttune.quantization import Scheme, discover_sites
from quanttune.quantization.equivalence import refuse_untied, relative_difference
from quanttune.seeds import torch_generator
from tests.method_contexts import context_for
from tests.quantization.models import build, inputs, logits, sites

FOLDABLE = {"vit": 5, "vit_layerscale": 5, "deit_distilled": 5, "swin": 9, "opt": 4, "llama": 5, "bert": 1}
"""Tensors that take a factor: two a block, and behind the last normalisation where a layer reads that.

Swin's first normalisation and its last are read by no layer, the last layer of ``opt`` is tied to the
embedding, and all but the last tensor of ``bert`` are read by a residual, too.
"""


def drawn(group: Group, name: str) -> tuple[Tensor, Tensor]:
    """Factors between 1/8 and 8 and shifts, with float64's digits."""
    generator = torch_generator(0, name, group.site)
    factors = torch.exp2(6 * torch.rand(group.channels, generator=generator, dtype=torch.float64) - 3)
    return factors, torch.randn(group.channels, generator=generator, dtype=torch.float64)


def changes(groups: list[Group], name: str) -> list[tuple[Group, Tensor, Tensor | None]]:
    return [
        (group, factors, shift if group.takes_shift else None)
        for group in groups
        for factors, shift in [drawn(group, name)]
    ]


def with_state(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    changed = copy.deepcopy(model)
    changed.load_state_dict(state)
    return changed


@pytest.mark.parametrize("name", FOLDABLE)
def test_the_function_stays_in_either_precision(name: str) -> None:
    model, batch = build(name), inputs(name, 4, 7)
    groups = find_groups(context_for(name))
    assert sum(group.weight is not None for group in groups) == FOLDABLE[name]
    wide = copy.deepcopy(model).double()
    doubled = batch.double() if isinstance(batch, Tensor) else batch
    state = folded_state(wide, changes(groups, name))
    exact, found = logits(wide, doubled), logits(with_state(wide, state), doubled)
    assert float((found - exact).abs().max()) < 1e-9 * float(exact.abs().max())
    state = folded_state(model, changes(groups, name))
    refuse_untied(model, state)
    assert relative_difference(model, with_state(model, state), [batch]) < 1e-4
    assert not torch.equal(logits(with_state(model, state), batch), logits(model, batch))


def test_half_a_fold_is_noticed() -> None:
    """The test above can fail: what is not undone in the layers changes the logits."""
    model, batch = build("vit"), inputs("vit", 4, 7)
    group = find_groups(context_for("vit"))[0]
    factors, shift = drawn(group, "vit")
    half = fold(model.state_dict(), group, factors, shift)
    for name in half:
        state = {**model.state_dict(), **{key: each for key, each in half.items() if key != name}}
        assert relative_difference(model, with_state(model, state), [batch]) > 1e-3, name


def test_follows_its_formulas() -> None:
    model = build("opt")
    group = next(each for each in find_groups(context_for("opt")) if len(each.inputs) == 3)
    s, z = drawn(group, "opt")
    found = fold(model.state_dict(), group, s, z)
    old = {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}
    norm = "model.decoder.layers.0.self_attn_layer_norm"
    expected = {
        f"{norm}.weight": old[f"{norm}.weight"] / s.numpy(),
        f"{norm}.bias": (old[f"{norm}.bias"] - z.numpy()) / s.numpy(),
    }
    for layer in ("q_proj", "k_proj", "v_proj"):
        path = f"model.decoder.layers.0.self_attn.{layer}"
        expected[f"{path}.weight"] = old[f"{path}.weight"] * s.numpy()
        expected[f"{path}.bias"] = old[f"{path}.bias"] + old[f"{path}.weight"] @ z.numpy()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], torch.from_numpy(value).float()), name


def test_what_else_reads_the_tensor_is_told_and_takes_no_fold() -> None:
    groups = find_groups(context_for("bert"))
    assert len(groups) == 5
    # The last layer of the encoder feeds no residual.
    assert groups.pop().weight is not None
    for group in groups:
        assert group.weight is None
        assert not group.takes_shift
        assert group.scale is not None
        assert [reader.partition("/")[2] for reader in group.extra] == ["add"]
    assert len(groups[0].inputs) == 3
    *others, last = find_groups(context_for("opt_post_norm"))
    assert [group.weight for group in others] == [None] * 3
    assert last.inputs == ("model.decoder.project_out/linear.input",)


def test_a_layer_tied_to_an_embedding_takes_no_fold() -> None:
    group = find_groups(context_for("opt"))[-1]
    assert group.inputs == ("lm_head/linear.input",)
    assert group.weight is None
    assert group.extra == {}


def test_a_layer_without_a_bias_takes_no_shift() -> None:
    group = next(each for each in find_groups(context_for("swin")) if "downsample" in each.site)
    assert group.weight is not None
    assert not group.takes_shift
    state = build("swin").state_dict()
    with pytest.raises(ValueError, match="scaled pair"):
        fold(state, group, *drawn(group, "swin"))


@pytest.mark.parametrize("profile", ["full", "matmul"])
def test_inputs_of_an_rms_norm_have_a_quantizer_each(profile: str) -> None:
    """An RMS norm has no site, so each layer that reads it is quantized at its own input."""
    context = context_for("llama", profile)
    groups = find_groups(context)
    assert [len(group.inputs) for group in groups] == [3, 2, 3, 2, 1]
    for group in groups:
        assert group.carriers == group.inputs
        assert group.bias is None
        assert set(group.carriers) <= set(context.profile_sites)


@pytest.mark.parametrize(("profile", "operand"), [("full", "output"), ("matmul", "input")])
def test_carriers_are_where_the_profile_quantizes(profile: str, operand: str) -> None:
    for group in find_groups(context_for("vit", profile)):
        assert [carrier.rpartition(".")[2] for carrier in group.carriers] == [operand]


class OffsetNorm(nn.Module):
    """``(1 + weight) x``, as Gemma has it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return (1 + self.weight) * x * torch.rsqrt(x.square().mean(-1, keepdim=True))


class Shared(nn.Module):
    """One layer behind two normalisations."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.layer = nn.LayerNorm(6), nn.LayerNorm(6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(x + self.layer(self.first(x))) @ torch.eye(6) + self.layer(self.second(x))


class Offset(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rms_norm, self.layer = OffsetNorm(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.rms_norm(x)) * 1.0


def context_of(model: nn.Module) -> Context:
    batch = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    found: Any = discover_sites(model, batch)
    return Context(
        model, found, Scheme.parse("W8A8", "matmul"), [Batch(batch, torch.zeros(4, dtype=torch.long))]
    )


def test_a_norm_that_is_not_linear_in_its_weight_takes_no_fold() -> None:
    (group,) = find_groups(context_of(Offset().eval()))
    assert group.inputs == ("layer/linear.input",)
    assert group.weight is None


def test_a_layer_that_runs_twice_takes_no_fold() -> None:
    groups = find_groups(context_of(Shared().eval()))
    assert groups
    assert all(group.weight is None for group in groups)


def test_models_without_a_normalisation_have_none() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)).eval()
    assert find_groups(context_of(model)) == []
    assert has_groups(sites("vit"))
    assert has_groups(sites("llama"))


def _swin(size: int) -> Context:
    """A Swin with windows of 7 by 7 tokens, on 14 by 14 or 10 by 10 of them."""
    torch.manual_seed(0)
    model = timm.create_model(
        "swin_tiny_patch4_window7_224",
        pretrained=False,
        img_size=size,
        embed_dim=16,
        depths=(2, 2),
        num_heads=(2, 2),
        num_classes=5,
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.3)
            elif parameter.dim() > 1:
                parameter.mul_(8)
    batch = torch.randn(2, 3, size, size)
    return Context(
        model,
        discover_sites(model, batch),
        Scheme.parse("W8A8-asym", "matmul"),
        [Batch(batch, torch.zeros(2, dtype=torch.long))],
    )


@pytest.mark.parametrize(("size", "padded"), [(56, False), (40, True)])
def test_windows_that_are_filled_up_take_no_shift(size: int, padded: bool) -> None:
    """A shift would reach the zeros, which the normalisation has not made."""
    context = _swin(size)
    groups = find_groups(context)
    # the second stage has no more tokens than a window
    windows = [group for group in groups if "layers.0" in group.site and "qkv" in group.parameters[0]]
    assert len(windows) == 2
    assert all(group.padded is padded and group.takes_shift is not padded for group in windows)
    assert all(group.takes_shift for group in groups if "mlp.fc1" in group.parameters[0])
    state = folded_state(context.model, changes(groups, "swin"))
    batch = context.calibration[0].inputs
    assert relative_difference(context.model, with_state(context.model, state), [batch]) < 1e-4


@pytest.mark.parametrize("name", ["outlier_suppression_plus", "repq_vit"])
def test_methods_that_shift_keep_the_function_of_windows_that_are_filled_up(name: str) -> None:
    context = _swin(40)
    weights = METHODS.get(name)().quantize(context).weights
    assert weights is not None
    batch = context.calibration[0].inputs
    assert relative_difference(context.model, with_state(context.model, weights), [batch]) < 1e-4


class _OnePlusNorm(nn.Module):
    """A normalisation that multiplies by ``1 + weight``, as Gemma's does."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-0.1, 0.1, width))

    def forward(self, values: Tensor) -> Tensor:
        return values * torch.rsqrt(values.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


def test_a_parameter_that_is_no_factor_does_not_migrate() -> None:
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.input_norm, self.head = _OnePlusNorm(8), nn.Linear(8, 3)

        def forward(self, values: Tensor) -> Tensor:
            return self.head(self.input_norm(values))  # type: ignore[no-any-return]

    model, values = Net().eval(), torch.randn(4, 5, 8)
    context = Context(
        model,
        discover_sites(model, values),
        Scheme.parse("W8A8", "matmul"),
        [Batch(values, torch.zeros(4, dtype=torch.long))],
    )
    assert [(group.weight, group.scale) for group in find_groups(context)] == [(None, None)]
    assert METHODS.get("outlier_suppression")(clipping=False).quantize(context).transforms == ()
