"""Collecting statistics, over the plain FP32 forward pass."""

from __future__ import annotations

from collections.abc import Sequence

from benchmark.performance.measurement import FORWARD, Line, Setup, compare, row

GOAL = 1.3


@row("statistics", "Statistics of all sites of profile full, 128 items, one pass for every rule and width")
def statistics(setup: Setup) -> Sequence[Line]:
    """Beside them the network alone in float64, of which no statistics are collected: the least it can be."""
    from quanttune.quantization import collect_statistics
    from quanttune.quantization.observation import observe

    model, batches = setup.session.model, setup.batches()
    sites = setup.context().profile_sites
    return compare(
        setup.repeats,
        {
            FORWARD: setup.forward(),
            "the network in float64": lambda: observe(model, batches, {}),
            "statistics": lambda: collect_statistics(model, batches, sites),
        },
        goals={"statistics": GOAL},
        notes={
            "statistics": f"{len(sites.activations())} sites; the network runs in float64, so that no order "
            "of a sum shows"
        },
    )
