"""The rows of a deployment: each cell exported, run and timed; kept one by one, so that a run can go on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmark.deployment import running, static
from benchmark.engine.environment import DEFAULT_THREADS, prepare_torch, provenance
from benchmark.engine.exporting import export_cell
from benchmark.engine.measure import Items, evaluate, metric_values
from benchmark.engine.reopen import load_quantized, measure_again
from benchmark.engine.session import Session
from benchmark.keep.atomic import write_text_atomically
from benchmark.keep.record import plain
from benchmark.keep.reference_store import measuring_option
from quanttune.errors import ConfigError, QuantTuneError, StoreError
from quanttune.export.agreement import with_biases_of
from quanttune.export.runtime import has_vnni, kernels, processor_flags
from quanttune.quantization.simulation import simulate

if TYPE_CHECKING:
    from benchmark.grid.cells import Cell
    from benchmark.keep.store import Store

SCHEMA = 1
DOCUMENT = "deployment.json"
PARTS = ("accuracy", "latency")
_INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "asimddp")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Target:
    """One row to measure.

    Attributes:
        cell: The cell whose model is exported; of the rival, the float one that it quantizes.
        rival: Whether it is ONNX Runtime's own quantizer.
        items: Calibration items of that.
    """

    cell: Cell
    rival: bool = False
    items: int = 0

    @property
    def method(self) -> str:
        """Its label."""
        return static.LABEL if self.rival else self.cell.label

    @property
    def precision(self) -> str:
        """Its scheme."""
        return "W8A8" if self.rival else self.cell.scheme_text

    @property
    def key(self) -> str:
        """What it is kept under."""
        return f"{self.cell.model} {self.method} {self.precision} {self.cell.profile} {self.cell.cell_id}"

    @property
    def file(self) -> str:
        """Name of its file."""
        name = static.NAME if self.rival else self.cell.method
        return f"{self.cell.model}-{name}-{self.precision}-{self.cell.cell_id[:12]}.onnx"


class Deployment:
    """Rows of integer models under ONNX Runtime.

    Args:
        store: Where the cells are.
        folder: Where files and rows are kept.
        say: Told what goes on.
    """

    def __init__(self, store: Store, folder: Path, say: Say) -> None:
        self.store, self.folder, self.say = store, folder, say
        self._session: Session | None = None
        self.rows = read_rows(folder)

    def measure(
        self, cells: Iterable[Cell], parts: Iterable[str], again: bool = False
    ) -> list[dict[str, Any]]:
        """Measure what is missing of every cell, and of ONNX Runtime's own quantizer for each model.

        Returns:
            The rows, in the order of the cells.

        Raises:
            StoreError: If the reference of a model was not measured. Of another cell, and of one that ONNX
                cannot express, the row says so.
            ConfigError: If a model has no float cell among them.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        chosen = list(cells)
        references = {cell.model: cell for cell in chosen if cell.is_reference}
        targets = [Target(cell) for cell in chosen]
        for model, cell in references.items():
            # The reference itself needs none: those of the cells beside it.
            items = max((each.calibration_items for each in chosen if each.model == model), default=0)
            targets += [Target(cell, rival=True, items=items)] if items else []
        for cell in chosen:
            if cell.model not in references:
                raise ConfigError(f"model {cell.model} has no fp32 cell to compare with; add method fp32")
        for cell in references.values():
            self._require_measured(cell)
        targets.sort(key=lambda target: list(references).index(target.cell.model))
        wanted = tuple(parts)
        for number, target in enumerate(targets, 1):
            self._measure_one(
                target, references[target.cell.model], wanted, again, f"{number}/{len(targets)}"
            )
        return [self.rows[target.key] for target in targets]

    def _require_measured(self, cell: Cell) -> None:
        if self.store.load(cell) is None:
            command = measure_again(cell, measuring_option(self.store), overwrite=False)
            raise StoreError(f"cell {cell} is not measured yet: {command}")

    def _measure_one(
        self, target: Target, reference: Cell, parts: tuple[str, ...], again: bool, at: str
    ) -> None:
        row = self.rows.get(target.key, {})
        missing = [part for part in parts if again or part not in row]
        if not missing:
            return
        self.say(f"[{at}] {target.cell.model} {target.method} {target.precision}: {', '.join(missing)}")
        try:
            self._require_measured(target.cell)
            path = self._file(target, again and "accuracy" in missing)
            if "file_mib" not in row or "accuracy" in missing:
                row = {**row, **self._facts(target, path)}
            if "accuracy" in missing:
                row["accuracy"] = self._accuracy(target, reference, path)
            if "latency" in missing:
                row["latency"] = self._latency(path, self._file(Target(reference)), reference)
            row.pop("error", None)
        except QuantTuneError as error:
            # A method that ONNX cannot express must not cost the others their rows.
            row = {**row, "error": str(error)}
            self.say(f"  {error}")
        row |= {"model": target.cell.model, "method": target.method, "precision": target.precision}
        row |= {"profile": target.cell.profile, "cell_id": None if target.rival else target.cell.cell_id}
        self.rows[target.key] = plain(row)
        self._write()

    def _session_of(self, model: str) -> Session:
        if self._session is None or self._session.name != model:
            device = prepare_torch(DEFAULT_THREADS, "cpu")
            self._session = Session(model, self.store.stages, device, lambda *_: None)
        return self._session

    def _file(self, target: Target, again: bool = False) -> Path:
        path = self.folder / target.file
        if path.is_file() and not again:
            return path
        session = self._session_of(target.cell.model)
        if target.rival:
            float_model = self._file(Target(target.cell))
            return static.quantize_static(float_model, path, session, target.items, 0)
        record = self.store.find(target.cell.cell_id)
        weights = "int8" if has_vnni() else "uint8"
        export_cell(self.store, record, path, weights, session)
        return path

    def _facts(self, target: Target, path: Path) -> dict[str, Any]:
        found = kernels(path)
        if not target.cell.is_reference and not target.rival and not found.integers:
            raise QuantTuneError(
                f"{path.name}: ONNX Runtime computes none of its {found.floats} products on integers"
            )
        inputs = running.examples(self._session_of(target.cell.model))[running.BATCHES[-1]]
        return {
            "file": path.name,
            "file_mib": path.stat().st_size / 2**20,
            "integer_kernels": found.integers,
            "float_kernels": found.floats,
            **running.load_and_memory(path, inputs),
        }

    def _accuracy(self, target: Target, reference: Cell, path: Path) -> dict[str, Any]:
        session = self._session_of(target.cell.model)
        items = running.predictions(path, session, reference.limit)
        metric = session.task.metric
        found: dict[str, Any] = {
            "metric": metric,
            "value": metric_values(session.task, items)[metric],
            "n": len(items.ids),
        }
        if not target.rival:
            simulated = Items.from_arrays(self.store.items(target.cell.cell_id))
            record = self.store.load(target.cell)
            result = None if record is None else record.result
            found["simulated"] = None if result is None else result.value
            # How many predictions rounding alone changes: nobody can agree on more.
            noise = None if result is None else result.noise
            found["rounding_flips"] = None if noise is None else noise.flips
            if items.predictions is not None and simulated.predictions is not None:
                found["equal_predictions"] = _equal(items, simulated)
            if items.predictions is not None and not target.cell.is_reference:
                found["equal_with_biases"] = _equal(items, self._with_biases(target, reference, path))
        return found

    def _with_biases(self, target: Target, reference: Cell, path: Path) -> Items:
        """What the simulation predicts where its biases are rounded as the file's are."""
        session, quantized = (
            self._session_of(target.cell.model),
            load_quantized(self.store, target.cell.cell_id),
        )
        model = with_biases_of(path, quantized, session.model)
        with simulate(model, quantized.quantizers):
            return evaluate(
                model,
                session.task,
                session.entry,
                limit=reference.limit,
                device=session.device,
                progress=lambda *_: None,
            )

    def _latency(self, path: Path, float_model: Path, reference: Cell) -> list[dict[str, Any]]:
        inputs = running.examples(self._session_of(reference.model))
        found = running.latencies(path, float_model, inputs)
        return [
            asdict(each) | {"ratio": each.ratio, "per_second": 1e3 * each.batch / each.milliseconds}
            for each in found
        ]

    def _write(self) -> None:
        document = {"schema": SCHEMA, "environment": environment(), "rows": list(self.rows.values())}
        document["keys"] = list(self.rows)
        write_text_atomically(self.folder / DOCUMENT, json.dumps(document, indent=1) + "\n")


def _equal(first: Items, second: Items) -> float:
    return float(100 * np.mean(first.predictions == second.predictions))


def environment() -> dict[str, Any]:
    """Machine and versions; of the instruction sets those that decide how integers are multiplied."""
    from importlib.metadata import version

    flags = processor_flags()
    return {
        **provenance(DEFAULT_THREADS, "cpu"),
        "instructions": [name for name in _INSTRUCTIONS if name in flags],
        "vnni": has_vnni(),
        "onnxruntime": version("onnxruntime"),
        "onnx": version("onnx"),
    }


def read_rows(folder: Path) -> dict[str, dict[str, Any]]:
    """The rows that are kept, by key; none if there is no document or it is damaged."""
    try:
        document = json.loads((folder / DOCUMENT).read_text(encoding="utf-8"))
        if document["schema"] != SCHEMA:
            return {}
        return dict(zip(document["keys"], document["rows"], strict=True))
    except (OSError, ValueError, KeyError, TypeError):
        return {}
