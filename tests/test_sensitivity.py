"""How far parts of a model move its answers: the formulas in numpy, and models in float64."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from quanttune.analysis import Probe, by_block, by_site, effects
from quanttune.analysis.sensitivity import ALONE, REST
from quanttune.answers import UNSCORED, answers_of, divergences_of
from quanttune.errors import ConfigError, QuantTuneError
from quanttune.quantization import Quantized, quantize
from tests.method_contexts import batch_of, causal_batch
from tests.quantization.models import build, inputs, logits, one_thread, sites

SITE = "blocks.1/add.output"
WEIGHT = "blocks.0.mlp.fc1/linear.weight"


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def numpy_divergence(plain: Tensor, other: Tensor) -> np.ndarray:
    first, second = plain.double().numpy(), other.double().numpy()
    p, q = (np.exp(each - each.max(axis=-1, keepdims=True)) for each in (first, second))
    p, q = p / p.sum(axis=-1, keepdims=True), q / q.sum(axis=-1, keepdims=True)
    return np.where(p > 0, p * np.log(np.where(p > 0, p, 1) / np.where(q > 0, q, 1)), 0).sum(axis=-1)


@pytest.fixture(scope="module")
def vit() -> tuple[nn.Module, Quantized, Probe]:
    model = build("vit")
    quantized = quantize(model, [inputs("vit", 6, 1)], "W4A4")
    batch = batch_of("vit", 7, 2)
    return model, quantized, Probe(model, [(batch.inputs, batch.targets)], sites("vit").known)


def test_a_divergence_is_that_of_numpy_whatever_is_masked() -> None:
    plain, other = 5 * torch.randn(2, 9, 6, generator=torch.Generator().manual_seed(0))
    plain[0, 1] = other[0, 1] = -torch.inf
    assert divergences_of(plain, other).numpy() == pytest.approx(numpy_divergence(plain, other), rel=1e-9)
    assert divergences_of(plain, plain).tolist() == [0.0] * 9


def test_of_one_column_it_is_that_of_two_normal_distributions() -> None:
    plain, other = torch.tensor([[1.0], [2.0]]), torch.tensor([[4.0], [2.0]])
    assert divergences_of(plain, other).tolist() == [4.5, 0.0]


def test_the_logits_of_a_token_answer_for_the_next_one_that_is_scored() -> None:
    values = torch.arange(24.0).reshape(2, 4, 3)
    targets = torch.tensor([[7, 8, 9, UNSCORED], [UNSCORED, UNSCORED, 5, 6]])
    rows, found = answers_of(values, targets)
    assert torch.equal(rows, torch.stack([values[0, 0], values[0, 1], values[1, 1], values[1, 2]]))
    assert found.tolist() == [8, 9, 5, 6]


@pytest.mark.parametrize("shape", [(2,), (3, 4), (2, 5)])
def test_targets_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="no row of logits belongs to each target"):
        answers_of(torch.zeros(2, 4, 3), torch.zeros(shape, dtype=torch.long))


def test_without_quantizers_nothing_moves_at_all(vit: tuple[nn.Module, Quantized, Probe]) -> None:
    effect = vit[2].effect({})
    assert (effect.loss, effect.divergence, effect.changed) == (0.0, 0.0, 0.0)


def test_a_weight_alone_is_the_model_with_that_weight_in_float64(
    vit: tuple[nn.Module, Quantized, Probe],
) -> None:
    model, quantized, probe = vit
    batch = batch_of("vit", 7, 2)
    first, second = copy.deepcopy(model).double(), copy.deepcopy(model).double()
    weight = second.get_parameter("blocks.0.mlp.fc1.weight")
    with torch.no_grad():
        weight.copy_(quantized.quantizers[WEIGHT](weight.float()).double())
        assert isinstance(batch.inputs, Tensor)
        plain, other = first(batch.inputs.double()), second(batch.inputs.double())
    ((name, effect),) = effects(probe, quantized.quantizers, {"one": [WEIGHT]})
    assert name == "one"
    assert effect.divergence == pytest.approx(numpy_divergence(plain, other).mean(), rel=1e-3)
    losses = [nn.functional.cross_entropy(each, batch.targets) for each in (plain, other)]
    assert probe.loss == pytest.approx(float(losses[0]), rel=1e-5)
    assert effect.loss == pytest.approx(float(losses[1] - losses[0]), rel=1e-3)
    assert effect.changed == float((plain.argmax(-1) != other.argmax(-1)).double().mean())


def test_all_but_nothing_is_everything_and_all_but_everything_is_nothing(
    vit: tuple[nn.Module, Quantized, Probe],
) -> None:
    _, quantized, probe = vit
    whole = probe.effect(quantized.quantizers)
    everything = {"all": list(quantized.quantizers), "none": []}
    alone = dict(effects(probe, quantized.quantizers, everything, ALONE))
    rest = dict(effects(probe, quantized.quantizers, everything, REST))
    assert alone["all"] == rest["none"] == whole
    assert alone["none"] == rest["all"] == probe.effect({})
    assert whole.divergence > 0
    (left,) = (each for _, each in effects(probe, quantized.quantizers, {"one": [SITE]}, REST))
    others = {site: each for site, each in quantized.quantizers.items() if site != SITE}
    assert left == probe.effect(others)


def test_batches_do_not_matter(vit: tuple[nn.Module, Quantized, Probe]) -> None:
    model, quantized, probe = vit
    batch = batch_of("vit", 7, 2)
    assert isinstance(batch.inputs, Tensor)
    parts = [(batch.inputs[rows], batch.targets[rows]) for rows in (slice(0, 3), slice(3, 7))]
    apart = Probe(model, parts)
    chosen = {SITE: quantized.quantizers[SITE]}
    assert apart.effect(chosen) == probe.effect(chosen)
    assert apart.effect(quantized.quantizers) == probe.effect(quantized.quantizers)


def test_what_is_asked_for_of_each_item_is_kept() -> None:
    model = build("vit")
    batch = batch_of("vit", 5, 2)
    probe = Probe(
        model, [(batch.inputs, batch.targets)], scores=lambda logits, targets: logits.argmax(-1) == targets
    )
    assert probe.scores is not None
    assert probe.scores.tolist() == (logits(model, batch.inputs).argmax(-1) == batch.targets).tolist()
    assert probe.effect({}).scores is not None


def test_padding_of_a_causal_model_has_no_answer() -> None:
    model = build("opt")
    batch = causal_batch("opt", 4, 2)
    quantized = quantize(model, [causal_batch("opt", 4, 1).inputs], "W4A4")
    probe = Probe(model, [(batch.inputs, batch.targets)])
    with torch.no_grad():
        plain = logits(model, batch.inputs)
    scored = batch.targets[:, 1:] != UNSCORED
    expected = nn.functional.cross_entropy(plain[:, :-1][scored], batch.targets[:, 1:][scored])
    assert probe.loss == pytest.approx(float(expected), rel=1e-5)
    assert probe.effect(quantized.quantizers).divergence > 0


def test_blocks_hold_every_site_once_in_the_order_of_the_model(
    vit: tuple[nn.Module, Quantized, Probe],
) -> None:
    quantizers = vit[1].quantizers
    blocks = by_block(quantizers)
    assert [site for group in blocks.values() for site in group] != []
    assert sorted(site for group in blocks.values() for site in group) == sorted(quantizers)
    assert list(blocks)[-1] == "head"
    assert {"blocks.0", "blocks.1"} < set(blocks)
    assert by_block(["/add.output"]) == {"(model)": ("/add.output",)}
    assert by_site(quantizers) == {site: (site,) for site in quantizers}


def test_what_cannot_be_measured_says_why(vit: tuple[nn.Module, Quantized, Probe]) -> None:
    model, quantized, probe = vit
    with pytest.raises(ConfigError, match="at least one item"):
        Probe(model, [])
    with pytest.raises(ConfigError, match="site nowhere has no quantizer"):
        list(effects(probe, quantized.quantizers, {"one": ["nowhere"]}))
    with pytest.raises(ConfigError, match="way 'none'"):
        list(effects(probe, quantized.quantizers, {}, "none"))
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.get_parameter("head.bias").fill_(torch.nan)
    with pytest.raises(QuantTuneError, match="NaN or infinite"):
        Probe(broken, [(inputs("vit", 2, 2), torch.zeros(2, dtype=torch.long))])
