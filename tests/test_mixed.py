"""Mixed precision: the budget, the widths that it gives, what it may be asked for, and how it goes on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from baselines.finetune import PlainFineTuning
from baselines.method import METHODS, Batch, Context
from baselines.mixed import Mixed
from benchmark.keep.stages import Stages
from quanttune.analysis import Front, Probe, Unit, pareto_front
from quanttune.errors import ConfigError, UnknownNameError
from quanttune.quantization import Quantized, Scheme, SiteKind, UniformQuantizer, discover_sites, simulate
from quanttune.seeds import torch_generator
from tests.method_contexts import CountingStages, context_for, made
from tests.quantization.models import inputs, logits, one_thread, sites

KINDS = ("weights", "activations")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def width_of(quantizer: Any) -> int:
    assert isinstance(quantizer, UniformQuantizer)
    return int(quantizer.code_max + 1).bit_length()


def averages(context: Context, quantized: Quantized) -> dict[str, float]:
    """Bits of an element on average, from the quantizers and from a run of the model."""
    bits, counts = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0)
    seen: dict[str, int] = {}

    class Count:
        def __init__(self, site: str) -> None:
            self.site = site

        def __call__(self, values: Tensor) -> Tensor:
            seen[self.site] = seen.get(self.site, 0) + values.numel()
            return values

    handlers = {site: Count(site) for site in context.profile_sites}
    for batch in context.calibration:
        with torch.no_grad(), simulate(context.model, handlers, exact=False):
            logits(context.model, batch.inputs)
    for site_id, quantizer in quantized.quantizers.items():
        weight = context.sites[site_id].kind is SiteKind.WEIGHT
        parameter = str(context.sites[site_id].parameter)
        count = context.model.get_parameter(parameter).numel() if weight else seen[site_id]
        kind = KINDS[not weight]
        bits[kind] += count * width_of(quantizer)
        counts[kind] += count
    return {kind: bits[kind] / counts[kind] for kind in KINDS}


@pytest.mark.parametrize("model", ["vit", "bert"])
@pytest.mark.parametrize("profile", ["full", "matmul"])
def test_it_takes_no_more_bits_than_the_scheme_and_uses_them(model: str, profile: str) -> None:
    context, quantized = made("mixed", model, profile, "W6A6")
    found = averages(context, quantized)
    assert found == pytest.approx(quantized.details["average_bits"])
    for kind in KINDS:
        assert 5.5 < found[kind] <= 6
        predicted = quantized.details["predicted_divergence"][kind]
        assert predicted["mixed"] < predicted["uniform"]
    widths = {width_of(each) for each in quantized.quantizers.values()}
    assert widths == {4, 6, 8}
    assert quantized.details["optimal"]


def test_each_quantizer_is_the_calibrators_at_its_width() -> None:
    _, quantized = made("mixed", "vit", "full", "W6A6")
    by_width = {
        width: METHODS.get("minmax")().quantize(context_for("vit", precision=f"W{width}A{width}")).quantizers
        for width in (4, 6, 8)
    }
    for site, quantizer in quantized.quantizers.items():
        width = quantized.details["bits"][site]
        assert width == width_of(quantizer)
        one = Quantized({site: quantizer}).quantizers_digest()
        assert one == Quantized({site: by_width[width][site]}).quantizers_digest()


def test_what_is_predicted_is_what_the_tensors_cost_alone() -> None:
    context, quantized = made("mixed", "vit", "matmul", "W6A6")
    batches = [(batch.inputs, batch.targets) for batch in context.calibration]
    probe = Probe(context.model, batches)
    for kind, is_weight in zip(KINDS, (True, False), strict=True):
        alone = [
            probe.effect({site: quantizer}).divergence
            for site, quantizer in quantized.quantizers.items()
            if (context.sites[site].kind is SiteKind.WEIGHT) == is_weight
        ]
        predicted = quantized.details["predicted_divergence"][kind]["mixed"]
        assert predicted == pytest.approx(sum(alone), rel=1e-4)


def test_products_of_two_widths_do_not_depend_on_the_batch() -> None:
    """They would if they were summed in float32, in an order that the batch decides."""
    context, quantized = made("mixed", "vit", "full", "W6A6")
    bits = quantized.details["bits"]
    calls: dict[str, set[int]] = {}
    for site_id in bits:
        calls.setdefault(site_id.rpartition(".")[0], set()).add(bits[site_id])
    assert any(len(widths) > 1 for widths in calls.values())
    batch = inputs("vit", 6, 5)
    assert isinstance(batch, Tensor)
    with simulate(context.model, quantized.quantizers):
        whole = logits(context.model, batch)
        single = torch.cat([logits(context.model, batch[row : row + 1]) for row in range(len(batch))])
    assert torch.equal(whole, single)


def test_where_nothing_is_wider_it_is_the_calibrator() -> None:
    _, quantized = made("mixed", "vit", "full")
    _, plain = made("minmax", "vit", "full")
    assert quantized.quantizers_digest() == plain.quantizers_digest()


def test_the_front_says_what_each_budget_would_give() -> None:
    context, quantized = made("mixed", "vit", "full", "W6A6")
    for kind in KINDS:
        front = quantized.details["front"][kind]
        budgets, losses = zip(*front, strict=True)
        assert (budgets[0], budgets[-1]) == (4.0, 8.0)
        assert all(first >= second for first, second in itertools.pairwise(losses))
        assert dict(front)[6.0] == quantized.details["predicted_divergence"][kind]["mixed"]
    other = Mixed(budget=5.0).quantize(context)
    for kind in KINDS:
        five = dict(quantized.details["front"][kind])[5.0]
        assert other.details["predicted_divergence"][kind]["mixed"] == five
        assert averages(context, other)[kind] <= 5


def test_weights_and_activations_have_a_budget_each() -> None:
    context = context_for("vit", precision="W4A8")
    quantized = METHODS.get("mixed")().quantize(context)
    found = averages(context, quantized)
    assert found["weights"] == 4  # the narrowest
    assert found["activations"] == 8  # the widest
    weights = METHODS.get("mixed")().quantize(context_for("vit", precision="W6"))
    assert set(weights.quantizers) == set(context.profile_sites.weights())
    assert set(weights.details["budgets"]) == {"weights"}


class Tied(nn.Module):
    """Reads one weight twice."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.other, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, values: Tensor) -> Tensor:
        hidden = self.shared(values).relu()
        return self.head(self.other(self.shared(hidden).relu()))


