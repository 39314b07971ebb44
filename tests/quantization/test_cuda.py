"""On a GPU: the same numbers, and nothing that needs the CPU on the way."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from baselines.method import METHODS, Batch, Context
from quanttune.inputs import ModelInputs, to_device
from quanttune.quantization import (
    RANGE_RULES,
    Scheme,
    TensorStatistics,
    UniformQuantizer,
    build_quantizers,
    collect_statistics,
    discover_sites,
    exact,
    one_pass,
    simulate,
)
from quanttune.quantization.exact import LazyCodes, Operand
from quanttune.quantization.quantizers.dynamic import DynamicQuantizer
from quanttune.quantization.quantizers.grid import Encoded, Grid
from tests.method_contexts import HeldOut
from tests.quantization.models import EAGER, FUSED, MODELS, build, inputs, logits, quantizers, sites

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CUDA = torch.device("cuda")

every_model = pytest.mark.parametrize("name", MODELS)
each_attention = pytest.mark.parametrize("attention", [EAGER, FUSED])


@pytest.fixture(autouse=True)
def _exact() -> None:
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def on_cuda(name: str, attention: str) -> torch.nn.Module:
    return copy.deepcopy(build(name, attention)).to(CUDA)


def batch_on_cuda(name: str, items: int = 3, seed: int = 0) -> ModelInputs:
    return to_device(inputs(name, items, seed), CUDA)


@every_model
@each_attention
def test_all_off_is_bit_identical(name: str, attention: str) -> None:
    model, batch = on_cuda(name, attention), batch_on_cuda(name)
    plain = logits(model, batch)
    with simulate(model, {}):
        assert torch.equal(logits(model, batch), plain)


@every_model
@each_attention
def test_sites_are_those_of_the_cpu(name: str, attention: str) -> None:
    found = discover_sites(on_cuda(name, attention), batch_on_cuda(name, 2))
    assert found.to_rows() == sites(name, attention).to_rows()


@every_model
@each_attention
@pytest.mark.parametrize("scheme", ["W8A8", "W6A6", "W8A8-token"])
def test_quantized_logits_are_those_of_the_cpu(name: str, attention: str, scheme: str) -> None:
    model, batch = on_cuda(name, attention), batch_on_cuda(name, 4, 3)
    chosen = quantizers(name, attention, "full", scheme)
    with simulate(model, chosen):
        found = logits(model, batch).cpu()
    reference = build(name, attention)
    with simulate(reference, chosen):
        assert torch.equal(found, logits(reference, inputs(name, 4, 3)))


class Divided(nn.Module):
    """Divides by numbers in every form; CUDA's own division would round them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 300), nn.Linear(300, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        x = x / 3.7 + torch.div(x, 1.3) + x.divide(torch.tensor(0.7)) + x.clone().div_(11)
        x /= 7
        return self.second(x)


def test_quotients_by_a_number_are_those_of_the_cpu() -> None:
    torch.manual_seed(0)
    model, x = Divided().eval(), torch.randn(500, 16)
    table = discover_sites(model, x)
    statistics = collect_statistics(model, [x], table.profile("full"))
    chosen = build_quantizers(
        model, table.profile("full"), statistics, Scheme.parse("W8A8"), RANGE_RULES.get("minmax")
    )
    with torch.no_grad(), simulate(model, chosen):
        expected = model(x)
    with torch.no_grad(), simulate(model.to(CUDA), chosen):
        assert torch.equal(model(x.to(CUDA)).cpu(), expected)


@pytest.mark.parametrize("name", ["vit", "bert", "llama"])
def test_statistics_are_those_of_the_cpu(name: str) -> None:
    model, table = on_cuda(name, EAGER), sites(name).profile("full")
    found = collect_statistics(model, [batch_on_cuda(name, 4, 1)], table)
    expected = collect_statistics(build(name), [inputs(name, 4, 1)], table)
    for site_id, statistics in found.items():
        other = expected[site_id]
        assert statistics.count == other.count
        # But for a number that float64 brings to the middle between two of float32.
        assert statistics.low == pytest.approx(other.low, rel=2e-7)
        assert statistics.high == pytest.approx(other.high, rel=2e-7)
        assert statistics.histogram.quantile(0.99) == pytest.approx(other.histogram.quantile(0.99), rel=1e-3)
        assert statistics.std == pytest.approx(other.std, rel=1e-6)


def test_counting_is_exact() -> None:
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    found, expected = TensorStatistics(), TensorStatistics()
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        found.update(values.to(CUDA, dtype))
        expected.update(values.to(dtype))
    assert torch.equal(found.codes.cpu(), expected.codes)
    assert (found.low, found.high, found.ema_low) == (expected.low, expected.high, expected.ema_low)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 4, 8, 12])
