"""Collecting statistics and simulating quantization, each over the plain FP32 forward pass."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from benchmark.performance.measurement import MEASUREMENTS, Row, Setup, interleaved

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import nn

    from quanttune.quantization import Quantizer

_PARTS = {
    "visit": "quantizers of outputs",
    "multiply": "products, quantizers of operands",
    "apply": "everything else",
}


@MEASUREMENTS.register("simulation")
def simulation(setup: Setup) -> Sequence[Row]:
    """One pass for every rule and width, and one evaluation of each profile at W8A8, by part."""
    import torch

    from quanttune.inputs import call_model, to_device
    from quanttune.quantization import RANGE_RULES, build_quantizers, collect_statistics, simulate

    context = setup.context("W8A8", "full")
    batches = [to_device(batch.inputs, context.device) for batch in context.calibration]
    sites = context.profile_sites
    statistics = collect_statistics(context.model, batches, sites)

    def quantizers(profile: str) -> dict[str, Quantizer]:
        chosen = context.scheme.with_profile(profile).sites(context.sites)
        seen = statistics | (
            {} if profile == "full" else collect_statistics(context.model, batches[:1], chosen)
        )
        return build_quantizers(context.model, chosen, seen, context.scheme, RANGE_RULES.get("minmax"))

    def forward() -> None:
        with torch.no_grad():
            for inputs in batches:
                call_model(context.model, inputs)

    made = {profile: quantizers(profile) for profile in ("full", "matmul")}

    def within(simulated: Any) -> Callable[[], None]:
        def run() -> None:
            with simulated:
                forward()

        return run

    works = [forward, lambda: collect_statistics(context.model, batches, sites)]
    works += [
        within(simulate(context.model, made[profile], exact=exact))
        for profile in made
        for exact in (False, True)
    ]
    plain, collected, *simulated = interleaved(setup.repeats, *works)
    rows = [
        Row("FP32 forward, 128 items", plain),
        Row("statistics of all sites", collected, collected / plain, "over the forward, in float64"),
    ]
    names = [(profile, how) for profile in made for how in ("float kernels", "exact")]
    rows += [
        Row(f"simulated W8A8, {profile}, {how}", seconds, seconds / plain, "over the forward; goal 1.3")
        for (profile, how), seconds in zip(names, simulated, strict=True)
    ]
    for part, seconds in _parts(context.model, made["full"], forward).items():
        rows.append(Row(f"  of exact, full: {part}", seconds, seconds / plain, "over the forward"))
    return rows


def _parts(
    model: nn.Module, quantizers: Mapping[str, Quantizer], forward: Callable[[], None]
) -> dict[str, float]:
    """Seconds of one exact simulation by what they are spent on."""
    from quanttune.quantization.simulation import Simulation

    spent: Counter[str] = Counter()

    class Timed(Simulation):
        pass

    def timed(name: str) -> Callable[..., Any]:
        method = getattr(Simulation, name)

        def call(*args: Any) -> Any:
            started = time.perf_counter()
            result = method(*args)
            spent[_PARTS[name]] += time.perf_counter() - started  # type: ignore[assignment]
            return result

        return call

    for name in _PARTS:
        setattr(Timed, name, timed(name))
    with Timed(model, quantizers):
        forward()
        spent.clear()
        forward()
    return dict(spent)
