"""The architectures of the paper at full size: time, memory, sites, and exactness with everything off.

Every architecture runs in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING, Any

from benchmark.engine.environment import prepare_torch
from benchmark.performance.architectures import ARCHITECTURES, Architecture
from benchmark.performance.measurement import Line, Setup, compare, row, seconds
from benchmark.performance.peak_memory import PeakMemory, saved_bytes

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from quanttune.inputs import ModelInputs
    from quanttune.quantization import SiteTable

WEIGHT_SHARE = 2.5
"""Memory that quantizing may take, in multiples of the FP32 weights, the weights themselves included."""
RULES = ("minmax", "percentile", "mse", "omse")
PRECISIONS = ("W8A8", "W7A7", "W6A6")
_STEPS = 3
_MIB = 2**20


def full_size(key: str, setup: Setup) -> Sequence[Line]:
    """Statistics, range rules, simulation and fine-tuning of an architecture."""
    import torch

    return in_own_process(key, str(setup.device), torch.get_num_threads(), setup.repeats)


for _key, _architecture in ARCHITECTURES.items():
    row(f"full_size_{_key}", f"{_architecture.title}, random weights: time and memory", of_model=False)(
        functools.partial(full_size, _key)
    )


def in_own_process(
    key: str, device: str, threads: int, repeats: int, layers: int | None = None
) -> list[Line]:
    """Measure one architecture in a new process.

    Args:
        key: Name in :data:`ARCHITECTURES`.
        device: Where to compute.
        threads: PyTorch threads.
        repeats: Runs of the forward passes.
        layers: Fewer layers than the architecture has, for a quick look.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(_measure, key, device, threads, repeats, layers).result()


def _measure(key: str, device: str, threads: int, repeats: int, layers: int | None) -> list[Line]:
    from quanttune.inputs import to_device
    from quanttune.quantization import discover_sites

    chosen = prepare_torch(threads, device)
    architecture = ARCHITECTURES[key].on(chosen)
    model = architecture.build(layers).to(chosen)
    batches = [
        (to_device(inputs, chosen), targets.to(chosen)) for inputs, targets in architecture.batches(2, model)
    ]
    _load_code(chosen)
    memory = PeakMemory(chosen)
    sites = discover_sites(model, batches[0][0])
    rows = _quantize(architecture, model, sites, [inputs for inputs, _ in batches], memory, repeats)
    return rows + (_steps(architecture, model, sites, batches, chosen) if architecture.tuned else [])


def _load_code(device: torch.device) -> None:
    """The same work on a few numbers: libraries are read into memory when they are first called."""
    import torch

    from quanttune.quantization import (
        RANGE_RULES,
        Scheme,
        build_quantizers,
        collect_statistics,
        discover_sites,
        simulate,
    )

    model, inputs = torch.nn.Linear(8, 8).to(device).eval(), torch.randn(64, 8, device=device)
    sites = discover_sites(model, inputs)
    statistics = collect_statistics(model, [inputs], sites)
    for rule in RULES:
        made = build_quantizers(model, sites, statistics, Scheme.parse("W8A8"), RANGE_RULES.get(rule))
        with torch.no_grad(), simulate(model, made):
            model(inputs)


