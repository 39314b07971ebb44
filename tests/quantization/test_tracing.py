"""The walk is numbered the same every time, and nothing is left behind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quanttune.inputs import call_model
from quanttune.quantization import SiteHandlers, discover_sites, simulate
from tests.quantization.models import EAGER, FUSED, MODELS, build, inputs, logits, quantizers, sites
from tests.quantization.walking import Recorder, hooks, walk, zero


class TestNumbering:
    def test_of_a_module_called_twice(self) -> None:
        class Twice(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(3, 3)

            def forward(self, x: Tensor) -> Tensor:
                return self.layer(self.layer(x))

        model, x = Twice(), torch.randn(2, 3)
        seen = walk(model, x)
        assert [site_id for site_id in seen if site_id.endswith("weight")] == [
            "layer/linear.weight",
            "layer/linear#2.weight",
        ]
        with SiteHandlers(model, {"layer/linear#2.input": zero}):
            assert torch.equal(model(x), model.layer.bias.expand(2, 3))
        table = discover_sites(model, x)
        assert {site.parameter for site in table.weights().values()} == {"layer.weight"}
        # The first result is the second input, and is rounded once.
        assert table["layer/linear#2.input"].source == "layer/linear.output"

    def test_of_a_module_under_two_names(self) -> None:
        class Shared(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first = nn.Linear(3, 3)
                self.second = self.first

            def forward(self, x: Tensor) -> Tensor:
                return self.second(torch.relu(self.first(x)))

        seen = walk(Shared(), torch.randn(2, 3))
        assert len(seen) == len(set(seen)) == 8
        assert seen[-1] == "first/linear#2.output"

    @pytest.mark.parametrize("name", MODELS)
    @pytest.mark.parametrize("attention", [EAGER, FUSED])
    def test_in_training_equals_that_in_evaluation(self, name: str, attention: str) -> None:
        model = copy.deepcopy(build(name, attention))
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.1
        expected = [site.id for site in sites(name, attention).values()]
        watched = {*expected, *(f"{site_id.rpartition('.')[0]}.input" for site_id in expected)}
        model.train()
        if name == "deit_distilled":
            model.set_distilled_training(False)
        with torch.random.fork_rng(devices=[]), torch.no_grad(), Recorder(model) as recorder:
            torch.manual_seed(0)
            call_model(model, inputs(name))
        assert [site_id for site_id in recorder.seen if site_id in expected] == expected
        assert set(recorder.seen) <= watched

    def test_starts_afresh_with_every_call(self) -> None:
        model = build("vit")
        with torch.no_grad(), Recorder(model) as recorder:
            model(inputs("vit"))
            first, recorder.seen = recorder.seen, []
            model(inputs("vit", 1))
        assert recorder.seen == first

    def test_is_unharmed_by_an_unopened_attention(self) -> None:
        class Model(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return F.scaled_dot_product_attention(x, x, x) @ x

        model, x = Model(), torch.randn(1, 2, 3, 3)
        assert walk(model, x)[-1] == "/matmul#3.output"
        with SiteHandlers(model, {"/matmul#3.output": zero}):
            assert torch.equal(model(x), torch.zeros_like(x))

        class Closed(Recorder):
            def opens_attention(self, path: str) -> bool:
                return False

        with torch.no_grad(), Closed(model) as closed:
            model(x)
        assert closed.seen == ["/matmul#3.a", "/matmul#3.b", "/matmul#3.output"]


class TestNothingIsLeftBehind:
    def test_after_the_block(self) -> None:
        model = copy.deepcopy(build("bert"))
        before = hooks(model)
        with SiteHandlers(model, {}):
            assert hooks(model) > before
        assert hooks(model) == before

    @pytest.mark.parametrize("depth", ["a handler", "the model", "the block"])
    def test_after_an_exception(self, depth: str) -> None:
        model, batch = copy.deepcopy(build("vit")), inputs("vit")
        plain = logits(model, batch)

        def fail(*_: Any) -> Any:
            raise RuntimeError("on purpose")

        broken = copy.deepcopy(model)
        if depth == "the model":
            broken.blocks[1].mlp.act.forward = fail
        handlers = (
            {"blocks.0/add.output": fail} if depth == "a handler" else {"blocks.0/add.output": torch.neg}
        )
        culprit = fail if depth == "the block" else broken
        with pytest.raises(RuntimeError, match="on purpose"), SiteHandlers(broken, handlers):
            culprit(batch)
        assert hooks(broken) == 0
        if depth != "the model":
            assert torch.equal(logits(broken, batch), plain)
            with SiteHandlers(broken, {}):
                assert torch.equal(logits(broken, batch), plain)

    def test_after_an_exception_that_is_caught_inside_the_block(self) -> None:
        class Fails(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))

            def forward(self, x: Tensor) -> Tensor:
                return self.inner(x)

        model, x = Fails(), torch.randn(2, 3)
        with torch.no_grad(), Recorder(model) as recorder:
            with pytest.raises(RuntimeError):
                model(torch.randn(2, 4))
            assert recorder.path == ""
            recorder.seen = []
            model(x)
        assert recorder.seen == walk(model, x)
        assert recorder.seen[0] == "inner.0/linear.input"

    def test_on_tensors_outside_the_model(self) -> None:
        seen = []

        def keep(values: Tensor) -> Tensor:
            seen.append(values)
            return values

        with SiteHandlers(nn.Linear(3, 3), {"/linear.input": keep, "/matmul.a": keep, "/add.output": keep}):
            F.linear(torch.randn(2, 3), torch.randn(3, 3))
            torch.randn(2, 2, 2) @ torch.randn(2, 2, 2) + torch.randn(2, 2, 2)
            nn.Linear(3, 3)(torch.randn(2, 3))
        assert seen == []

    def test_on_the_model_by_discovery(self) -> None:
        for name in ("swin", "llama"):
            model = copy.deepcopy(build(name))
            state = {key: value.clone() for key, value in model.state_dict().items()}
            random_state = torch.get_rng_state()
            discover_sites(model, inputs(name))
            assert hooks(model) == 0
            assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
            assert torch.equal(torch.get_rng_state(), random_state)
            assert all(parameter.grad is None for parameter in model.parameters())

    def test_of_the_mode_of_any_module_by_discovery(self) -> None:
        model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.Linear(3, 2)).train()
        model[0].eval()
        discover_sites(model, torch.randn(2, 3))
        assert [module.training for module in model.modules()] == [True, False, True, True]

        class Fails(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                raise RuntimeError("on purpose")

        failing = Fails(3, 3)
        with pytest.raises(RuntimeError, match="on purpose"):
            discover_sites(failing, torch.randn(2, 3))
        assert failing.training
        assert hooks(failing) == 0


class TestNestedAndConsecutive:
    def test_two_visitors_of_one_model_both_see_every_site(self) -> None:
        for name, attention in (("vit", EAGER), ("bert", FUSED), ("opt", EAGER)):
            model, batch = build(name, attention), inputs(name)
            with torch.no_grad(), Recorder(model) as outer, Recorder(model) as inner:
                call_model(model, batch)
            with torch.no_grad(), Recorder(model) as alone:
                call_model(model, batch)
            assert inner.seen == alone.seen
            assert sorted(outer.seen) == sorted(alone.seen)

    def test_the_outer_of_two_simulations_still_quantizes(self) -> None:
        model, batch, chosen = build("vit"), inputs("vit"), quantizers("vit", precision="W4A4")
        weights = {site_id: chosen[site_id] for site_id in chosen if site_id.endswith("weight")}
        activations = {site_id: chosen[site_id] for site_id in chosen if site_id not in weights}
        with simulate(model, chosen):
            together = logits(model, batch)
        with simulate(model, weights), simulate(model, activations):
            assert torch.equal(logits(model, batch), together)

    def test_visitors_of_two_models_do_not_mix(self) -> None:
        teacher, student, batch = build("vit"), build("deit"), inputs("vit")
        with torch.no_grad(), Recorder(teacher) as outer, Recorder(student) as inner:
            teacher(batch)
            assert outer.seen
            assert inner.seen == []
            outer.seen = []
            student(batch)
            assert outer.seen == []
        assert inner.seen

    def test_one_visitor_can_be_used_again(self) -> None:
        model, batch = build("vit"), inputs("vit")
        recorder = Recorder(model)
        for _ in range(2):
            with torch.no_grad(), recorder:
                model(batch)
        half = len(recorder.seen) // 2
        assert recorder.seen[:half] == recorder.seen[half:]
        assert hooks(model) == 0
