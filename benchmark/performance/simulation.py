"""A simulated evaluation of each profile, over the plain FP32 forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from benchmark.performance.measurement import FORWARD, Line, Setup, compare, row

GOAL = 1.15


@row("simulation", "Simulated evaluation of 128 items at W8A8, by profile, exact and by float kernels")
def simulation(setup: Setup) -> Sequence[Line]:
    """Weights are quantized in the round that does not count, as in an evaluation of many batches."""
    from quanttune.quantization import RANGE_RULES, build_quantizers, collect_statistics, simulate

    model, batches, forward = setup.session.model, setup.batches(), setup.forward()
    works: dict[str, Callable[[], object]] = {FORWARD: forward}
    for profile in ("full", "matmul"):
        context = setup.context("W8A8", profile)
        sites = context.profile_sites
        statistics = collect_statistics(model, batches, sites)
        quantizers = build_quantizers(model, sites, statistics, context.scheme, RANGE_RULES.get("minmax"))
        for exact in (True, False):
            name = f"{profile}, {'exact' if exact else 'float kernels'}"
            works[name] = within(simulate(model, quantizers, exact=exact), forward)
    return compare(setup.repeats, works, goals={name: GOAL for name in works if name.endswith("exact")})


def within(context: Any, work: Callable[[], object]) -> Callable[[], None]:
    """The same work inside a context that can be entered again."""

    def run() -> None:
        with context:
            work()

    return run