def test_a_tied_weight_has_one_width_and_is_paid_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Tied().eval()
    values = torch.randn(8, 6, generator=torch_generator(0, "items"))
    table = discover_sites(model, values)
    shared = [site.id for site in table.values() if site.parameter == "shared.weight"]
    assert len(shared) == 2
    context = Context(model, table, Scheme.parse("W6A6"), [Batch(values, torch.zeros(8, dtype=torch.long))])
    given: list[list[Unit]] = []

    def noted(units: list[Unit]) -> Front:
        given.append(units)
        return pareto_front(units)

    monkeypatch.setattr("baselines.mixed.pareto_front", noted)
    quantized = METHODS.get("mixed")().quantize(context)
    assert {unit.name: unit.size for unit in given[0]} == {
        "shared.weight": 36,
        "other.weight": 36,
        "head.weight": 18,
    }
    assert len({quantized.details["bits"][site] for site in shared}) == 1


def test_the_items_are_evenly_spaced_and_no_more_than_there_are() -> None:
    for items, count in ((5, 5), (1, 1), (16, 12)):
        quantized = Mixed(items=items).quantize(context_for("bert", precision="W6A6"))
        assert quantized.details["sensitivity_items"] == count


def test_behind_a_fine_tuning_the_tuned_model_is_measured() -> None:
    context = context_for("vit", "matmul", "W6A6")
    tuned = PlainFineTuning(calibrator="mixed").quantize(context)
    assert tuned.weights is not None
    again = METHODS.get("mixed")().quantize(context.changed(tuned.weights))
    assert tuned.quantizers_digest() == again.quantizers_digest()
    assert tuned.details["bits"] == again.details["bits"]
    _, plain = made("mixed", "vit", "matmul", "W6A6")
    assert tuned.details["front"] != plain.details["front"]


class StoppedError(Exception):
    """Somebody stops the process."""


