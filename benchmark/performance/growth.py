"""How time and memory grow: with the cells of a store, the parameters of a model, the items of a calibration.

Every point is a process of its own, so that its peak memory is its own. Beside the table, ``growth.json`` and
``growth.pdf`` in the results folder; the stores themselves are kept in ``growth`` there, for the next time.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmark.engine.environment import prepare_torch
from benchmark.keep.atomic import write_atomically, write_text_atomically
from benchmark.performance.measurement import Line, Setup, row
from benchmark.performance.peak_memory import PeakMemory
from benchmark.performance.synthetic_store import synthetic_store
from benchmark.report.canvas import line_style, new_figure, rendered, style

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure

CELLS = (10, 100, 1_000, 10_000)
ITEMS = (32, 128, 512, 2_048, 4_096)
WIDTHS: Mapping[int, tuple[int, int]] = {
    192: (12, 3),
    384: (12, 6),
    768: (12, 12),
    1024: (24, 16),
    1088: (24, 17),
}
"""Depth and heads of a ViT by its width: DeiT-Ti, -S, -B, ViT-L (304 M), and one of 342 M parameters."""

_COMMANDS: Mapping[str, Sequence[str]] = {
    "table": ("table",),
    "run --dry-run": ("run", "--all", "--dry-run"),
    "run --all, all cached": ("run", "--all", "--no-tracking"),
    "report, first time": ("report",),
    "report": ("report",),
}
_BATCH = 32
_MIB = 2**20
_STARTER = """
import json, os, sys, time
started = time.perf_counter()
nowhere = [(os.POSIX_SPAWN_OPEN, stream, os.devnull, os.O_WRONLY, 0) for stream in (1, 2)]
process = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ, file_actions=nowhere)
_, status, usage = os.wait4(process, 0)
print(json.dumps([time.perf_counter() - started, usage.ru_maxrss, os.waitstatus_to_exitcode(status)]))
"""


@dataclass(frozen=True)
class Point:
    """One measured size.

    Args:
        what: What was done.
        axis: What grows: ``cells``, ``parameters`` or ``calibration items``.
        size: How much of it there was.
        seconds: Time.
        peak_mb: Peak memory of the process, in MiB; for models without Python and PyTorch themselves.
    """

    what: str
    axis: str
    size: int
    seconds: float
    peak_mb: float


@row("growth", "Time and memory by cells, parameters and calibration items; a figure beside", of_model=False)
def growth(setup: Setup) -> Sequence[Line]:
    """Cells 10 to 10,000, models of 5 M to 342 M parameters, 32 to 4,096 calibration items."""
    return measured(setup, CELLS, tuple(WIDTHS), ITEMS)


def measured(
    setup: Setup, cells: Sequence[int], widths: Sequence[int], items: Sequence[int]
) -> Sequence[Line]:
    """The same for chosen sizes, in increasing order."""
    import torch

    threads, device = torch.get_num_threads(), str(setup.device)
    points: list[Point] = []

    def keep(found: Iterable[Point]) -> None:
        for point in found:
            points.append(point)
            text = json.dumps([asdict(each) for each in points], indent=1) + "\n"
            write_text_atomically(setup.results / "growth.json", text)

    for count in cells:
        setup.say(f"{count} cells")
        keep(_views(setup.results / "growth" / str(count), count))
    for width in widths:
        setup.say(f"a ViT of width {width}")
        keep([_apart(_model, width, threads, device)])
    for count in items:
        setup.say(f"{count} calibration items")
        keep([_apart(_calibration, count, threads, device)])
    with style():
        picture = rendered(growth_figure(points), "pdf")
    write_atomically(setup.results / "growth.pdf", lambda path: path.write_bytes(picture))
    return list(_rows(points))


def exponents(points: Sequence[Point]) -> tuple[float, float]:
    """The exponents of time and memory: slopes on logarithmic scales, by least squares.

    Over the sizes from a hundredth of the largest on, since smaller ones show fixed costs.
    """
    chosen = [point for point in points if 100 * point.size >= points[-1].size]
    sizes = np.log([point.size for point in chosen])
    slopes = [np.polyfit(sizes, np.log([of(point) for point in chosen]), 1)[0] for of in (_seconds, _peak)]
    return float(slopes[0]), float(slopes[1])


def _rows(points: Sequence[Point]) -> Iterator[Line]:
    for what, line in _lines(points):
        for point in line:
            note = f"{point.peak_mb:.0f} MiB"
            if point is line[-1] and len(line) > 1:
                note += "; exponents {:.2f} (time), {:.2f} (memory)".format(*exponents(line))
            yield Line(f"{what}: {point.size:,} {point.axis}", (point.seconds,), note=note)


def _lines(points: Sequence[Point]) -> list[tuple[str, list[Point]]]:
    names = dict.fromkeys(point.what for point in points)
    return [(name, [point for point in points if point.what == name]) for name in names]


def growth_figure(points: Sequence[Point]) -> Figure:
    """Time above, memory below, an axis each for what grows; both on logarithmic scales."""
    axes_names = list(dict.fromkeys(point.axis for point in points))
    figure = new_figure(5.0)
    grid = figure.subplots(2, len(axes_names), squeeze=False)
    for column, axis in enumerate(axes_names):
        lines = _lines([point for point in points if point.axis == axis])
        for height, (name, of) in enumerate((("seconds", _seconds), ("peak MiB", _peak))):
            axes = grid[height][column]
            for number, (what, line) in enumerate(lines):
                sizes, values = [point.size for point in line], [of(point) for point in line]
                axes.loglog(sizes, values, label=what, **line_style(number))
            axes.set_ylabel(name)
            axes.grid(visible=True)
        # Above, where no line runs.
        grid[0][column].legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.3)
        grid[1][column].set_xlabel(axis)
    return figure


def _seconds(point: Point) -> float:
    return point.seconds


def _peak(point: Point) -> float:
    return point.peak_mb


def _views(folder: Path, count: int) -> Iterator[Point]:
    """Commands of the command line on a synthetic store, as a user waits for them."""
    suite = synthetic_store(folder, count)
    where = ("--suite", suite.origin, "--results", str(folder))
    (folder / "index.parquet").unlink(missing_ok=True)
    shutil.rmtree(folder / "report", ignore_errors=True)
    for name, command in {"table, first time": ("table",), **_COMMANDS}.items():
        seconds, peak = _timed([sys.executable, "-m", "benchmark", *command, *where])
        yield Point(name, "cells", count, seconds, peak / _MIB)


def _timed(command: Sequence[str]) -> tuple[float, int]:
    """Seconds and peak resident bytes of a process; its output goes nowhere.

    A small process starts it and waits: Linux counts the peak of whoever started a process as its own.
    """
    starter = [sys.executable, "-I", "-S", "-c", _STARTER, *command]
    printed = subprocess.run(starter, stdout=subprocess.PIPE, check=True, text=True).stdout  # noqa: S603 - our own
    seconds, peak, status = json.loads(printed)
    if status:
        raise RuntimeError(f"{' '.join(command)} ended with {status}")
    return seconds, peak * (1 if sys.platform == "darwin" else 1024)


def _apart(work: Callable[[int, int, str], Point], size: int, threads: int, device: str) -> Point:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(work, size, threads, device).result()


def _model(width: int, threads: int, device: str) -> Point:
    """Statistics of a batch of 2 pictures, min-max ranges, and the batch simulated: what every cell does."""
    chosen = prepare_torch(threads, device)
    model = _vit(width, 224).to(chosen)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    weights = sum(parameter.nbytes for parameter in model.parameters())
    seconds, peak = _worked(model, [_pictures(2, 224, chosen)], chosen)
    peak_mb = (peak + weights) / _MIB
    return Point("calibration and a simulated batch", "parameters", parameters, seconds, peak_mb)


def _calibration(items: int, threads: int, device: str) -> Point:
    """The same for so many pictures of 64 pixels; a device holds one batch at a time, as in a cell."""
    chosen = prepare_torch(threads, device)
    model = _vit(192, 64).to(chosen)
    batches = [_pictures(_BATCH, 64, chosen)] * math.ceil(items / _BATCH)
    seconds, peak = _worked(model, batches, chosen)
    return Point("calibration of a ViT of 5 M", "calibration items", items, seconds, peak / _MIB)


def _worked(model: Any, batches: Sequence[Any], device: torch.device) -> tuple[float, int]:
    import torch

    from quanttune.inputs import call_model
    from quanttune.quantization import (
        RANGE_RULES,
        Scheme,
        build_quantizers,
        collect_statistics,
        discover_sites,
        simulate,
    )

    memory = PeakMemory(device)
    sites = discover_sites(model, batches[0]).profile("full")
    started = time.perf_counter()
    statistics = collect_statistics(model, batches, sites)
    quantizers = build_quantizers(model, sites, statistics, Scheme.parse("W8A8"), RANGE_RULES.get("minmax"))
    with torch.no_grad(), simulate(model, quantizers):
        call_model(model, batches[0])
    return time.perf_counter() - started, memory.above_baseline()


def _vit(width: int, pixels: int) -> Any:
    from timm.models.vision_transformer import VisionTransformer

    from benchmark.subject.models.entry import own_random_state

    depth, heads = WIDTHS[width]
    with own_random_state(0):
        return VisionTransformer(
            img_size=pixels, patch_size=16, embed_dim=width, depth=depth, num_heads=heads
        ).eval()


def _pictures(count: int, pixels: int, device: torch.device) -> torch.Tensor:
    import torch

    return torch.randn(count, 3, pixels, pixels, generator=torch.Generator().manual_seed(0)).to(device)
