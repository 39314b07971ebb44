"""What discovery makes of a model: outputs, sources of operands, products it cannot reach."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quanttune.errors import QuantTuneError
from quanttune.quantization import SiteHandlers, SiteKind, discover_sites, quantize, simulate
from tests.quantization.models import build, inputs, quantizers
from tests.quantization.walking import hooks, zero


class TestModelOutput:
    def test_of_transformers_keeps_its_structure(self) -> None:
        model, batch = copy.deepcopy(build("bert")), inputs("bert")  # transformers keeps hooks of its own
        with torch.no_grad(), simulate(model, quantizers("bert")):
            output = model(**batch, output_hidden_states=True)
        assert type(output).__name__ == "SequenceClassifierOutput"
        assert output.logits.shape == (2, 3)
        assert len(output.hidden_states) == 3

    def test_of_any_kind_is_read_by_the_given_function(self) -> None:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

            def forward(self, x: Tensor) -> SimpleNamespace:
                hidden = self.body(x)
                return SimpleNamespace(features=hidden, predictions=(self.head(hidden),))

        table = discover_sites(Model(), torch.randn(2, 3), logits=lambda output: output.predictions[0])
        assert table["head/linear.output"].kind is SiteKind.LOGITS
        assert table["body/linear.output"].kind is SiteKind.LINEAR_OUTPUT
        for use in (lambda m, x: discover_sites(m, x), lambda m, x: quantize(m, [x])):
            with pytest.raises(QuantTuneError, match=r"SimpleNamespace has no logits; .*logits="):
                use(Model(), torch.randn(2, 3))
        found = quantize(Model(), [torch.randn(2, 3)], logits=lambda output: output.predictions[0])
        assert "body/linear.output" in found.quantizers
        assert "head/linear.output" not in found.quantizers

    def test_without_any_known_operation_is_an_error(self) -> None:
        with pytest.raises(QuantTuneError, match=r"no linear layer.*Identity"):
            discover_sites(nn.Identity(), torch.randn(2, 3))


class TestSources:
    """What counts as the same numbers seen again, and what as new ones."""

    @staticmethod
    def source_of_second(between: Any) -> str | None:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

            def forward(self, x: Tensor) -> Tensor:
                return self.second(between(self.first(x)))

        return discover_sites(Model(), torch.randn(2, 4, 4))["second/linear.input"].source

    @pytest.mark.parametrize(
        "between",
        [
            lambda x: x,
            lambda x: x.reshape(2, 2, 2, 4).flatten(1, 2),
            lambda x: x.transpose(1, 2).contiguous().mT,
            lambda x: x.movedim(1, 0).clone(),
            lambda x: x[:, 0],
            lambda x: x.chunk(2, dim=1)[1],
            lambda x: torch.split(x, 2, dim=1)[0],
            lambda x: x.unbind(1)[2],
            lambda x: x * 0.5,
            lambda x: 0.5 * x / 3,
            lambda x: F.pad(x, (0, 0, 0, 2)),
            lambda x: torch.roll(x, 1, 1),
            lambda x: F.dropout(x, 0.5, training=False),
            lambda x: torch.cat([x.new_zeros(2, 0, 4), x], dim=1),
            lambda x: torch.cat(tensors=[x, x.new_zeros(2, 0, 4)], dim=1),
            lambda x: torch.reshape(input=x, shape=(2, 4, 4)).view(2, 4, 4),
            nn.Dropout(0.3),
            nn.Identity(),
        ],
    )
    def test_rearranged_numbers_keep_their_source(self, between: Any) -> None:
        assert self.source_of_second(between) == "first/linear.output"

    @pytest.mark.parametrize(
        "between",
        [
            lambda x: x.mean(1),
            lambda x: x.abs(),
            lambda x: x * x,
            lambda x: x * torch.arange(4.0),
            lambda x: torch.mul(input=x, other=torch.arange(4.0)),
            lambda x: x + 1.0,
            lambda x: x - x,
            lambda x: torch.cat([x, x], dim=1),
            lambda x: x.mul_(torch.arange(4.0)),
            lambda x: x.abs_(),
            lambda x: x.add_(torch.arange(4.0)),
            lambda x: x.clamp_(min=0.0),
        ],
    )
    def test_new_numbers_have_none(self, between: Any) -> None:
        assert self.source_of_second(between) is None

    def test_a_sum_in_place_is_seen_by_whoever_holds_the_tensor(self) -> None:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

            def forward(self, x: Tensor) -> Tensor:
                residual = hidden = self.body(x)
                hidden.add_(x)
                return self.head(residual)

        model, x = Model(), torch.randn(2, 3, 4)
        table = discover_sites(model, x)
        assert table["head/linear.input"].source == "/add.output"
        with SiteHandlers(model, {"/add.output": zero}):
            output = model(x)
            assert torch.equal(output, model.head.bias.expand(output.shape))
            output.sum().backward()
        assert torch.equal(model.body.weight.grad, torch.zeros(4, 4))

    def test_a_bias_added_in_place_does_not_rename_the_sum_before_it(self) -> None:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
                self.bias = nn.Parameter(torch.randn(4))

            def forward(self, x: Tensor) -> Tensor:
                hidden = x + self.body(x)
                hidden += self.bias
                return self.head(hidden)

        table = discover_sites(Model(), torch.randn(2, 3, 4))
        assert table["/add.output"].kind is SiteKind.RESIDUAL_SUM
        assert table["head/linear.input"].source is None

    def test_single_head_attention_keeps_its_profile_behind_any_mask(self) -> None:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.qkv, self.head = nn.Linear(4, 12), nn.Linear(4, 2)

            def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
                q, k, v = self.qkv(x).unsqueeze(1).chunk(3, dim=-1)
                scores = (q @ k.mT) * 0.5
                if mask is not None:
                    scores = scores + mask
                    scores = scores + mask
                return self.head((scores.softmax(-1) @ v).squeeze(1))

        x = torch.randn(2, 3, 4)
        plain = discover_sites(Model(), x)
        masked = discover_sites(Model(), {"x": x, "mask": torch.zeros(2, 1, 3, 3)})
        for profile in ("full", "matmul"):
            assert list(plain.profile(profile)) == list(masked.profile(profile))


class TestHiddenProducts:
    """A product that the walk cannot open is refused: left in float it would flatter a method."""

    @pytest.mark.parametrize(
        "product",
        [
            lambda x: torch.einsum("bij,bkj->bik", x, x),
            lambda x: torch.addmm(x[0], x[0], x[0].mT),
            lambda x: torch.baddbmm(x, x, x.mT),
            lambda x: F.conv_transpose1d(x, torch.randn(3, 2, 1)),
        ],
    )
    def test_are_refused_by_name(self, product: Any) -> None:
        class Inner(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return product(x)  # type: ignore[no-any-return]

        model = nn.Sequential(nn.Linear(3, 3), Inner())
        with pytest.raises(QuantTuneError, match=r"module '1' calls (einsum|addmm|baddbmm|conv_transpose1d)"):
            discover_sites(model, torch.randn(2, 3, 3))
        assert hooks(model) == 0

    def test_of_multi_head_attention_are_refused(self) -> None:
        layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        with pytest.raises(QuantTuneError, match=r"module 'self_attn' calls multi_head_attention_forward"):
            discover_sites(layer, torch.randn(2, 3, 4))

    def test_outside_the_model_are_nobodys_business(self) -> None:
        table = discover_sites(
            nn.Linear(3, 3), torch.randn(2, 3), logits=lambda output: torch.einsum("ij->ji", output)
        )
        assert len(table) == 3