def test_what_was_interrupted_goes_on_at_the_next_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probed: list[tuple[str, ...]] = []
    effect = Probe.effect

    def counted(self: Probe, quantizers: Any) -> Any:
        probed.append(tuple(quantizers))
        return effect(self, quantizers)

    monkeypatch.setattr(Probe, "effect", counted)

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "sensitivity at 6 bits" and done == 5:
            raise StoppedError

    stages = Stages(tmp_path / "stages")
    with pytest.raises(StoppedError):
        METHODS.get("mixed")().quantize(context_for("vit", precision="W6A6", stages=stages, progress=stop))
    before = list(probed)
    assert len(list((tmp_path / "stages" / "unfinished").glob("*.safetensors"))) == 1
    resumed = METHODS.get("mixed")().quantize(context_for("vit", precision="W6A6", stages=stages))
    assert not list((tmp_path / "stages" / "unfinished").glob("*.safetensors"))
    assert len(probed) == 3 * len(resumed.quantizers)  # each tensor at each width, none twice
    assert len(before) > 5
    _, whole = made("mixed", "vit", "full", "W6A6")
    assert resumed.quantizers_digest() == whole.quantizers_digest()
    assert resumed.details == whole.details


def test_other_precisions_measure_what_is_new_alone() -> None:
    reports: list[str] = []
    stages = CountingStages()

    def quantized(precision: str) -> Quantized:
        reports.clear()
        context = context_for(
            "vit", precision=precision, stages=stages, progress=lambda stage, *_: reports.append(stage)
        )
        return METHODS.get("mixed")().quantize(context)

    quantized("W8A8")
    # nothing was measured before, statistics neither
    assert set(reports) == {"statistics", *(f"sensitivity at {width} bits" for width in (4, 6, 8))}
    seven = quantized("W7A7")
    assert reports == []
    assert seven.details["predicted_divergence"]["weights"]["uniform"] is None  # nobody has measured it
    assert 6.5 < seven.details["average_bits"]["activations"] <= 7
    nine = quantized("W9A9")
    assert set(reports) == {"sensitivity at 9 bits"}
    assert set(nine.details["bits"].values()) == {9}
    three = quantized("W3A3")  # which no choice meets
    assert set(reports) == {"sensitivity at 3 bits"}
    assert three.details["average_bits"] == {"weights": 3.0, "activations": 3.0}


def test_the_choices_are_those_that_are_given() -> None:
    context = context_for("vit", precision="W6A6")
    quantized = Mixed(widths="8-4").quantize(context)
    assert set(quantized.details["bits"].values()) == {4, 8}
    assert max(averages(context, quantized).values()) <= 6


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"calibrator": "ptq4vit"}, "'ptq4vit' is no calibrator"),
        ({"calibrator": "finetune"}, "'finetune' is no calibrator"),
        ({"widths": "8,6"}, "give 2 to 16 bits joined by -"),
        ({"widths": "8-1"}, "give 2 to 16 bits joined by -"),
        ({"widths": ""}, "give 2 to 16 bits joined by -"),
        ({"budget": 1.5}, "mixed budget 1.5"),
        ({"budget": float("nan")}, "mixed budget nan"),
        ({"items": 0}, "mixed items 0: give at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        METHODS.get("mixed")(**settings)


def test_an_unknown_calibrator_is_named() -> None:
    with pytest.raises(UnknownNameError, match="minimax"):
        Mixed(calibrator="minimax")


def test_what_it_cannot_do_it_says() -> None:
    reason = METHODS.get("mixed")().skip(sites("vit"), Scheme.parse("W8A8-token"))
    assert reason is not None
    assert "W8A8-token" in reason
    with pytest.raises(ConfigError, match="a budget of 3 bits on average: 4 are the fewest"):
        Mixed(budget=3.0).quantize(context_for("vit", "matmul", "W6A6"))
    with pytest.raises(ConfigError, match="calibrator 'base_ptq' quantizes other sites"):
        Mixed(calibrator="base_ptq").quantize(context_for("vit", precision="W6A6"))


def test_labels_join_the_calibrator() -> None:
    assert Mixed().label == "mixed"
    assert Mixed(calibrator="percentile").label == "mixed+percentile"
    assert Mixed(calibrator="mse", budget=5.0).label == "mixed[budget=5.0]+mse"
    assert Mixed(widths="4-8-4").choices == (8, 4)
