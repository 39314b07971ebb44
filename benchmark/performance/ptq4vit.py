"""PTQ4ViT's search, coarse to fine, and the exhaustive one of the published code."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmark.performance.measurement import FORWARD, Line, Setup, compare, row, seconds


@row("ptq4vit", "PTQ4ViT's search at W8A8, coarse to fine and exhaustive")
def ptq4vit(setup: Setup) -> Sequence[Line]:
    """The exhaustive search once: it takes long enough not to be disturbed by little."""
    from baselines.ptq4vit import Ptq4Vit

    def search(how: str) -> Callable[[], object]:
        return lambda: Ptq4Vit(search=how).quantize(setup.context("W8A8", "matmul"))

    items = Ptq4Vit().images
    rounds = min(setup.repeats, 2)
    works = {FORWARD: setup.forward(items), "coarse to fine": search("coarse_to_fine")}
    plain, quick = compare(rounds, works, notes={FORWARD: f"of {items} items"}, warm=False)
    setup.say("exhaustive search")
    slow = seconds(search("exhaustive"))
    base = sorted(quick.seconds)[0]
    return [plain, quick, Line("exhaustive", (slow,), (slow / base,), "over coarse to fine")]
