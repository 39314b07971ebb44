"""Collecting statistics and simulating quantization, each over the plain FP32 forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from benchmark.performance.measurement import MEASUREMENTS, Row, Setup, interleaved

if TYPE_CHECKING:
    from quanttune.quantization import Quantizer


@MEASUREMENTS.register("simulation")
def simulation(setup: Setup) -> Sequence[Row]:
    """One pass for every rule and width, and one evaluation of the profile ``full`` at W8A8."""
    import torch

    from quanttune.inputs import call_model, to_device
    from quanttune.quantization import RANGE_RULES, build_quantizers, collect_statistics, simulate

    context = setup.context("W8A8", "full")
    sites, batches = (
        context.profile_sites,
        [to_device(batch.inputs, context.device) for batch in context.calibration],
    )
    statistics = collect_statistics(context.model, batches, sites)
    quantizers: dict[str, Quantizer] = build_quantizers(
        context.model, sites, statistics, context.scheme, RANGE_RULES.get("minmax")
    )

    def forward() -> None:
        with torch.no_grad():
            for inputs in batches:
                call_model(context.model, inputs)

    def simulated() -> None:
        with simulate(context.model, quantizers):
            forward()

    plain, collected, quantized = interleaved(
        setup.repeats, forward, lambda: collect_statistics(context.model, batches, sites), simulated
    )
    return [
        Row("FP32 forward, 128 items", plain),
        Row("statistics of all sites", collected, collected / plain, "over the forward; goal 1.3"),
        Row("simulated W8A8, full", quantized, quantized / plain, "over the forward; goal 1.3"),
    ]
