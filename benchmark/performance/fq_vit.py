"""FQ-ViT's calibration: one pass for all widths, against the FP32 forward over the same images."""

from __future__ import annotations

from collections.abc import Sequence

from benchmark.performance.measurement import MEASUREMENTS, Row, Setup, interleaved


@MEASUREMENTS.register("fq_vit")
def fq_vit(setup: Setup) -> Sequence[Row]:
    """Time the forward pass and the calibration in turns."""
    import torch

    from baselines.fq_vit import calibrate
    from quanttune.inputs import call_model, to_device

    context = setup.context("W8A8", "full")

    def forward() -> None:
        with torch.no_grad():
            for batch in context.calibration:
                call_model(context.model, to_device(batch.inputs, context.device))

    forward()
    plain, full = interleaved(setup.repeats, forward, lambda: calibrate(context, (8, 7, 6)))
    count = sum(len(batch.targets) for batch in context.calibration)
    return [
        Row(f"FP32 forward of {count} images", plain),
        Row("FQ-ViT calibration, three widths", full, full / plain, "of the forward; goal 2"),
    ]
