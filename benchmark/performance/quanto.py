"""optimum-quanto's calibration: its own modules around every linear layer and normalisation."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from benchmark.performance.measurement import FORWARD, Line, Setup, compare, row
from benchmark.performance.simulation import within
from benchmark.performance.torch_observers import over_others


@row("calibration_quanto", "optimum-quanto's calibration, over our statistics", needs="optimum.quanto")
def calibration_quanto(setup: Setup) -> Sequence[Line]:
    """It keeps one running maximum of each input and output of its modules."""
    import torch
    from optimum.quanto import Calibration, qint8, quantize

    from quanttune.inputs import call_model
    from quanttune.quantization import collect_statistics

    model, batches = setup.session.model, setup.batches()
    sites = setup.context().profile_sites
    theirs = copy.deepcopy(model)
    quantize(theirs, weights=qint8, activations=qint8)

    def forward() -> None:
        with torch.no_grad():
            for inputs in batches:
                call_model(theirs, inputs)

    works = {
        "our statistics": lambda: collect_statistics(model, batches, sites),
        FORWARD: setup.forward(),
        "Calibration": within(Calibration(), forward),
    }
    return over_others(compare(min(setup.repeats, 3), works))
