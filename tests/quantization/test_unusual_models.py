"""Models that write in place, take one item, merge on ``eval()``, or are called from several threads."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from quanttune.errors import QuantTuneError
from quanttune.inputs import in_evaluation
from quanttune.quantization import UniformQuantizer, collect_statistics, discover_sites, quantize, simulate
from tests.quantization.models import build, inputs, logits
from tests.quantization.models import quantizers as quantizers_of


class Padding(nn.Module):
    """Leaves padding out of a layer and puts its results back."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, values: Tensor, mask: Tensor) -> Tensor:
        padded = torch.zeros(values.shape)
        padded[mask] = self.first(values[mask])
        return self.last(padded)  # type: ignore[no-any-return]


def test_what_is_written_by_index_is_seen_in_calibration() -> None:
    """Found: it was written to a copy, and the range of the padded tensor was zero."""
    torch.manual_seed(0)
    model, values, mask = Padding().eval(), torch.randn(3, 5, 8), torch.rand(3, 5) < 0.7
    batch = {"values": values, "mask": mask}
    sites = discover_sites(model, batch).profile("matmul")
    found = collect_statistics(model, [batch], sites)["last/linear.input"]
    assert float(found.high) == pytest.approx(float(model.first(values[mask]).max()), rel=1e-5)
    quantized = quantize(model, [batch], profile="matmul").apply(model)
    with torch.no_grad():
        exact, made = model(**batch), quantized(**batch)
    assert float((made - exact).norm()) < 0.05 * float(exact.norm())


class Writing(nn.Module):
    """A product whose left operand is written to after a layer made it, in one of three ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.q, self.k, self.way = nn.Linear(8, 8), nn.Linear(8, 8), way

    def forward(self, values: Tensor) -> Tensor:
        q, k = self.q(values), self.k(values)
        if self.way == "index":
            q[..., :4] = torch.sin(q[..., :4])
        elif self.way == "view":
            q[..., :4].sin_()
        else:
            q = torch.cat([torch.sin(q[..., :4]), q[..., 4:]], dim=-1)
        return torch.matmul(q, k.transpose(-1, -2))


@pytest.mark.parametrize("way", ["index", "view", "anew"])
def test_what_is_written_through_a_view_is_another_tensor(way: str) -> None:
    """Found: the product's operand passed for the layer's output and stayed in float."""
    torch.manual_seed(0)
    sites = discover_sites(Writing(way).eval(), torch.randn(2, 5, 8))
    assert sites["/matmul.a"].source is None
    assert "/matmul.a" in sites.profile("full")
    assert sites["/matmul.b"].source == "k/linear.output"


@pytest.mark.parametrize(("layer", "shape"), [(nn.Conv1d, (3, 8)), (nn.Conv2d, (3, 8, 8))])
def test_a_convolution_of_one_item(layer: Any, shape: tuple[int, ...]) -> None:
    """Found: steps and bias were laid along the first dimension behind a batch that was not there."""

    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = layer(3, 8, 3, padding=1)

        def forward(self, values: Tensor) -> Tensor:
            return torch.stack([self.conv(item) for item in values.unbind()])

    torch.manual_seed(0)
    model, values = One().eval(), torch.randn(2, *shape)
    with torch.no_grad():
        model.conv.weight.mul_(torch.logspace(-1, 1, 8).view(-1, *[1] * len(shape)))
        exact = model(values)
        made = quantize(model, [values]).apply(model)(values)
    assert float((made - exact).norm()) < 0.05 * float(exact.norm())


class Merging(nn.Linear):
    """An adapter that ``eval()`` adds to the weight and ``train()`` takes out again."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.adapter, self.merged = nn.Parameter(torch.ones(4, 4)), False

    def train(self, mode: bool = True) -> Merging:
        super().train(mode)
        if mode == self.merged:
            self.weight.data += -self.adapter if mode else self.adapter
            self.merged = not mode
        return self


