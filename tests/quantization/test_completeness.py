"""Every matrix product has a site and every site was seen at discovery, or the model is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quanttune.errors import QuantTuneError
from quanttune.quantization import (
    SiteHandlers,
    SiteTable,
    collect_statistics,
    discover_sites,
    observe,
    quantize,
    simulate,
)
from quanttune.quantization.statistics import StatisticsObserver
from tests.quantization.models import experts
from tests.quantization.walking import hooks

SIZE = 8


class Product(nn.Module):
    """A layer, one further product as the test writes it, and a layer."""

    def __init__(self, product: Any, part: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, 4)
        self.part = nn.Identity() if part is None else part
        self.weight = nn.Parameter(torch.randn(SIZE, SIZE))
        self.product = product

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.product(self, self.first(x)))  # type: ignore[no-any-return]


def image(x: Tensor) -> Tensor:
    return x[:, :, None, None]


class Opaque(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        return torch.ops.aten.mm(x, weight)  # type: ignore[no-any-return]


@torch.library.custom_op("quanttune_tests::project", mutates_args=())
def project(x: Tensor, weight: Tensor) -> Tensor:
    """A product that only its author can see."""
    return x @ weight


HIDDEN: dict[str, Any] = {
    "inner": lambda m, x: torch.inner(x, m.weight),
    "mv": lambda m, x: x + torch.mv(m.weight, x[0]),
    "addmv": lambda m, x: x + torch.addmv(x[0], m.weight, x[1]),
    "addmv_": lambda m, x: x + x[0].clone().addmv_(m.weight, x[1]),
    "dot": lambda m, x: x * torch.dot(x[0], x[1]),
    "multi_dot": lambda m, x: torch.linalg.multi_dot([x, m.weight, m.weight]),
    "chain_matmul": lambda m, x: torch.chain_matmul(x, m.weight, m.weight),
    "einsum": lambda m, x: torch.einsum("ij,jk", x, m.weight),
    "tensordot": lambda m, x: torch.tensordot(x, m.weight, 1),
    "addmm": lambda m, x: torch.addmm(x, x, m.weight),
    "addmm_": lambda m, x: x.clone().addmm_(x, m.weight),
    "baddbmm_": lambda m, x: x[None].clone().baddbmm_(x[None], m.weight[None])[0],
    "convolution": lambda m, x: torch.convolution(
        image(x), image(m.weight), None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1
    ).flatten(1),
    "conv3d": lambda m, x: F.conv3d(image(x)[..., None], image(m.weight)[..., None]).flatten(1),
    "conv_transpose2d": lambda m, x: F.conv_transpose2d(image(x), image(m.weight)).flatten(1),
    "bilinear": lambda m, x: F.bilinear(x, x, m.weight.expand(SIZE, SIZE, SIZE)),
    "vdot": lambda m, x: x * torch.vdot(x[0].to(torch.cfloat), x[1].to(torch.cfloat)).real,
    "cdist": lambda m, x: torch.cdist(x, m.weight),
    "mm": lambda m, x: Opaque.apply(x, m.weight),
    "project": lambda m, x: project(x, m.weight),
}
PARTS: dict[str, tuple[Any, Any]] = {
    "lstm": (lambda m, x: m.part(x[None])[0][0], lambda: nn.LSTM(SIZE, SIZE)),
    "gru": (lambda m, x: m.part(x[None])[0][0], lambda: nn.GRU(SIZE, SIZE)),
    "rnn_tanh": (lambda m, x: m.part(x[None])[0][0], lambda: nn.RNN(SIZE, SIZE)),
    "lstm_cell": (lambda m, x: m.part(x)[0], lambda: nn.LSTMCell(SIZE, SIZE)),
    "gru_cell": (lambda m, x: m.part(x), lambda: nn.GRUCell(SIZE, SIZE)),
    "multi_head_attention_forward": (
        lambda m, x: m.part(x[None], x[None], x[None])[0][0],
        lambda: nn.MultiheadAttention(SIZE, 2).train(),
    ),
}


@pytest.mark.parametrize("name", [*HIDDEN, *PARTS])
class TestHiddenProducts:
    @staticmethod
    def model(name: str) -> nn.Module:
        if name in HIDDEN:
            return Product(HIDDEN[name]).eval()
        product, part = PARTS[name]
        return Product(product, part()).eval()

    def test_are_refused_at_discovery_by_module_and_function(self, name: str) -> None:
        model, x = self.model(name), torch.randn(3, SIZE)
        with pytest.raises(QuantTuneError, match=r"module '(part)?' calls \w*" + name):
            discover_sites(model, x)
        assert hooks(model) == 0

    def test_are_refused_in_the_first_batch_of_a_simulation(self, name: str) -> None:
        # The same weights, whose other parts have the same sites.
        model, x = self.model(name), torch.randn(3, SIZE)
        plain = Product(lambda m, x: x).eval()
        found = quantize(plain, [x])
        for exact in (True, False):
            with (
                pytest.raises(QuantTuneError, match=name),
                torch.no_grad(),
                simulate(model, found.quantizers, exact=exact),
            ):
                model(x)
            assert hooks(model) == 0
        with torch.no_grad(), simulate(plain, found.quantizers):
            plain(x)


def test_a_product_hidden_by_one_path_alone_is_refused_where_that_path_is_first_taken() -> None:
    def product(model: nn.Module, x: Tensor) -> Tensor:
        return torch.inner(x, model.weight) if len(x) > 3 else x  # type: ignore[arg-type]

    model, x = Product(product).eval(), torch.randn(3, SIZE)
    found = quantize(model, [x])
    with pytest.raises(QuantTuneError, match="inner"), torch.no_grad(), simulate(model, found.quantizers):
        model(torch.randn(4, SIZE))


def test_only_the_first_batch_is_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    from quanttune.quantization.hidden import HiddenProducts

    seen: list[str] = []
    dispatch = HiddenProducts.__torch_dispatch__

    def counted(self: Any, func: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(func.__name__)
        return dispatch(self, func, *args, **kwargs)

    monkeypatch.setattr(HiddenProducts, "__torch_dispatch__", counted)
    model, x = Product(lambda m, x: x.abs()).eval(), torch.randn(3, SIZE)
    applied = quantize(model, [x]).apply(model)
    for expected in (True, False, False):
        seen.clear()
        with torch.no_grad():
            applied(x)
        assert bool(seen) is expected
    with torch.no_grad(), simulate(model, {}):
        model(x)
    assert not seen
    # A first run that failed was no search.
    with torch.no_grad(), simulate(model, applied.quantizers) as simulation:
        with pytest.raises(RuntimeError, match="shape"):
            model(torch.randn(3, SIZE + 1))
        assert simulation.unchecked
        model(x)
        assert not simulation.unchecked


def test_walks_around_each_other_search_and_leave_nothing_behind() -> None:
    model, x = Product(lambda m, x: x).eval(), torch.randn(3, SIZE)
    found = quantize(model, [x]).quantizers
    hidden = Product(HIDDEN["inner"]).eval()
    with torch.no_grad():
        with simulate(model, found) as outer, simulate(model, found) as inner:
            model(x)
        assert not outer.unchecked
        assert not inner.unchecked
        with pytest.raises(QuantTuneError, match="inner"), simulate(hidden, found), simulate(hidden, found):
            hidden(x)
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
    assert hooks(hidden) == 0


def test_a_refusal_that_the_model_catches_is_still_one() -> None:
    def product(model: nn.Module, x: Tensor) -> Tensor:
        try:
            return torch.inner(x, model.weight)  # type: ignore[arg-type]
        except Exception:
            return x

    with pytest.raises(QuantTuneError, match="inner"):
        discover_sites(Product(product), torch.randn(3, SIZE))


def test_products_of_whole_numbers_and_of_handlers_are_nobodys_business() -> None:
    def product(model: nn.Module, x: Tensor) -> Tensor:
        counts = torch.ones(2, 2, dtype=torch.int64)
        return x + torch.addmm(counts, counts, counts).sum() - torch.outer(x[0], x[0]).sum()

    model, x = Product(product).eval(), torch.randn(3, SIZE)
    sites = discover_sites(model, x)
    rotate = torch.eye(SIZE)
    with torch.no_grad():
        plain = model(x)
        with simulate(model, {"last/linear.input": lambda values: torch.einsum("ij,jk", values, rotate)}):
            torch.testing.assert_close(model(x), plain)
    assert {site.module for site in sites.values()} == {"first", "last"}


class TestOpaqueParts:
    @pytest.mark.parametrize("make", [torch.jit.script, lambda m: torch.jit.trace(m, torch.randn(2, SIZE))])
    def test_of_torchscript_are_refused(self, make: Any) -> None:
        model = nn.Sequential(nn.Linear(SIZE, SIZE), make(nn.Linear(SIZE, SIZE)))
        with pytest.raises(QuantTuneError, match="'1' was made by TorchScript"):
            discover_sites(model, torch.randn(2, SIZE))
        assert len(model[0]._forward_hooks) + len(model[0]._forward_pre_hooks) == 0

    def test_a_scripted_function_is_looked_into(self) -> None:
        @torch.jit.script
        def scripted(x: Tensor, weight: Tensor) -> Tensor:
            return torch.mm(x, weight)

        with pytest.raises(QuantTuneError, match="calls mm"):
            discover_sites(Product(lambda m, x: scripted(x, m.weight)), torch.randn(2, SIZE))

    def test_that_are_compiled_are_refused(self) -> None:
        model = nn.Sequential(nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE))
        model[1].compile(backend="eager")
        for each, name in ((model, "1"), (torch.compile(model[:1], backend="eager"), "")):
            for use in (
                lambda m: discover_sites(m, torch.randn(2, SIZE)),
                lambda m: SiteHandlers(m, {}).__enter__(),
            ):
                with pytest.raises(
                    QuantTuneError, match=rf"module '{name}' .* is compiled.*before torch.compile"
                ):
                    use(each)

    def test_a_compiled_function_is_refused_or_walked(self) -> None:
        compiled = torch.compile(lambda x, weight: torch.relu(x @ weight), backend="eager")
        model = Product(lambda m, x: compiled(x, m.weight))
        try:
            found = str(list(discover_sites(model, torch.randn(2, SIZE))))
        except QuantTuneError as error:
            found = str(error)
        assert "/matmul.a" in found or "module '' calls a compiled function" in found
        assert hooks(model) == 0

    def test_flex_attention_is_refused(self) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=40,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=32,
            pad_token_id=0,
        )
        model = LlamaForCausalLM._from_config(config, attn_implementation="flex_attention").eval()
        with pytest.raises(QuantTuneError, match=r"self_attn' calls (flex_attention|a compiled function)"):
            discover_sites(model, {"input_ids": torch.randint(1, 40, (2, 9))})
        assert hooks(model) == hooks(LlamaForCausalLM(config))

    @pytest.mark.parametrize("kind", ["Mixtral", "GptOss"])
    def test_fused_experts_are_refused(self, kind: str) -> None:
        model = experts(kind, "grouped_mm")
        with pytest.raises(QuantTuneError, match=r"mlp.experts' calls _?grouped_mm"):
            discover_sites(model, {"input_ids": torch.randint(1, 40, (2, 9))})


class Experts(nn.Module):
    """Tokens go to one expert of three by their first feature."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(SIZE, SIZE) for _ in range(3))
        self.head = nn.Linear(SIZE, 4)

    def forward(self, x: Tensor) -> Tensor:
        chosen = x[:, 0].clamp(0, 2).long()
        result = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            mine = chosen == number
            if mine.any() or self.training:
                result[mine] = expert(x[mine])
        return self.head(result)  # type: ignore[no-any-return]


