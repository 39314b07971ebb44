"""FQ-ViT's calibration: one pass for all widths, against the FP32 forward over the same items."""

from __future__ import annotations

from collections.abc import Sequence

from benchmark.performance.measurement import FORWARD, Line, Setup, compare, row


@row("fq_vit", "FQ-ViT's calibration on 128 items, three widths at once")
def fq_vit(setup: Setup) -> Sequence[Line]:
    """Time the forward pass and the calibration in turns."""
    from baselines.fq_vit import calibrate

    context = setup.context()
    return compare(
        min(setup.repeats, 3),
        {FORWARD: setup.forward(), "FQ-ViT, three widths": lambda: calibrate(context, (8, 7, 6))},
        goals={"FQ-ViT, three widths": 2.0},
    )
