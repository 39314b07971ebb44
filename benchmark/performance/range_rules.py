"""From statistics to quantizers: each range rule at three widths, over the FP32 forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmark.performance.measurement import FORWARD, Line, Setup, compare, row

WIDTHS = ("W8A8", "W7A7", "W6A6")


@row("range_rules", "Each range rule at three widths, with the quantizers of weights, profile full")
def range_rules(setup: Setup) -> Sequence[Line]:
    """Statistics are there already; min-max chooses nothing, so it shows what the rest takes."""
    from quanttune.quantization import RANGE_RULES, Scheme, build_quantizers, collect_statistics

    model, sites = setup.session.model, setup.context().profile_sites
    statistics = collect_statistics(model, setup.batches(), sites)

    def build(rule: str) -> Callable[[], None]:
        def run() -> None:
            for summary in statistics.values():
                summary.__dict__.pop("histogram", None)  # made anew for each rule
            for width in WIDTHS:
                build_quantizers(model, sites, statistics, Scheme.parse(width), RANGE_RULES.get(rule))

        return run

    works: dict[str, Callable[[], object]] = {FORWARD: setup.forward()}
    works |= {f"rule {name}": build(name) for name in RANGE_RULES.names()}
    return compare(min(setup.repeats, 3), works, warm=False)
