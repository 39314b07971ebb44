"""The analysis agrees with its definitions, computed value by value in NumPy."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmark.subject.lookup import get_model
from benchmark.subject.tasks.task import get_task
from quanttune.analysis import (
    SATURATIONS,
    decompose,
    infinity_norms,
    layer_of,
    mean_shares,
    outlier_metrics,
    saturating,
    saturation_sweep,
)
from quanttune.errors import ConfigError, QuantTuneError
from quanttune.inputs import call_model, logits_of
from quanttune.quantization import (
    RANGE_RULES,
    Scheme,
    SiteHandlers,
    SiteTable,
    TensorStatistics,
    build_quantizers,
    collect_statistics,
    discover_sites,
    simulate,
)
from quanttune.quantization.ranges import symmetric_error
from quanttune.seeds import numpy_generator

BITS = (8, 7, 6)


def heavy_tailed(outlier: float = 40.0, count: int = 4000, mean: float = 0.5) -> np.ndarray:
    """Normal values with a few far out; each is a float16, so a histogram holds them exactly."""
    generator = numpy_generator(0, "analysis", count)
    values = generator.normal(mean, 1.0, count)
    values[:4] = outlier * np.array([1.0, -0.6, 0.9, 0.8])
    return values.astype(np.float16).astype(np.float64)


def statistics_of(values: np.ndarray) -> TensorStatistics:
    statistics = TensorStatistics()
    statistics.update(torch.from_numpy(values).float())
    return statistics


def quantize(values: np.ndarray, low: float, high: float, bits: int, symmetric: bool) -> np.ndarray:
    if symmetric:
        top = 2 ** (bits - 1) - 1
        step = high / top
        return np.clip(np.round(values / step), -top, top) * step
    top = 2**bits - 1
    step = (high - low) / top
    zero = np.round(-low / step)
    return (np.clip(np.round(values / step) + zero, 0, top) - zero) * step


def ends(values: np.ndarray, symmetric: bool) -> tuple[float, float]:
    if symmetric:
        limit = float(np.abs(values).max())
        return -limit, limit
    return min(float(values.min()), 0.0), max(float(values.max()), 0.0)


def by_definition(
    values: np.ndarray, low: float, high: float, bits: int, symmetric: bool
) -> dict[str, float]:
    """The four sums of the module's docstring, over the values themselves."""
    common = np.abs(values - values.mean()) <= 6 * values.std()
    inside = (values >= low) & (values <= high)
    free_low, free_high = ends(values[common], symmetric)
    error = (quantize(values, low, high, bits, symmetric) - values) ** 2
    narrow = quantize(values, max(low, free_low), min(high, free_high), bits, symmetric)
    remaining = ((narrow - values) ** 2)[common & inside].sum()
    return {
        "ordinary": remaining,
        "amplification": error[common & inside].sum() - remaining,
        "outliers": error[~common & inside].sum(),
        "saturation": error[~inside].sum(),
    }


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("rule", ["minmax", "percentile", "mse"])
@pytest.mark.parametrize("bits", BITS)
def test_the_error_splits_as_defined(bits: int, rule: str, symmetric: bool) -> None:
    values = heavy_tailed()
    statistics = statistics_of(values)
    choose = RANGE_RULES.get(rule)
    if rule == "percentile":
        choose = partial(choose, p=99.0)
    low, high = choose(statistics, bits, symmetric)
    split = decompose(statistics, bits, choose, symmetric)
    expected = by_definition(values, low, high, bits, symmetric)
    for cause, error in expected.items():
        assert getattr(split, cause) == pytest.approx(error, rel=1e-9, abs=1e-9), cause
    assert split.clipped == pytest.approx(np.mean((values < low) | (values > high)))
    assert split.energy == pytest.approx((values**2).sum())
    whole = ((quantize(values, low, high, bits, symmetric) - values) ** 2).sum()
    assert split.total == pytest.approx(whole)
    assert split.total == pytest.approx(split.rounding + split.saturation)
    assert split.noise_ratio == pytest.approx(10 * math.log10((values**2).sum() / whole))


def test_minmax_clips_nothing_and_outliers_amplify_its_range() -> None:
    split = decompose(statistics_of(heavy_tailed()), 8)
    assert split.saturation == 0
    assert split.clipped == 0
    assert split.shares is not None
    # The range is about 40 where 4.5 would do, so a step is about 9 times and its error 80 times as large.
    assert 0.95 < split.shares["amplification"] < 1
    assert sum(split.shares.values()) == pytest.approx(1)


