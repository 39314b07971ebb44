"""The suite from Python: run cells and read their table; the command line is a skin over the same parts."""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from benchmark import components
from benchmark.engine.environment import DEFAULT_THREADS
from benchmark.engine.events import Events, Several
from benchmark.engine.plan import Plan, Request, make_plan
from benchmark.engine.runner import Outcome, Settings
from benchmark.grid.expand import Selection
from benchmark.grid.suite import DEFAULT_SUITE, load_suite
from benchmark.keep.reference_store import folder_of, open_store
from quanttune.errors import ConfigError

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn

    from quanttune.quantization import Quantized

StrPath = str | os.PathLike[str]
_T = TypeVar("_T", str, int)


def run(
    suite: StrPath = DEFAULT_SUITE,
    *,
    models: str | Sequence[str] = (),
    methods: str | Sequence[str] = (),
    precisions: str | Sequence[str] = (),
    profiles: str | Sequence[str] = (),
    seeds: int | Sequence[int] = (),
    limit: int | None = None,
    results: StrPath = "results",
    executor: str | None = None,
    jobs: int | None = None,
    threads: int = DEFAULT_THREADS,
    device: str = "cpu",
    processes: int = 1,
    batch: int | None = None,
    autocast: str | None = None,
    overwrite: str = "failed",
    include: StrPath | Sequence[StrPath] = (),
    track: bool = True,
    events: Events | None = None,
) -> Generator[Outcome, None, None]:
    """Measure the cells of a suite; those the store already has are not measured again.

    The request is checked at once, the work is done while the outcomes are taken. Stop taking them, and what
    is finished stays in the store.

    Args:
        suite: A suite's name, or a path to a ``.toml`` file.
        models: Names or globs of the suite's models; a registered name joins the suite. All by default, here
            and below; one text is as good as a sequence of one.
        methods: Names or globs of the suite's methods; a registered name joins with default parameters.
        precisions: In place of the suite's, such as ``W8A8``.
        profiles: In place of the suite's: ``full`` or ``matmul``.
        seeds: In place of the suite's.
        limit: Only so many test items; such cells are kept apart from tables.
        results: Folder of the store.
        executor: ``serial``, ``local`` or another registered name; by default ``local`` if ``jobs`` is above
            1, else ``serial``.
        jobs: Processes of the executor. With ``local``, guard the calling script with
            ``if __name__ == "__main__"``: the processes import it.
        threads: PyTorch threads of each process; may change last digits of what is trained.
        device: ``cpu`` or ``cuda``.
        processes: Processes that share each fine-tuning, each on a GPU of its own.
        batch: Items of an evaluation batch of a quantized model; changes speed and memory alone.
        autocast: Mixed precision of references and fine-tuning in place of the suite's: ``none`` or ``bf16``.
        overwrite: Which kept cells to measure again: ``never``, ``failed`` or ``always``.
        include: Files whose components take part, see :func:`benchmark.components.include`.
        track: Log to MLflow, if it is to be had.
        events: Told what goes on; a subclass of :class:`benchmark.engine.events.Events`.

    Yields:
        Every cell's outcome once: first those that run, as they come, then those that were kept before.

    Raises:
        QuantTuneError: If the request cannot be carried out; the message names what and the remedy.
    """
    components.include(*((include,) if isinstance(include, str | os.PathLike) else include))
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool)):
        raise ConfigError(f"limit = {limit!r}: give a whole number of test items")
    selection = Selection(
        _several("models", models, str),
        _several("methods", methods, str),
        _several("precisions", precisions, str),
        _several("profiles", profiles, str),
        _several("seeds", seeds, int),
    )
    request = Request(_path("suite", suite), selection, limit, autocast)
    settings = Settings(
        folder_of(Path(_path("results", results))).absolute(),
        threads,
        device,
        overwrite,
        processes,
        batch,
        components.included(),
    )
    return outcomes(make_plan(request, settings, executor, jobs), track, events or Events())


def outcomes(plan: Plan, track: bool, events: Events) -> Generator[Outcome, None, None]:
    """The outcomes of a plan, logged to MLflow if ``track`` says so."""
    if not track:
        return plan.outcomes(events)
    from benchmark.tracking.tracker import Tracking

    return plan.outcomes(Several(Tracking(), events))


def table(
    suite: StrPath = DEFAULT_SUITE,
    *,
    results: StrPath = "results",
    allow_partial: bool = False,
    metric: str | None = None,
) -> pd.DataFrame:
    """The cells of a suite as a frame.

    Args:
        suite: A suite's name, or a path to a ``.toml`` file.
        results: Folder of the store.
        allow_partial: Return a frame although cells are missing; their numbers are missing in it as well.
        metric: Another metric than the leading one of the suite's tasks.

    Returns:
        One line a cell in the suite's order, with the columns of ``benchmark.report.rows.ROW_FIELDS``, those
            of ``NOISE_FIELDS`` there if the noise of rounding was measured of a cell, and those of
            ``COST_FIELDS`` if a record tells what its method takes.

    Raises:
        ConfigError: If cells are missing and ``allow_partial`` is false, or a task does not offer the metric.
        UnknownNameError: If there is no such suite.
    """
    from benchmark.report.other_metric import in_metric
    from benchmark.report.rows import collect_rows
    from benchmark.report.tables import to_frame

    rows = collect_rows(
        open_store(Path(_path("results", results))),
        load_suite(_path("suite", suite)),
        allow_partial,
    )
    return to_frame(rows if metric is None else in_metric(rows, metric, allow_partial))


def load(cell_id_prefix: str, *, results: StrPath = "results") -> Quantized:
    """The quantized model of a cell: scheme, quantizers, and weights where the method changed them.

    ``load(cell).apply(reference(model))`` is a module that computes what the cell measured.

    Args:
        cell_id_prefix: The start of the cell's id, as `list cells` shows it.
        results: Folder of the store.

    Raises:
        StoreError: If there is no such cell, or its quantized model is not kept or damaged; the message says
            how to get it.
    """
    from benchmark.engine.reopen import load_quantized

    if not isinstance(cell_id_prefix, str):
        raise ConfigError(f"{cell_id_prefix!r} is no cell id; give the start of one as text, e.g. '4b2d'")
    return load_quantized(open_store(Path(_path("results", results))), cell_id_prefix)


def reference(model: str, *, results: StrPath = "results") -> nn.Module:
    """The FP32 model that the cells of a model quantize, in evaluation mode on the CPU.

    Args:
        model: A model's name, or a special form such as ``folder:PATH@TASK``.
        results: Folder of the store that has its weights; they are made there if it does not.

    Raises:
        UnknownNameError: If there is no such model.
        AssetError: If its weights cannot be had on this machine.
    """
    from benchmark.engine.reopen import load_reference

    if not isinstance(model, str):
        raise ConfigError(f"model = {model!r}: give a model's name")
    return load_reference(open_store(Path(_path("results", results))), model)


def _path(name: str, given: StrPath) -> str:
    """A path, or a suite's name, as text."""
    if not isinstance(given, str | os.PathLike):
        raise ConfigError(f"{name} = {given!r}: give a name or a path")
    return os.fspath(given)


def _several(name: str, given: Sequence[_T] | _T, kind: type[_T]) -> tuple[_T, ...]:
    """A sequence as a tuple; a single text or number, as is easily given, as a tuple of one."""
    items = (given,) if isinstance(given, str | int) else given
    if not isinstance(items, Sequence) or not all(type(item) is kind for item in items):
        raise ConfigError(f"{name} = {given!r}: give a {kind.__name__} or a sequence of them")
    return tuple(items)