def test_quantizers_give_the_bits_of_the_cpu(dtype: torch.dtype, bits: int) -> None:
    values = 3 * torch.randn(5, 1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    for quantizer in (
        UniformQuantizer.symmetric(2.7, bits),
        UniformQuantizer.asymmetric(-1.3, 4.1, bits),
        UniformQuantizer.symmetric(torch.tensor([0.5, 1.0, 0.0, 7.0, 3.3]), bits, axis=0),
        DynamicQuantizer(bits),
        DynamicQuantizer(bits, symmetric=False),
    ):
        expected = quantizer(values)
        assert torch.equal(quantizer(values.to(CUDA)).cpu(), expected)
        tracked = values.to(CUDA, copy=True).requires_grad_()
        found = quantizer(tracked)
        assert torch.equal(found.detach().cpu(), expected)
        found.sum().backward()
        on_cpu = values.clone().requires_grad_()
        quantizer(on_cpu).sum().backward()
        assert torch.equal(tracked.grad.cpu(), on_cpu.grad)


@pytest.mark.parametrize("rows", [1, 31, 500])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("of_outputs", [True, False])
def test_linear_layers_multiply_bytes_as_the_cpu_does(rows: int, biased: bool, of_outputs: bool) -> None:
    """Also where a row is not a number, which no byte can say."""
    generator = torch.Generator().manual_seed(0)
    x, codes = (
        torch.randn(rows, 64, generator=generator),
        torch.randint(-127, 128, (24, 64), generator=generator),
    )
    x[rows // 2, 3] = torch.nan
    steps = torch.rand(24, 1, generator=generator) if of_outputs else 0.017
    bias = torch.randn(24, generator=generator) if biased else None
    found = []
    for device in ("cpu", "cuda"):
        lazy = LazyCodes(x.to(device), Grid(0.023, 127), (-127, 127))
        step = steps.to(device) if isinstance(steps, torch.Tensor) else steps
        weight = Operand(encoded=Encoded(codes.float().to(device), Grid(step, 127)))
        assert device == "cpu" or weight.in_bytes is not None
        found.append(
            exact.linear(Operand(lazy=lazy), weight, None if bias is None else bias.to(device)).cpu()
        )
    assert torch.equal(*(each.nan_to_num(nan=-1e9) for each in found))
    assert found[1].isnan().any(dim=1).nonzero().tolist() == [[rows // 2]]


def test_one_pass_rounds_as_several_do() -> None:
    values = 4 * torch.randn(3000, generator=torch.Generator().manual_seed(0))
    values[:6] = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.5, 1.5, -2.5])
    found = one_pass.quantized(values.to(CUDA), 1.0, (-3, 3), 0.3)
    assert found is not None, "PyTorch's jiterator is not to be had"
    expected = values.round().clamp(-3, 3) * torch.tensor(0.3)
    assert torch.equal(found.cpu().nan_to_num(nan=9), expected.nan_to_num(nan=9))


@pytest.mark.parametrize("name", [name for name, model in MODELS.items() if model.causal])
@each_attention
def test_the_causal_mask_survives(name: str, attention: str) -> None:
    model, batch = on_cuda(name, attention), dict(batch_on_cuda(name))
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    changed = dict(batch, input_ids=batch["input_ids"].clone())
    changed["input_ids"][:, 5] = (changed["input_ids"][:, 5] + 7) % 30 + 3
    with simulate(model, quantizers(name, attention, "full", "W5A5")):
        before, after = logits(model, batch), logits(model, changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.equal(before[:, 5:], after[:, 5:])


@pytest.mark.parametrize("name", ["vit", "swin", "bert", "llama"])
@each_attention
def test_gradients_flow_under_mixed_precision(name: str, attention: str) -> None:
    from quanttune.inputs import call_model, logits_of

    model, batch = on_cuda(name, attention), batch_on_cuda(name)
    with torch.autocast("cuda", dtype=torch.bfloat16), simulate(model, quantizers(name, attention)):
        output = logits_of(call_model(model, batch))
    output.float().square().sum().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert torch.isfinite(parameter.grad).all(), parameter_name


def test_weights_are_quantized_where_they_are() -> None:
    model = on_cuda("vit", EAGER)
    table = sites("vit").profile("full")
    statistics = collect_statistics(model, [batch_on_cuda("vit")], table)
    made = build_quantizers(model, table, statistics, Scheme.parse("W8A8-asym"), RANGE_RULES.get("mse"))
    with simulate(model, made):
        assert logits(model, batch_on_cuda("vit")).device.type == "cuda"


@pytest.mark.parametrize("method", METHODS.names())
def test_methods_take_calibration_items_from_the_cpu(method: str) -> None:
    model, generator = on_cuda("vit", FUSED), torch.Generator().manual_seed(0)

    class Training:
        size = 8

        def batches(self, batch_size: int, generator: torch.Generator):  # type: ignore[no-untyped-def]
            while True:
                yield Batch(inputs("vit", batch_size, 1), torch.arange(batch_size) % 3)

        def loss(self, predicted: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.cross_entropy(predicted, targets)

    context = Context(
        model,
        sites("vit", FUSED),
        Scheme.parse("W8A8"),
        [Batch(inputs("vit", 8, 1), torch.randint(0, 3, (8,), generator=generator))],
        training=Training(),
        recipe={"learning_rate": 1e-3, "steps": 3, "batch_size": 4},
        device=CUDA,
        validation=HeldOut([batch_on_cuda("vit", 4, 2)]),
    )
    quantized = METHODS.get(method)().quantize(context)
    if quantized.weights is not None:
        model.load_state_dict(quantized.weights)
    with simulate(model, quantized.quantizers):
        assert torch.isfinite(logits(model, batch_on_cuda("vit"))).all()