def test_the_share_follows_the_two_steps() -> None:
    """Uniformly spread rounding errors have the variance ``step^2 / 12``, whence the share in closed form."""
    values = heavy_tailed(outlier=12.0, count=200_000)
    split = decompose(statistics_of(values), 8)
    common = np.abs(values - values.mean()) <= 6 * values.std()
    expected = 1 - (np.abs(values[common]).max() / np.abs(values).max()) ** 2
    assert split.shares is not None
    assert split.shares["amplification"] == pytest.approx(expected, abs=0.01)


def test_without_outliers_there_is_no_amplification() -> None:
    values = np.linspace(-1, 1, 4001).astype(np.float16).astype(np.float64)
    split = decompose(statistics_of(values), 8)
    assert split.amplification == 0
    assert split.outliers == 0
    assert split.ordinary > 0


def test_a_range_inside_the_ordinary_values_amplifies_nothing() -> None:
    def narrow(statistics: TensorStatistics, bits: int, symmetric: bool) -> tuple[float, float]:
        return -1.0, 1.0

    split = decompose(statistics_of(heavy_tailed()), 8, narrow)
    assert split.amplification == 0
    assert split.outliers == 0
    assert split.clipped > 0.3
    assert split.saturation > split.rounding


def test_the_total_is_the_error_that_range_rules_minimise() -> None:
    statistics = statistics_of(heavy_tailed())
    magnitudes = statistics.histogram.magnitudes()
    for bits in BITS:
        limits = np.array([statistics.high])
        expected = symmetric_error(magnitudes, limits, bits)[0]
        assert decompose(statistics, bits).total == pytest.approx(expected)


@pytest.mark.parametrize("constant", [0.0, 0.1, -3.0])
def test_constants_have_no_error_to_share(constant: float) -> None:
    split = decompose(statistics_of(np.full(100, constant)), 8)
    assert split.outliers == split.saturation == split.clipped == 0
    assert split.total < 1e-6
    zero = decompose(statistics_of(np.zeros(100)), 8)
    assert zero.shares is None
    assert zero.noise_ratio == math.inf
    assert math.isnan(mean_shares([zero])["amplification"])


def test_shares_are_averaged_tensor_by_tensor() -> None:
    loud = decompose(statistics_of(1000 * heavy_tailed(outlier=20.0)), 8)
    quiet = decompose(statistics_of(np.linspace(-1, 1, 1001)), 8)
    still = decompose(statistics_of(np.zeros(10)), 8)
    assert loud.shares is not None
    shares = mean_shares([loud, quiet, still])
    assert shares["amplification"] == pytest.approx(loud.shares["amplification"] / 2)
    assert sum(shares.values()) == pytest.approx(1)


def test_outlier_metrics_as_defined() -> None:
    values = heavy_tailed()
    metrics = outlier_metrics(statistics_of(values))
    mean, std = values.mean(), values.std()
    assert (metrics.low, metrics.high) == (values.min(), values.max())
    assert metrics.range == pytest.approx(np.ptp(values))
    assert metrics.max_abs == np.abs(values).max()
    assert metrics.ratio == pytest.approx(np.abs(values - mean).max() / std)
    assert metrics.kurtosis == pytest.approx((((values - mean) / std) ** 4).mean())
    assert metrics.beyond == pytest.approx(np.mean(np.abs(values - mean) > 6 * std))
    assert metrics.beyond == 4 / len(values)


def test_kurtosis_is_not_excess_and_constants_have_no_outliers() -> None:
    normal = numpy_generator(0, "normal").normal(size=200_000)
    assert outlier_metrics(statistics_of(normal)).kurtosis == pytest.approx(3, abs=0.1)
    constant = outlier_metrics(statistics_of(np.full(50, 0.1)))
    assert constant.beyond == 0
    assert math.isnan(constant.ratio)


def tiny(name: str) -> tuple[nn.Module, SiteTable, list[Tensor]]:
    entry = get_model(name)
    model = entry.build()
    found = get_task(entry.task).batches("train", entry, ids=None, limit=10, batch_size=4)
    batches = [batch.inputs for batch in found]
    return model, discover_sites(model, batches[0]).profile("full"), batches