def test_a_module_that_merges_is_taken_apart_again() -> None:
    model = nn.Sequential(Merging(), nn.Dropout(), Merging())
    model[1].eval()
    with in_evaluation(model):
        assert model[0].merged
        assert not model.training
    assert [module.training for module in model] == [True, False, True]
    assert not any(module.merged for module in (model[0], model[2]))


def test_a_module_may_have_a_slash_in_its_name() -> None:
    torch.manual_seed(0)

    class Tasks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.ModuleDict({"glue/sst2": nn.Linear(4, 2)})

        def forward(self, values: Tensor) -> Tensor:
            return self.heads["glue/sst2"](values)  # type: ignore[no-any-return]

    model, values = Tasks().eval(), torch.randn(3, 4)
    quantized = quantize(model, [values], profile="matmul")
    assert "heads.glue/sst2/linear.weight" in quantized.quantizers
    with torch.no_grad():
        assert not torch.equal(quantized.apply(model)(values), model(values))


def test_threads_take_turns() -> None:
    """Found: two at a time mixed up their sites, sometimes without an error."""
    model = quantize(build("vit"), [inputs("vit", 4)]).apply(build("vit"))
    assert isinstance(copy.deepcopy(model), type(model))
    batches = [inputs("vit", 2, seed) for seed in range(4)]
    with torch.no_grad():
        wanted = [logits(model, batch) for batch in batches]
    found: dict[int, Tensor] = {}

    def work(number: int) -> None:
        with torch.no_grad():
            found[number] = logits(model, batches[number])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[number], each) for number, each in enumerate(wanted))


def test_compiling_a_quantized_model_is_refused() -> None:
    """Found: what was compiled was the float model."""
    model = quantize(build("vit"), [inputs("vit", 4)]).apply(build("vit"))
    with pytest.raises(QuantTuneError, match="compiled"), torch.no_grad():
        torch.compile(model, backend="eager")(inputs("vit", 2))


class Masked(nn.Module):
    """Scores masked by the smallest number of their own type, as many models of transformers do."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.query, self.way = nn.Linear(8, 8), way

    def forward(self, values: Tensor, mask: Tensor) -> Tensor:
        query = self.query(values)
        scores = query @ query.transpose(1, 2)
        least = torch.finfo(scores.dtype).min
        if self.way == "product":
            scores = scores + (1 - mask[:, None].float()) * least
        elif self.way == "fill":
            scores = scores + torch.zeros(mask.shape).masked_fill(mask == 0, least)[:, None]
        else:
            scores = scores.masked_fill(mask[:, None] == 0, least)
        return scores.softmax(-1) @ query


@pytest.mark.parametrize("way", ["product", "fill", "masked_fill"])
def test_masks_of_the_smallest_number_of_a_type(way: str) -> None:
    """Found: calibration computes in float64, whose smallest number float32 does not hold."""
    torch.manual_seed(0)
    model = Masked(way).eval()
    batch = {"values": torch.randn(2, 5, 8), "mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])}
    with torch.no_grad():
        exact, made = model(**batch), quantize(model, [batch]).apply(model)(**batch)
    assert float((made - exact).norm()) < 0.1 * float(exact.norm())


class Threaded(nn.Module):
    """Runs one of its layers in a thread."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        with ThreadPoolExecutor(1) as threads:
            other = threads.submit(self.b, x)
            return self.head(self.a(x) * other.result())


def test_a_part_in_a_thread_is_refused() -> None:
    with pytest.raises(QuantTuneError, match="module 'b' runs in another thread than the model around it"):
        discover_sites(Threaded().eval(), torch.randn(4, 5, 8))


