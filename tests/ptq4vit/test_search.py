"""The search of scales, against NumPy written from PTQ4ViT's Algorithm 1."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from baselines.searching.products import ProductData
from baselines.searching.scale_search import SPLITS, search_scales
from baselines.searching.search_settings import Candidates, Settings
from quanttune.seeds import torch_generator
from tests.ptq4vit.numpy_reference import numpy_symmetric, numpy_twin_gelu, numpy_twin_softmax

FACTORS = np.linspace(0.01, 1.2, 100)


def settings_for(metric: str = "hessian", bits: int = 6, exhaustive: bool = True, **changes) -> Settings:
    values = {
        "weight_bits": bits, "activation_bits": bits, "metric": metric,
        "grid": Candidates(0.01, 1.2, 100, exhaustive), "rounds": 3, "per_channel": False,
        "twin_softmax": True, "twin_gelu": True,
    }  # fmt: skip
    return Settings(**{**values, **changes})


def linear_case(
    seed: int = 0, rows: int = 60, channels: int = 24, outputs: int = 12, spread: float = 2.0
) -> ProductData:
    generator = torch_generator(seed, "linear case")
    x = torch.randn(rows, channels, generator=generator) * torch.exp(
        torch.randn(channels, generator=generator)
    )
    w = torch.randn(outputs, channels, generator=generator) * torch.exp(
        torch.randn(outputs, 1, generator=generator)
    )
    curvature = torch.exp(spread * torch.randn(rows, outputs, generator=generator))
    return ProductData([x], [w], [curvature], torch.randn(outputs, generator=generator))


def numpy_linear_search(
    data: ProductData,
    bits: int,
    metric: str,
    blocks: int,
    per_channel: bool,
    rounds: int,
    factors: np.ndarray,
    twin: bool = False,
) -> tuple[float, np.ndarray]:
    """Algorithm 1 of the paper on float64, one candidate after the other; returns both limits."""
    x, w = data.left[0].double().numpy(), data.right[0].double().numpy()
    outputs = len(w)
    bias = np.zeros(outputs) if data.bias is None else data.bias.double().numpy()
    exact = x @ w.T + bias
    weight = data.curvature[0].double().numpy() if metric == "hessian" else np.ones_like(exact)
    block = np.arange(outputs) // (outputs // blocks)
    magnitude = np.abs(w).max(1)
    limits = (
        magnitude if per_channel else np.array([magnitude[block == block[o]].max() for o in range(outputs)])
    )
    group = np.arange(outputs) if per_channel and metric != "cosine" else block
    x_limit = x.max() if twin else np.abs(x).max()

    def quantized_x(factor: float) -> np.ndarray:
        if twin:
            return numpy_twin_gelu(x, x_limit * factor, bits)
        return numpy_symmetric(x, x_limit * factor, bits)

    def one_minus_cosines(own: np.ndarray, ref: np.ndarray) -> float:
        return (1 - (own * ref).sum(1) / (np.linalg.norm(own, axis=1) * np.linalg.norm(ref, axis=1))).sum()

    def errors(x_factor: float, w_factor: np.ndarray, whole: bool = False) -> np.ndarray:
        product = (
            quantized_x(x_factor) @ numpy_symmetric(w, (limits * w_factor[group])[:, None], bits).T + bias
        )
        if whole and metric == "cosine":
            # The input is of one piece: one cosine over all outputs, not one a block.
            return np.array([one_minus_cosines(product, exact)])
        by_group = np.zeros(group.max() + 1)
        for g in range(len(by_group)):
            own, ref = product[:, group == g], exact[:, group == g]
            if metric == "cosine":
                by_group[g] = one_minus_cosines(own, ref)
            else:
                by_group[g] = (weight[:, group == g] * (own - ref) ** 2).sum()
        return by_group

    n_groups = group.max() + 1
    w_best, x_best = np.ones(n_groups), 1.0
    for _ in range(rounds):
        table = np.stack([errors(x_best, np.full(n_groups, factor)) for factor in factors])
        w_best = factors[table.argmin(0)]
        totals = [errors(factor, w_best, whole=True).sum() for factor in factors]
        x_best = factors[int(np.argmin(totals))]
    return x_limit * x_best, limits * w_best[group]


@pytest.mark.parametrize(
    ("metric", "blocks", "per_channel"),
    [("hessian", 1, False), ("hessian", 3, False), ("hessian", 1, True), ("mse", 1, False), ("mse", 1, True)],
)
@pytest.mark.parametrize("bits", [4, 6])
def test_exhaustive_search_of_a_linear_layer_is_algorithm_1(metric, blocks, per_channel, bits):
    data = linear_case(seed=bits)
    found = search_scales(data, "", blocks, settings_for(metric, bits, per_channel=per_channel))
    x_limit, w_limits = numpy_linear_search(data, bits, metric, blocks, per_channel, 3, FACTORS)
    assert float(found["left"]) == pytest.approx(x_limit, rel=1e-5)
    assert np.broadcast_to(found["right"].numpy(), w_limits.shape) == pytest.approx(w_limits, rel=1e-5)


@pytest.mark.parametrize("per_channel", [False, True])
def test_base_ptq_search_is_one_round_by_cosine(per_channel):
    data = linear_case(seed=5)
    grid = Candidates(0.5, 1.2, 100, exhaustive=True)
    found = search_scales(
        data, "", 3, settings_for("cosine", 5, grid=grid, rounds=1, per_channel=per_channel)
    )
    x_limit, w_limits = numpy_linear_search(data, 5, "cosine", 3, per_channel, 1, np.linspace(0.5, 1.2, 100))
    assert float(found["left"]) == pytest.approx(x_limit, rel=1e-5)
    assert found["right"].numpy() == pytest.approx(w_limits, rel=1e-5)


def test_the_input_of_a_layer_behind_gelu_is_searched_as_a_twin():
    data = linear_case(seed=9)
    data.left = [F.gelu(data.left[0])]
    found = search_scales(data, "gelu", 1, settings_for(bits=5))
    x_limit, _ = numpy_linear_search(data, 5, "hessian", 1, False, 3, FACTORS, twin=True)
    assert float(found["left"]) == pytest.approx(x_limit, rel=1e-5)
    plain = search_scales(data, "gelu", 1, settings_for(bits=5, twin_gelu=False))
    assert float(plain["left"]) != pytest.approx(x_limit, rel=1e-5)


def head_case(softmax: bool) -> ProductData:
    generator = torch_generator(4, "head case")
    a, b = torch.randn(5, 3, 7, 6, generator=generator), torch.randn(5, 3, 6, 4, generator=generator)
    a *= torch.tensor([0.3, 1.0, 5.0]).view(3, 1, 1)
    if softmax:
        a = torch.softmax(3 * a, dim=-1)
    curvature = torch.exp(torch.randn(5, 3, 7, 4, generator=generator))
    # two parts of different lengths, as padded texts give them
    return ProductData([a[:3], a[3:, :, :5]], [b[:3], b[3:]], [curvature[:3], curvature[3:, :, :5]])


def numpy_head_search(data: ProductData, bits: int, twin: bool) -> tuple[np.ndarray | float, np.ndarray]:
    parts = [[part.double().numpy() for part in side] for side in (data.left, data.right, data.curvature)]
    limits = [np.max([np.abs(part).max((0, 2, 3)) for part in side], axis=0) for side in parts[:2]]

    def quantized(operand: int, factor: np.ndarray) -> list[np.ndarray]:
        return [numpy_symmetric(x, (limits[operand] * factor)[:, None, None], bits) for x in parts[operand]]

    def errors(a: list[np.ndarray], b: list[np.ndarray]) -> np.ndarray:
        return sum(
            (g * (qa @ qb - ra @ rb) ** 2).sum((0, 2, 3))
            for g, qa, qb, ra, rb in zip(parts[2], a, b, parts[0], parts[1], strict=True)
        )

    def left(choice: np.ndarray | float) -> list[np.ndarray]:
        return [numpy_twin_softmax(x, choice, bits) for x in parts[0]] if twin else quantized(0, choice)

    a_best, b_best = np.ones(3), np.ones(3)
    for _ in range(3):
        b = quantized(1, b_best)
        if twin:
            # Against the float second operand.
            a_best = min(SPLITS, key=lambda split: errors(left(split), parts[1]).sum())
        else:
            a_best = FACTORS[np.stack([errors(left(np.full(3, f)), b) for f in FACTORS]).argmin(0)]
        a = left(a_best)
        b_best = FACTORS[np.stack([errors(a, quantized(1, np.full(3, f))) for f in FACTORS]).argmin(0)]
    return (a_best if twin else limits[0] * a_best), limits[1] * b_best


@pytest.mark.parametrize("bits", [4, 6])
def test_exhaustive_search_of_activation_products_is_algorithm_1_per_head(bits):
    data = head_case(softmax=False)
    found = search_scales(data, "", 1, settings_for(bits=bits))
    a_limits, b_limits = numpy_head_search(data, bits, twin=False)
    assert found["left"].numpy() == pytest.approx(a_limits, rel=1e-5)
    assert found["right"].numpy() == pytest.approx(b_limits, rel=1e-5)


@pytest.mark.parametrize("bits", [4, 6])
def test_attention_gets_one_split_for_all_heads(bits):
    data = head_case(softmax=True)
    found = search_scales(data, "softmax", 1, settings_for(bits=bits))
    split, b_limits = numpy_head_search(data, bits, twin=True)
    assert float(found["split"]) == split
    assert found["right"].numpy() == pytest.approx(b_limits, rel=1e-5)
    uniform = search_scales(data, "softmax", 1, settings_for(bits=bits, twin_softmax=False))
    assert uniform["left"].shape == (3,)
    assert tuple(2.0**-i for i in range(20)) == SPLITS


def reached(data: ProductData, found: dict[str, Tensor], bits: int) -> float:
    x, w = data.left[0].double().numpy(), data.right[0].double().numpy()
    w_limits = np.broadcast_to(found["right"].numpy(), len(w))[:, None]
    product = numpy_symmetric(x, float(found["left"]), bits) @ numpy_symmetric(w, w_limits, bits).T
    return float((data.curvature[0].double().numpy() * (product - x @ w.T) ** 2).sum())


@pytest.mark.parametrize("bits", [6, 8])
@pytest.mark.parametrize("per_channel", [False, True])
def test_coarse_to_fine_reaches_the_error_of_the_exhaustive_search(bits, per_channel):
    ratios = []
    for seed in range(12):
        data = linear_case(seed, rows=400, channels=64, outputs=48, spread=0.7)
        choice = {"per_channel": per_channel, "bits": bits}
        all_of_them = search_scales(data, "", 1, settings_for(**choice))
        few = search_scales(data, "", 1, settings_for(**choice, exhaustive=False))
        ratios.append(reached(data, few, bits) / reached(data, all_of_them, bits))
    assert np.mean(ratios) < 1.03
    assert max(ratios) < 1.2


def test_coarse_to_fine_prices_few_candidates():
    calls = []

    def errors_of(index: Tensor) -> Tensor:
        calls.append(index)
        return (index - torch.tensor([7, 41, 99])).abs().double()

    grid = Candidates(0.01, 1.2)
    assert grid.search(errors_of, None, 3).tolist() == [7, 41, 99]
    assert len(calls) <= 19
    calls.clear()
    assert grid.search(errors_of, torch.tensor([3, 47, 90]), 3).tolist() == [7, 41, 99]
    assert len(calls) == 9


def test_an_operand_that_is_zero_throughout_keeps_a_usable_range():
    data = linear_case()
    data.left = [torch.zeros_like(data.left[0])]
    data.right = [torch.zeros_like(data.right[0])]
    found = search_scales(data, "", 1, settings_for())
    assert float(found["left"]) > 0
    assert (found["right"] > 0).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("metric", ["hessian", "cosine"])
@pytest.mark.parametrize("bits", [6, 8])
def test_a_gpu_finds_the_scales_of_the_cpu(metric, bits):
    """Thousands of scales, of which some are a near thing."""
    for data, after in (
        (linear_case(1, rows=3000, channels=128, outputs=512), ""),
        (linear_case(2, rows=3000, channels=128, outputs=512), "gelu"),
        (head_case(softmax=False), ""),
        (head_case(softmax=True), "softmax"),
    ):
        settings = settings_for(metric, bits, exhaustive=False, per_channel=True)
        expected = search_scales(data, after, 1, settings)
        there = ProductData(
            *([part.cuda() for part in side] for side in (data.left, data.right, data.curvature)),
            None if data.bias is None else data.bias.cuda(),
        )
        found = search_scales(there, after, 1, settings)
        for name, limits in expected.items():
            assert torch.equal(found[name].cpu(), limits), (after, name)
