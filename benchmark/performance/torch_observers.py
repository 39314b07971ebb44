"""PyTorch's own observers and fake-quantizers, those of torch.ao and those of torchao, at the same sites.

Their own tools place them by tracing the model, which differs by model and version. Here they stand where
ours stand and see the same tensors, in the model's own float32 kernels.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmark.performance.measurement import FORWARD, Line, NotMeasurableError, Setup, compare, row
from benchmark.performance.simulation import within

_FASTER = 1.0
_HALF = 0.5


def _rows(title: str, package: str, observers: str, fake: str) -> None:
    """The two rows of a package.

    Args:
        title: For a person; in lower case the row's name.
        package: What is needed.
        observers: Module of its observers.
        fake: Module of its fake-quantizer.
    """
    name = title.replace(".", "_")

    @row(f"observers_{name}", f"{title}'s observers at the same sites, over our statistics", needs=package)
    def observed(setup: Setup) -> Sequence[Line]:
        from quanttune.quantization import collect_statistics, simulate

        found = _module(observers)
        model, batches = setup.session.model, setup.batches()
        sites = setup.context().profile_sites
        forward = setup.forward()

        def collecting(kind: str) -> Callable[[], None]:
            def run() -> None:
                with simulate(model, _handlers(sites.activations(), getattr(found, kind)), exact=False):
                    forward()

            return run

        works: dict[str, Callable[[], object]] = {
            "our statistics": lambda: collect_statistics(model, batches, sites),
            FORWARD: forward,
            "MinMaxObserver": collecting("MinMaxObserver"),
            "HistogramObserver": collecting("HistogramObserver"),
        }
        return over_others(compare(min(setup.repeats, 3), works))

    @row(f"fake_quantize_{name}", f"{title}'s FakeQuantize at the same sites, over simulation", needs=package)
    def faked(setup: Setup) -> Sequence[Line]:
        from quanttune.quantization import RANGE_RULES, build_quantizers, collect_statistics, simulate

        found, wrapper = _module(observers), getattr(_module(fake), "FakeQuantize")  # noqa: B009
        context, forward = setup.context(), setup.forward()
        model, sites = setup.session.model, context.profile_sites
        statistics = collect_statistics(model, setup.batches(), sites)
        ours = build_quantizers(model, sites, statistics, context.scheme, RANGE_RULES.get("minmax"))
        theirs = {site_id: wrapper(observer=found.MinMaxObserver) for site_id in sites}
        with simulate(model, theirs, exact=False):
            forward()  # ranges are found here, and fixed from then on
        for each in theirs.values():
            each.disable_observer()
        works: dict[str, Callable[[], object]] = {
            "our simulation, exact": within(simulate(model, ours), forward),
            FORWARD: forward,
            "FakeQuantize": within(simulate(model, theirs, exact=False), forward),
        }
        return over_others(compare(setup.repeats, works), _HALF)


def over_others(lines: Sequence[Line], goal: float = _FASTER) -> list[Line]:
    """Turn lines whose first is ours into ratios of ours over each other, which the goal is about."""
    ours, *others = lines
    turned = [Line(ours.what, ours.seconds, note="ratios below: ours over the other")]
    for line in others:
        ratios = tuple(1 / ratio for ratio in line.ratios)
        limit = None if line.what == FORWARD else goal
        turned.append(Line(line.what, line.seconds, ratios, line.note, limit))
    return turned


def _handlers(sites: Mapping[str, Any], kind: Callable[[], Any]) -> dict[str, Any]:
    return {site_id: kind() for site_id in sites}


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise NotMeasurableError(f"this version has no {name}") from error


_rows("torch.ao", "torch.ao", "torch.ao.quantization.observer", "torch.ao.quantization.fake_quantize")
_rows(
    "torchao",
    "torchao",
    "torchao.quantization.pt2e.observer",
    "torchao.quantization.pt2e.fake_quantize",
)
