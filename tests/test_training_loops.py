"""The outlier loss in every training loop that people write: as in the plain one, or refused at once."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quanttune import OutlierLoss, OutlierLossConfig
from quanttune.errors import ConfigError, QuantTuneError
from quanttune.excess import MeanExcess, kurtosis_of, moments_of
from quanttune.replicas import Replicas
from quanttune.thresholds import Running
from quanttune.training_loops import as_they_are
from tests.quantization.models import one_thread
from tests.training_loops import (
    DEVICES,
    EVERYTHING,
    assert_same,
    batch,
    called,
    data,
    quiet_bert,
    residual,
    trained,
)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


class TestMixedPrecision:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_is_the_plain_loop_up_to_its_rounding(self, dtype: torch.dtype) -> None:
        expected = trained(quiet_bert())
        found = trained(quiet_bert(), around=lambda: torch.autocast("cpu", dtype=dtype))
        torch.testing.assert_close(found["penalties"], expected["penalties"], rtol=0.05, atol=0)
        likeness = torch.cosine_similarity(found["gradients"], expected["gradients"], dim=0)
        assert float(likeness) > 0.98
        for site_id, running in expected["state"]["sites"].items():
            assert found["state"]["sites"][site_id]["std"] == pytest.approx(running["std"], rel=0.05)

    def test_a_loss_scale_is_taken_out_again(self) -> None:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
        assert_same(trained(quiet_bert(), scaler=scaler), trained(quiet_bert()))

    def test_a_step_that_overflows_is_no_measurement(self) -> None:
        """Found: one infinite value, as a loss scale leaves out, and a site was never penalised again."""
        running = Running()
        running.update([0.5, 2.0, -3.0, 4.0], 0.9)
        before = dict(vars(running))
        for bad in (float("inf"), float("nan")):
            running.update([0.5, bad, -bad, bad], 0.9)
        assert vars(running) == before


class TestAccumulation:
    @pytest.mark.parametrize("together", [True, False])
    def test_is_the_mean_over_its_batches(self, together: bool) -> None:
        """Whether the penalty is asked for after each batch or once for all of them."""
        model = residual()
        gradients = []
        with OutlierLoss(model, batch(0), 9, OutlierLossConfig(**EVERYTHING)) as outliers:
            model(batch(0))
            outliers.penalty()
            outliers.step()
            for seeds in ((1,), (2,), (1, 2)):
                model.zero_grad()
                for seed in seeds:
                    model(batch(seed))
                    if not together:
                        (outliers.penalty() / len(seeds)).backward()
                if together:
                    outliers.penalty().backward()
                gradients.append(torch.cat([p.grad.flatten() for p in model.up.parameters()]))
        first, second, both = gradients
        torch.testing.assert_close(both, (first + second) / 2)
        assert not torch.allclose(first, second)


class TestEvaluation:
    @pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
    def test_in_the_middle_changes_nothing(self, without: Callable[[], Any]) -> None:
        def evaluate(model: nn.Module) -> None:
            model.eval()
            with without():
                called(model)(data(model, 7))
            model.train()

        assert_same(trained(quiet_bert(), between=evaluate), trained(quiet_bert()))


class TestParallel:
    def test_on_one_device_is_the_plain_loop(self) -> None:
        def wrapped(model: nn.Module) -> Callable[[Any], Tensor]:
            return nn.DataParallel(model)

        # It moves to a GPU what it wraps.
        device = "cuda" if torch.cuda.is_available() else "cpu"
        assert_same(trained(residual().to(device), wrapped), trained(residual().to(device)))

    def test_over_devices_is_refused(self) -> None:
        wrapper = nn.DataParallel(residual())
        outliers = OutlierLoss(wrapper, batch(0), 1)
        wrapper.device_ids = [0, 1]
        with pytest.raises(ConfigError, match=r"nn\.DataParallel over 2 devices"), outliers:
            pass

    def test_a_copy_in_another_thread_is_refused_in_a_line(self) -> None:
        model = residual()
        copied = model._replicate_for_data_parallel()
        failed: list[BaseException] = []

        def work() -> None:
            try:
                copied(batch(0))
            except QuantTuneError as error:
                # As torch hands it on.
                failed.append(type(error)(f"Caught in replica 0.\nOriginal Traceback\n{error}"))

        def run_in_a_thread() -> None:
            with OutlierLoss(model, batch(0), 1):
                thread = threading.Thread(target=work)
                thread.start()
                thread.join()
                raise failed[0]

        with pytest.raises(QuantTuneError, match=r"nn\.DataParallel made for another device") as refused:
            run_in_a_thread()
        assert "\n" not in str(refused.value)

    def test_processes_that_do_not_share_are_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
        outliers = OutlierLoss(residual(), batch(0), 1)
        with pytest.raises(ConfigError, match=r"2 processes .*DistributedDataParallel"), outliers:
            pass

        class Accelerator:
            process_index, num_processes, device = 0, 2, torch.device("cpu")

        outliers.share_over(Replicas(Accelerator()))  # type: ignore[arg-type]
        with outliers:
            pass

    def test_another_model_than_the_watched_one_is_refused(self) -> None:
        """A copy, an average or whatever else trains in its place."""
        model = residual()
        with pytest.raises(ConfigError, match="did not run since the last step"):
            trained(model, watched=copy.deepcopy(model))


class TestCompilation:
    @pytest.mark.parametrize("when", ["wrapped", "warm", "in place", "a part", "the loop"])
    def test_is_refused_with_the_remedy(self, when: str) -> None:
        model = residual()

        def calls(model: nn.Module) -> Callable[[Any], Tensor]:
            compiled: Any = torch.compile(model, backend="eager")
            if when == "warm":
                compiled(batch(0)).sum().backward()
            elif when == "the loop":
                compiled = torch.compile(lambda given: model(given) * 1, backend="eager")
            elif when in ("in place", "a part"):
                (model if when == "in place" else model.up).compile(backend="eager")
                return model
            return compiled

        with pytest.raises(QuantTuneError, match=r"torch\.compile") as refused:
            trained(model, calls)
        assert "\n" not in str(refused.value)


class TestMagnitude:
    """Values times ``s`` are as far out as before, whatever their squares overflow."""

    scales = pytest.mark.parametrize("scale", [1e-18, 1e-9, 1e-6, 1e6, 1e9, 1e18])
    devices = pytest.mark.parametrize("device", DEVICES)

    @scales
    @devices
    def test_of_moments_and_excess(self, scale: float, device: str) -> None:
        plain = batch(0, 4000).detach().to(device)
        running, scaled = Running(), Running()
        for _ in range(2):
            running.update(moments_of(plain, running.unit).tolist(), 0.9)
            scaled.update(moments_of(plain * scale, scaled.unit).tolist(), 0.9)
        assert scaled.std == pytest.approx(running.std * scale, rel=1e-5)
        assert scaled.ratio == pytest.approx(running.ratio, rel=1e-5)
        found = []
        for values, moments in ((plain, running), (plain * scale, scaled)):
            tracked = values.clone().requires_grad_()
            loss, count = MeanExcess.apply(tracked, moments.mean, moments.std, 2.0, 2)
            (gradient,) = torch.autograd.grad(loss, tracked)
            found.append((loss.detach(), count, gradient.double() * moments.std))
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-9)
        assert int(found[0][1]) > 100

    @scales
    @devices
    def test_of_kurtosis(self, scale: float, device: str) -> None:
        plain, scaled = ((batch(0).detach().to(device) * by).requires_grad_() for by in (1.0, scale))
        found = [kurtosis_of(values) for values in (plain, scaled)]
        torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=0)
        gradients = [torch.autograd.grad(*each)[0] for each in zip(found, (plain, scaled), strict=True)]
        torch.testing.assert_close(gradients[0], gradients[1] * scale, rtol=1e-3, atol=1e-6)

    @devices
    def test_ordinary_kurtosis_is_as_written_to_the_bit(self, device: str) -> None:
        values = batch(0).detach().to(device)
        for scale in (1e-6, 0.3, 1e6):
            centred = values * scale - (values * scale).mean()
            assert torch.equal(kurtosis_of(values * scale), (centred**4).mean() / (centred**2).mean() ** 2)

    @devices
    def test_a_unit_is_a_power_of_two_and_rounds_nothing(self, device: str) -> None:
        values = batch(0, 4000).detach().to(device)
        assert torch.equal(moments_of(values, 2.0**20), moments_of(values))

    def test_a_unit_is_chosen_where_the_deviation_overflows_alone(self) -> None:
        running = Running()
        running.update([0.0, float("inf"), -3e18, 1e18], 0.9)
        assert (running.unit, running.updates) == (2.0**62, 0)


def test_what_is_frozen_is_not_projected() -> None:
    model = residual()
    with torch.no_grad():
        model.up.weight[0, 0] = model.down.weight[0, 0] = 40.0
    model.up.weight.requires_grad_(False)
    config = OutlierLossConfig(parameter_threshold=2.0, anneal=0.0)
    with OutlierLoss(model, batch(0), 1, config) as outliers:
        model(batch(0))
        outliers.step()
    assert float(model.up.weight[0, 0]) == 40.0
    assert float(model.down.weight[0, 0].detach()) < 20.0


@pytest.mark.parametrize("in_place", [True, False])
def test_values_that_change_in_place_are_those_that_were_seen(in_place: bool) -> None:
    """Where the graph needs the values themselves, as on a GPU, autograd's own check is done for them."""

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, values: Tensor) -> Tensor:
            ctx.save_for_backward(values)
            return values.square().sum()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            return 2 * grads[0] * ctx.saved_tensors[0]

    start = torch.arange(3.0, requires_grad=True)
    values = start * 1
    with as_they_are(values):
        loss = Square.apply(values)
    if in_place:
        values.add_(1)
        with pytest.raises(RuntimeError, match="in place"):
            loss.backward()
    else:
        loss.backward()
        assert torch.equal(start.grad, 2 * start.detach())


def test_an_activation_function_in_place_is_no_matter_on_a_cpu() -> None:
    class Inner(nn.Module):
        def __init__(self, in_place: bool) -> None:
            super().__init__()
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                self.up, self.head = nn.Linear(16, 32), nn.Linear(32, 3)
            self.relu = nn.ReLU(inplace=in_place)

        def forward(self, values: Tensor) -> Tensor:
            return self.head(self.relu(self.up(values)))

    config = OutlierLossConfig(**EVERYTHING)
    found = []
    for in_place in (False, True):
        model = Inner(in_place)
        with OutlierLoss(model, batch(0), 2, config) as outliers:
            for _ in range(2):
                model.zero_grad()
                (model(batch(0)).sum() + outliers.penalty()).backward()
                outliers.step()
        found.append(model.up.weight.grad)
    assert torch.equal(*found)