def tokens(*experts: int) -> Tensor:
    x = torch.randn(len(experts), SIZE, generator=torch.Generator().manual_seed(0))
    x[:, 0] = torch.tensor(experts) + 0.5
    return x


class TestSitesThatDiscoveryDidNotSee:
    def test_are_an_error_in_calibration(self) -> None:
        model = Experts().eval()
        sites = discover_sites(model, tokens(0, 1)).profile("full")
        collect_statistics(model, [tokens(1, 0)], sites)
        with pytest.raises(QuantTuneError, match=r"experts\.2/linear\.input was not there .*every path"):
            collect_statistics(model, [tokens(0, 1), tokens(2, 1)], sites)

    def test_are_an_error_in_simulation(self) -> None:
        model = Experts().eval()
        found = quantize(model, [tokens(0, 1)])
        applied = found.apply(model)
        again = type(found).from_state(*found.to_state()).apply(model)
        for each in (applied, again):
            with torch.no_grad():
                each(tokens(0, 1))
                with pytest.raises(QuantTuneError, match=r"experts\.2/linear\.input was not there"):
                    each(tokens(0, 1, 2))

    def test_are_nobodys_business_where_no_table_is_known(self) -> None:
        model = Experts().eval()
        sites = discover_sites(model, tokens(0, 1))
        assert sites.profile("matmul").weights().known == sites.known == frozenset(sites)
        assert SiteTable(sites.values()).known is None
        observer = StatisticsObserver()
        observe(model, [tokens(0, 1, 2)], {"head/linear.input": observer})
        assert observer.statistics.batches == 1