class Biased(nn.Module):
    """Adds a vector to every token, and then tokens to tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(8, 8), nn.Linear(8, 2)
        self.vector = nn.Parameter(torch.full((1, 1, 8), 50.0))
        self.register_buffer("offset", torch.full((1, 8), -50.0))

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.vector + self.offset
        return self.head(y + self.first(y))  # type: ignore[no-any-return]


def test_a_single_token_has_the_sites_of_many() -> None:
    model, x = Biased().eval(), torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(0))
    assert set(discover_sites(model, x)) == set(discover_sites(model, x[:, :1]))
    quantizers = quantize(model, [x]).quantizers
    with torch.no_grad(), simulate(model, quantizers):
        assert torch.equal(model(x)[:, :1], model(x[:, :1]))


@pytest.mark.parametrize("name", ["vit", "bert", "opt", "llama"])
@pytest.mark.parametrize("scheme", ["W8A8", "W5A5-token"])
def test_inference_mode_changes_nothing(name: str, scheme: str) -> None:
    model, batch = build(name), inputs(name, 8)
    applied = quantize(model, [inputs(name, 2, 1)], scheme).apply(model)
    expected = logits(applied, batch)
    with torch.inference_mode():
        assert torch.equal(logits(applied, batch), expected)
        assert torch.is_inference_mode_enabled()


def test_inference_mode_ends_where_the_model_fails() -> None:
    class Failing(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("on purpose")

    model = Failing(2, 2)
    with torch.inference_mode():
        with pytest.raises(RuntimeError, match="on purpose"), simulate(model, {}, exact=True):
            model(torch.zeros(1, 2))
        assert torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()


def gpt_2() -> nn.Module:
    """Its layers keep their weights inputs first, and multiply by ``addmm``."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=None, eos_token_id=None
    )
    return transformers.GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("profile", ["full", "matmul"])
@pytest.mark.parametrize("scheme", ["W8A8", "W4g4A8"])
def test_layers_with_inputs_first_are_linear_layers(profile: str, scheme: str) -> None:
    model, ids = gpt_2(), torch.randint(0, 40, (3, 9), generator=torch.Generator().manual_seed(0))
    usual = copy.deepcopy(model)
    for path, module in list(usual.named_modules()):
        if type(module).__name__ == "Conv1D":
            layer = nn.Linear(*module.weight.shape)
            layer.weight.data, layer.bias.data = module.weight.data.mT.contiguous(), module.bias.data
            usual.set_submodule(path, layer)
    found = [quantize(each, [{"input_ids": ids}], scheme, profile=profile) for each in (model, usual)]
    assert set(found[0].quantizers) == set(found[1].quantizers)
    answers = [
        logits(one.apply(each), {"input_ids": ids}) for one, each in zip(found, (model, usual), strict=True)
    ]
    assert torch.equal(*answers)
    assert not torch.equal(answers[0], logits(model, {"input_ids": ids}))


@pytest.mark.parametrize(
    "multiply",
    [
        lambda layer, x: torch.addmm(layer.bias, x, layer.weight.mT, alpha=2),
        lambda layer, x: torch.addmm(x @ x.mT, x, x.mT),
    ],
    ids=["factor", "sum of two"],
)
def test_other_sums_of_a_product_are_refused(multiply: Any) -> None:
    class Odd(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return multiply(self, x)  # type: ignore[no-any-return]

    with pytest.raises(
        QuantTuneError, match="calls addmm of something else than a vector, tokens and a weight"
    ):
        discover_sites(Odd(8, 8), torch.randn(4, 8))


@pytest.mark.parametrize("call", ["forward", "forward_features"])
def test_the_forward_of_a_model_is_not_its_call(call: str) -> None:
    """Its parts would be quantized, and what it computes itself would stay in float."""
    model, batch = build("vit"), inputs("vit")
    with (
        pytest.raises(
            QuantTuneError, match=r"1 of 34 .* e\.g\. at /add\.output; .* call model\(\.\.\.\) and not"
        ),
        torch.no_grad(),
        simulate(model, quantizers_of("vit")),
    ):
        getattr(model, call)(batch)


def test_nor_is_that_of_a_model_of_one_part() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    made = {
        "0/linear.input": UniformQuantizer.symmetric(1.0, 8),
        "/add.output": UniformQuantizer.symmetric(1.0, 8),
    }
    with pytest.raises(QuantTuneError, match=r"1 of 2 .* e\.g\. at /add"), simulate(model, made):
        model.forward(torch.zeros(1, 4))