def _quantize(
    architecture: Architecture,
    model: nn.Module,
    sites: SiteTable,
    batches: list[ModelInputs],
    memory: PeakMemory,
    repeats: int,
) -> list[Line]:
    """From statistics to a simulated batch; the peak is that of all of it together."""
    import torch

    from quanttune.inputs import call_model, logits_of
    from quanttune.quantization import (
        RANGE_RULES,
        Quantizer,
        Scheme,
        TensorStatistics,
        build_quantizers,
        collect_statistics,
        simulate,
    )

    full = sites.profile("full")
    statistics: dict[str, TensorStatistics] = {}
    made: dict[tuple[str, str], dict[str, Quantizer]] = {}
    outputs: list[Tensor] = []

    def forward() -> None:
        with torch.no_grad():
            outputs[:] = [logits_of(call_model(model, batches[0]))]

    def collect() -> None:
        statistics.update(collect_statistics(model, batches, full))

    def build() -> None:
        for rule, width in itertools.product(RULES, PRECISIONS):
            found = RANGE_RULES.get(rule)
            made[rule, width] = build_quantizers(model, full, statistics, Scheme.parse(width), found)

    forward()
    plain = outputs[0]
    with simulate(model, {}):
        forward()
    identical = torch.equal(outputs[0], plain)
    collecting, building = seconds(collect), seconds(build)
    quantized = simulate(model, made["minmax", "W8A8"])  # entered again and again: weights are quantized once

    def simulated() -> None:
        with quantized:
            forward()

    quantizing = seconds(simulated)
    usable = bool(torch.isfinite(outputs[0]).all()) and not torch.equal(outputs[0], plain)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    peak = memory.above_baseline() + weights  # before anything that only measures
    on_gpu = outputs[0].is_cuda  # its kernels are chosen and loaded by the first call
    timed = compare(repeats, {"forward": forward, "simulated": simulated}, warm=on_gpu)
    fp32, simulating = (min(line.seconds) for line in timed)
    saved = saved_bytes(model, batches[0])
    limit = WEIGHT_SHARE * weights + saved
    title, items = architecture.title, architecture.items
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return [
        _line(
            f"{title}: FP32 forward of {items} x {architecture.tokens}",
            fp32,
            note=f"{items / fp32:.2f} items/s; {parameters / 1e6:.1f} M parameters, {len(sites)} sites, "
            f"{len(full)} of them in profile full",
        ),
        _line(f"{title}: all off", None, note="bit-identical" if identical else "LOGITS DIFFER"),
        _line(f"{title}: statistics of two batches", collecting, collecting / (2 * fp32), "over the forward"),
        _line(f"{title}: {len(RULES)} range rules at {len(PRECISIONS)} widths", building),
        _line(f"{title}: first simulated batch", quantizing, quantizing / fp32, "weights are quantized here"),
        _line(
            f"{title}: simulated W8A8, full",
            simulating,
            simulating / fp32,
            f"over the forward; {items / simulating:.2f} items/s"
            + ("" if usable else "; LOGITS NOT FINITE, OR UNCHANGED"),
        ),
        _line(
            f"{title}: peak memory",
            None,
            peak / limit,
            f"of the limit: {peak / _MIB:.0f} of {limit / _MIB:.0f} MiB "
            f"({WEIGHT_SHARE} x {weights / _MIB:.0f} of weights, {saved / _MIB:.0f} saved by a batch)",
        ),
    ]


def _line(what: str, taken: float | None, ratio: float | None = None, note: str = "") -> Line:
    return Line(what, () if taken is None else (taken,), () if ratio is None else (ratio,), note)


def _steps(
    architecture: Architecture, model: nn.Module, sites: SiteTable, batches: list[Any], device: torch.device
) -> list[Line]:
    """Steps without and with the outlier loss; the first of each warms up and does not count."""
    from torch.nn.functional import cross_entropy

    from quanttune import OutlierLoss, OutlierLossConfig, Schedule, tune

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        if targets.dim() == 2:  # each token is foretold from those before it
            return cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())
        return cross_entropy(logits, targets)

    def fastest(with_loss: bool) -> float:
        # Random weights have no outliers: a low threshold gives the loss something to do.
        config = OutlierLossConfig(threshold=3.0)
        outliers = OutlierLoss(model, sites, _STEPS, config) if with_loss else None
        ends: list[float] = []
        tune(
            model,
            itertools.cycle(batches),
            loss,
            Schedule(steps=_STEPS, learning_rate=1e-6),
            outliers=outliers,
            device=device,
            progress=lambda *_: ends.append(time.perf_counter()),
        )
        return min(later - earlier for earlier, later in itertools.pairwise(ends))

    plain, pulled = fastest(False), fastest(True)
    what = f"{architecture.title}: step of {architecture.items} x {architecture.tokens}"
    return [
        _line(f"{what}, plain", plain),
        _line(f"{what}, QuantTune", pulled, pulled / plain, "over the plain step"),
    ]
