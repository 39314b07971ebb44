"""The table and the report of a measured suite, and what a cell takes beyond the work itself."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from benchmark.performance.measurement import Line, NotMeasurableError, Setup, compare, row
from quanttune.errors import QuantTuneError

_CELLS = 8


@row("views", "Table and report of suite laptop, whole commands, over the start of Python", of_model=False)
def views(setup: Setup) -> Sequence[Line]:
    """Each in a process of its own, as a person calls it; of published results where none are measured."""
    from benchmark.grid.suite import load_suite
    from benchmark.keep.reference_store import open_store, reference_folder
    from benchmark.report.rows import collect_rows

    def command(*arguments: str) -> Callable[[], object]:
        line = [sys.executable, *arguments]
        return lambda: subprocess.run(line, check=True, capture_output=True)  # noqa: S603

    suite = load_suite("laptop")
    with tempfile.TemporaryDirectory() as folder:
        results, whose = setup.results, "measured here"
        try:
            rows = collect_rows(open_store(results), suite)
        except QuantTuneError as error:
            published = reference_folder()
            if published is None:
                raise NotMeasurableError(f"suite laptop is not measured in {results}: {error}") from error
            # Views of published results go beside these, so they are read from a copy.
            results, whose = Path(folder) / "reference", "published"
            shutil.copytree(published, results)
            rows = collect_rows(open_store(results), suite)
        store = ("--results", str(results))
        return compare(
            min(setup.repeats, 3),
            {
                "python -c ''": command("-c", ""),
                "table": command("-m", "benchmark", "table", *store),
                "report": command("-m", "benchmark", "report", *store),
            },
            notes={"table": f"{len(rows.cells)} cells, {whose}"},
        )


@row("overhead", "A cell in the store beyond its calibration and evaluation, tiny models", of_model=False)
def overhead(setup: Setup) -> Sequence[Line]:
    """Cells of eight items each: keys, records, predictions and quantized models kept, nothing tracked."""
    from baselines.method import METHODS
    from benchmark import api
    from benchmark.engine.environment import prepare_torch
    from benchmark.engine.measure import evaluate
    from quanttune.quantization import Scheme, simulate

    prepare_torch(1, str(setup.device))
    works = ("minmax", "ema")
    precisions = ("W8A8", "W7A7", "W6A6", "W4A4")

    def cells() -> float:
        with tempfile.TemporaryDirectory() as folder:
            settings = {"limit": 8, "results": folder, "track": False, "device": str(setup.device)}
            list(api.run("smoke", models="tiny_vit", methods="fp32", **settings))  # type: ignore[arg-type]
            started = time.perf_counter()
            for outcome in api.run(
                "smoke",
                models="tiny_vit",
                methods=works,
                precisions=precisions,
                profiles="full",
                **settings,  # type: ignore[arg-type]
            ):
                if outcome.status != "done":
                    raise NotMeasurableError(f"a cell is {outcome.status}: {outcome.message}")
            return (time.perf_counter() - started) / _CELLS

    def alone() -> float:
        fresh = replace(setup, model="tiny_vit", results=Path(folder))
        session = fresh.session
        context = fresh.context()
        started = time.perf_counter()
        for name in works:
            for precision in precisions:
                context = replace(context, scheme=Scheme.parse(precision, "full"))
                made = METHODS.get(name)().quantize(context)
                with simulate(session.model, made.quantizers):
                    evaluate(
                        session.model,
                        session.task,
                        session.entry,
                        split="test",
                        limit=8,
                        device=setup.device,
                        progress=lambda *_: None,
                        stage="",
                    )
        return (time.perf_counter() - started) / _CELLS

    with tempfile.TemporaryDirectory() as folder:
        rounds = [(alone(), cells()) for _ in range(min(setup.repeats, 3))]
    inside, whole = zip(*rounds, strict=True)
    return [
        Line("calibration and evaluation alone, a cell", inside),
        Line(
            "the cell, kept in the store",
            whole,
            tuple(whole_cell / work for work, whole_cell in rounds),
            f"{1000 * (min(whole) - min(inside)):.0f} ms more a cell",
        ),
    ]
