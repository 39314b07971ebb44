"""PTQ4ViT's search: three widths against its goal of three minutes, and coarse-to-fine against exhaustive."""

from __future__ import annotations

from collections.abc import Sequence

from benchmark.performance.measurement import MEASUREMENTS, Row, Setup, seconds

_WIDTHS = ("W8A8", "W7A7", "W6A6")


@MEASUREMENTS.register("ptq4vit")
def ptq4vit(setup: Setup) -> Sequence[Row]:
    """Time the search at every width, then the exhaustive search of the published code at the first."""
    import torch

    from baselines.method import MemoryStages
    from baselines.ptq4vit import Ptq4Vit, first_items
    from quanttune.inputs import call_model, to_device

    context = setup.context(_WIDTHS[0], "matmul")
    images = list(first_items(context.calibration, Ptq4Vit().images))

    def forward() -> None:
        with torch.no_grad():
            for batch in images:
                call_model(context.model, to_device(batch.inputs, context.device))

    def search(width: str, how: str) -> float:
        fresh = setup.context(width, "matmul")
        fresh.stages = MemoryStages()
        setup.say(f"{how} search at {width}")
        return seconds(lambda: Ptq4Vit(search=how).quantize(fresh))

    one = min(seconds(forward) for _ in range(setup.repeats))
    quick = [search(width, "coarse_to_fine") for width in _WIDTHS]
    full = search(_WIDTHS[0], "exhaustive")
    count = sum(len(batch.targets) for batch in images)
    rows = [Row(f"FP32 forward of {count} images", one)]
    rows += [
        Row(f"search, {width}", taken, taken / one, "forwards")
        for width, taken in zip(_WIDTHS, quick, strict=True)
    ]
    rows += [
        Row("search, three widths", sum(quick), sum(quick) / 180, "of the goal of 180 s"),
        Row(f"exhaustive search, {_WIDTHS[0]}", full, full / quick[0], f"of the search at {_WIDTHS[0]}"),
    ]
    return rows