class TestExpertsWithoutTokens:
    class All(Experts):
        """Every expert is called, with no token if need be."""

        def forward(self, x: Tensor) -> Tensor:
            result, chosen = torch.zeros_like(x), x[:, 0].clamp(0, 2).long()
            for number, expert in enumerate(self.experts):
                result[chosen == number] = F.gelu(expert(x[chosen == number]))
            return self.head(result)  # type: ignore[no-any-return]

    def test_add_nothing_in_calibration(self) -> None:
        model = self.All().eval()
        sites = discover_sites(model, tokens(0, 1, 2)).profile("full")
        alone = collect_statistics(model, [tokens(0, 1, 2)], sites)
        both = collect_statistics(model, [tokens(0, 1, 2), tokens(0)], sites)
        name = "/gelu#3.output"
        assert (alone[name].low, alone[name].high) == (both[name].low, both[name].high)

    def test_in_all_batches_are_refused_by_site(self) -> None:
        model = self.All().eval()
        sites = discover_sites(model, tokens(0, 1, 2)).profile("full")
        with pytest.raises(QuantTuneError, match=r"site experts\.1/linear\.input held no value"):
            collect_statistics(model, [tokens(0), tokens(0, 2)], sites)

    def test_have_no_outliers(self) -> None:
        from quanttune import OutlierLoss, OutlierLossConfig

        model = self.All()
        with OutlierLoss(
            model, tokens(0, 1, 2), 4, OutlierLossConfig(threshold=1.2, branch_threshold=1.2)
        ) as outliers:
            for batch in (tokens(0, 1, 2), tokens(0), tokens(0, 2)):
                (model(batch).sum() + outliers.penalty()).backward()
                outliers.step()
        assert all(torch.isfinite(each.grad).all() for each in model.parameters() if each.grad is not None)

    @pytest.mark.parametrize("precision", ["W8A8", "W8A8-asym", "W8A8-token", "W4g4A8", "W4"])
    @pytest.mark.parametrize("exact", [True, False])
    def test_compute_nothing_in_simulation(self, precision: str, exact: bool) -> None:
        model = self.All().eval()
        found = quantize(model, [tokens(0, 1, 2)], precision)
        with torch.no_grad(), simulate(model, found.quantizers, exact=exact):
            whole = model(tokens(0, 1, 2))
            torch.testing.assert_close(model(tokens(0, 1, 2)[:1]), whole[:1])


def test_all_off_is_the_models_own_kernel() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True).eval()
    x, padded = torch.randn(4, 6, 32), torch.zeros(4, 6, dtype=torch.bool)
    padded[1, 4:] = True
    with torch.no_grad():
        plain = model(x, src_key_padding_mask=padded)
        with simulate(model, {}):
            assert torch.equal(model(x, src_key_padding_mask=padded), plain)
    with pytest.raises(QuantTuneError, match="multi_head_attention_forward"):
        discover_sites(copy.deepcopy(model), x)
