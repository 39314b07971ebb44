"""A parameter in a matrix product is a weight: its bits, its rule, its channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from baselines.searching.products import find_products
from quanttune.errors import ConfigError, QuantTuneError
from quanttune.quantization import SiteKind, discover_sites, quantize
from tests.quantization.models import experts

IN, OUT, ITEMS = 6, 5, 4


class Projection(nn.Module):
    """A product with a parameter of the given shape, as the test writes it."""

    def __init__(self, shape: tuple[int, ...], product: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.norm, self.weight = nn.LayerNorm(IN), nn.Parameter(torch.randn(shape, generator=generator))
        self.product = product

    def forward(self, x: Tensor) -> Tensor:
        return self.product(self.norm(x), self.weight)


def rounded(weight: Tensor, axis: int, bits: int = 4) -> Tensor:
    """Min-max, symmetric, one range for every index of ``axis``, from the definition."""
    others = [each for each in range(weight.dim()) if each != axis % weight.dim()]
    top = 2 ** (bits - 1) - 1
    step = weight.detach().abs().amax(dim=others, keepdim=True) / top
    return (weight.detach() / step).round().clamp(-top, top) * step


# Shape of the parameter, the product, the operand, the axis of the channels in the parameter.
FORMS: dict[str, tuple[tuple[int, ...], Callable[[Tensor, Tensor], Tensor], str, int]] = {
    "operator": ((IN, OUT), lambda x, w: x @ w, "b", -1),
    "by name": ((IN, OUT), lambda x, w: torch.matmul(other=w, input=x), "b", -1),
    "reversed": ((IN, OUT), lambda x, w: w.__rmatmul__(x), "b", -1),
    "turned": ((OUT, IN), lambda x, w: x @ w.T, "b", 0),
    "turned by name": ((OUT, IN), lambda x, w: x.matmul(w.transpose(-1, -2)), "b", 0),
    "reshaped": ((IN * OUT,), lambda x, w: x @ w.view(IN, OUT), "b", -1),
    "first": ((OUT, 3), lambda x, w: w @ x, "a", 0),
    "experts": ((ITEMS, IN, OUT), torch.bmm, "b", -1),
    "experts turned": ((ITEMS, OUT, IN), lambda x, w: torch.bmm(x, w.mT), "b", 1),
    "one for all": ((IN, OUT), lambda x, w: torch.bmm(x, w.expand(len(x), IN, OUT)), "b", -1),
    "vector": ((IN,), lambda x, w: x @ w, "b", 0),
}


@pytest.mark.parametrize("name", FORMS)
class TestEveryForm:
    def test_has_weight_bits_and_channels(self, name: str) -> None:
        shape, product, operand, _ = FORMS[name]
        model, x = Projection(shape, product).eval(), torch.randn(ITEMS, 3, IN)
        found = quantize(model, [x], "W4A8", profile="matmul")
        site = discover_sites(model, x)[f"/matmul.{operand}"]
        assert site.kind is SiteKind.WEIGHT
        assert site.parameter == "weight"
        quantizer = found.quantizers[site.id]
        assert quantizer.code_max == 7
        expected = {"vector": 1, "first": OUT}.get(name, OUT)
        assert quantizer.scale.numel() == expected

    def test_computes_with_the_rounded_weight(self, name: str) -> None:
        shape, product, operand, axis = FORMS[name]
        model, x = Projection(shape, product).eval(), torch.randn(ITEMS, 3, IN)
        weight = model.weight.view(IN, OUT) if name == "reshaped" else model.weight
        if name == "vector":
            weight, axis = weight[None], 0
        right = rounded(weight, axis).view(shape)
        found = quantize(model, [x], "W4")
        assert set(found.quantizers) == {f"/matmul.{operand}"}
        with torch.no_grad():
            torch.testing.assert_close(
                found.apply(model)(x), product(model.norm(x), right), rtol=1e-3, atol=1e-3
            )
            again = type(found).from_state(*found.to_state()).apply(model)
            assert torch.equal(again(x), found.apply(model)(x))
            assert again(x).shape == model(x).shape

    def test_is_for_min_max_and_not_for_a_search(self, name: str) -> None:
        shape, product, _, _ = FORMS[name]
        model, x = Projection(shape, product).eval(), torch.randn(ITEMS, 3, IN)
        assert find_products(model, discover_sites(model, x)) == []


def test_a_tied_head_is_a_weight_and_its_output_the_logits() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.body = nn.Embedding(9, IN), nn.Linear(IN, IN)

        def forward(self, ids: Tensor) -> Tensor:
            return self.body(self.embedding(ids)) @ self.embedding.weight.T  # type: ignore[no-any-return]

    sites = discover_sites(Model(), torch.arange(6).view(2, 3))
    assert sites["/matmul.b"].parameter == "embedding.weight"
    assert sites["/matmul.output"].kind is SiteKind.LOGITS
    assert sites["/matmul.a"].source == "body/linear.output"


def test_what_a_weight_makes_is_a_linear_output_unless_a_softmax_reads_it() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.keys = nn.Parameter(torch.randn(IN, IN)), nn.Parameter(torch.randn(7, IN))

        def forward(self, x: Tensor) -> Tensor:
            return ((x @ self.weight) @ self.keys.T).softmax(-1) @ self.keys

    sites = discover_sites(Model(), torch.randn(2, 3, IN))
    kinds = [sites[f"/matmul{number}.output"].kind for number in ("", "#2", "#3")]
    assert kinds == [SiteKind.LINEAR_OUTPUT, SiteKind.SCORES, SiteKind.LOGITS]
    assert sites["/softmax.output"].kind is SiteKind.SOFTMAX


@pytest.mark.parametrize("part", [lambda w, x: w[int(x[0, 0, 0] > 0)], lambda w, x: w.unbind()[1]])
def test_a_part_of_a_parameter_is_refused(part: Any) -> None:
    model = Projection((2, IN, OUT), lambda x, w: x @ part(w, x))
    with pytest.raises(QuantTuneError, match=r"module '' multiplies by a part of parameter weight"):
        discover_sites(model, torch.randn(ITEMS, 3, IN))


@pytest.mark.parametrize("kind", ["Mixtral", "GptOss"])
def test_experts_that_are_parts_of_a_parameter_are_refused(kind: str) -> None:
    made = experts(kind, "eager")
    with pytest.raises(
        QuantTuneError, match=r"mlp\.experts.* part of (a )?parameter|mlp\.experts.*a part of one"
    ):
        quantize(made, [{"input_ids": torch.randint(1, 40, (2, 9))}])


def test_a_buffer_beside_parameters_in_one_mapped_file_is_no_parameter() -> None:
    class Mapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            storage = torch.randn(2 * IN * OUT)
            self.weight = nn.Parameter(storage[: IN * OUT].view(IN, OUT))
            self.register_buffer("basis", storage[IN * OUT :].view(OUT, IN))

        def forward(self, x: Tensor) -> Tensor:
            return (x @ self.weight).relu() @ self.basis  # type: ignore[no-any-return]

    sites = discover_sites(Mapped(), torch.randn(ITEMS, 3, IN))
    assert sites["/matmul.b"].kind is SiteKind.WEIGHT
    assert sites["/matmul#2.b"].kind is SiteKind.MATMUL_INPUT


def test_groups_of_what_has_its_outputs_last_are_refused() -> None:
    model = Projection((IN, OUT), lambda x, w: x @ w)
    with pytest.raises(ConfigError, match=r"site /matmul\.b: groups run along the inputs .* nn\.Linear"):
        quantize(model, [torch.randn(ITEMS, 3, IN)], "W4g2A8")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("precision", ["W8A8", "W8tA8", "W4g4A8", "W4"])
def test_a_weight_that_is_not_finite_is_named(value: float, precision: str) -> None:
    from quanttune.quantization import RANGE_RULES, Scheme, build_quantizers, collect_statistics

    model, x, scheme = (
        nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)).eval(),
        torch.randn(3, 8),
        Scheme.parse(precision),
    )
    sites = scheme.sites(discover_sites(model, x))
    statistics = collect_statistics(model, [x], sites)
    model[1].weight.data[2, 2] = value
    with pytest.raises(QuantTuneError, match=r"1/linear\.weight: parameter 1\.weight is NaN or infinite"):
        build_quantizers(model, sites, statistics, scheme, RANGE_RULES.get("minmax"))