@pytest.mark.parametrize("name", ["tiny_vit", "tiny_swin", "tiny_bert", "tiny_opt"])
def test_infinity_norms_are_those_of_the_items_one_by_one(name: str) -> None:
    model, sites, batches = tiny(name)
    if isinstance(batches[0], dict):
        # Padding belongs to the batch and not to an item, so items of one length are compared.
        batches = [{key: rows[:, :8] for key, rows in batch.items()} for batch in batches]
    norms = infinity_norms(model, batches, sites)
    assert list(norms) == list(sites.activations())
    single: dict[str, list[float]] = {site_id: [] for site_id in norms}

    def keep(site_id: str, values: Tensor) -> Tensor:
        single[site_id].append(float(values.abs().max()))
        return values

    handlers = {site_id: partial(keep, site_id) for site_id in norms}
    with torch.no_grad(), SiteHandlers(model, handlers):
        for batch in batches:
            named = isinstance(batch, dict)
            count = len(next(iter(batch.values()))) if named else len(batch)
            for item in range(count):
                part = slice(item, item + 1)
                call_model(model, {key: rows[part] for key, rows in batch.items()} if named else batch[part])
    for site_id, norm in norms.items():
        assert len(single[site_id]) == 10
        assert norm == pytest.approx(np.mean(single[site_id]), rel=1e-4), site_id


def test_infinity_norms_need_items_and_count_their_batches() -> None:
    model, sites, batches = tiny("tiny_vit")
    seen: list[int] = []
    infinity_norms(model, batches, sites, seen.append)
    assert seen == [1, 2, 3]
    with pytest.raises(QuantTuneError, match="at least one batch"):
        infinity_norms(model, [], sites)


@pytest.mark.parametrize(
    ("site_id", "layer"),
    [
        ("blocks.3.attn/matmul#2.a", "blocks.3"),
        ("blocks.11/add.output", "blocks.11"),
        ("blocks.3.mlp.0/linear.input", "blocks.3"),
        ("layers.1.blocks.0.attn/softmax.output", "layers.1.blocks.0"),
        ("layers.1.downsample.norm/layer_norm.output", "layers.1"),
        ("bert.encoder.layer.5.output/add.output", "bert.encoder.layer.5"),
        ("model.decoder.layers.2.fc1/linear.input", "model.decoder.layers.2"),
        ("patch_embed.proj/conv.input", "patch_embed"),
        ("/add.output", ""),
    ],
)
def test_layers(site_id: str, layer: str) -> None:
    assert layer_of(site_id) == layer


@pytest.mark.parametrize("symmetric", [True, False])
def test_saturating_cuts_the_minmax_range(symmetric: bool) -> None:
    statistics = statistics_of(heavy_tailed())
    low, high = RANGE_RULES.get("minmax")(statistics, 8, symmetric)
    assert saturating(0.0)(statistics, 8, symmetric) == (low, high)
    assert saturating(0.25)(statistics, 8, symmetric) == pytest.approx((0.75 * low, 0.75 * high))


@pytest.mark.parametrize("saturation", [-0.1, 1.0, 30, math.nan])
def test_saturation_is_a_fraction(saturation: float) -> None:
    with pytest.raises(ConfigError, match="is not a fraction"):
        saturating(saturation)


def test_the_sweep_measures_the_model_under_each_saturation() -> None:
    model, sites, batches = tiny("tiny_vit")
    statistics = collect_statistics(model, batches, sites)
    precision = Scheme.parse("W6A6")

    def measure() -> Tensor:
        with torch.no_grad():
            return logits_of(call_model(model, batches[0]))

    found = saturation_sweep(model, sites, statistics, precision, measure)
    assert tuple(found) == SATURATIONS
    for saturation in (0.0, 0.3):

        def rule(
            summary: TensorStatistics, bits: int, symmetric: bool, kept: float = 1 - saturation
        ) -> tuple:
            limit = kept * max(-summary.low, summary.high)
            return -limit, limit

        with simulate(model, build_quantizers(model, sites, statistics, precision, rule)):
            assert torch.equal(found[saturation], measure())
    assert not torch.equal(found[0.0], found[0.3])
    assert not torch.equal(found[0.0], measure())
