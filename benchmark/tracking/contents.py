"""What a run of MLflow says of a record: tags, parameters, metrics, data sets and files.

Parameters are the cell, so that they never change. What may be another one next time, such as the machine or
the version of torch, is a tag.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmark.grid.cells import Cell
from benchmark.keep.record import Record
from benchmark.keep.stages import Stages
from quanttune.digests import json_digest

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput

LONGEST = 5000
"""Letters of a tag or parameter; what MLflow 3 takes of both."""
POINTS = 200
"""Steps of a training that are logged of a longer one, evenly spread."""


def tags_of(record: Record) -> dict[str, str]:
    """Tags of a finished cell."""
    tags = {
        "status": record.status,
        "reference_digest": record.reference_digest or "",
        "weights_digest": record.weights_digest or "",
        **label_tags(record.cell),
        **machine_tags(record.provenance),
    }
    commit = record.provenance.get("commit")
    if commit:
        tags["mlflow.source.git.commit"] = str(commit)
    if record.reason:
        tags |= {
            "reason": record.reason[:LONGEST],
            "mlflow.note.content": f"skipped: {record.reason[:LONGEST]}",
        }
    return tags


def label_tags(cell: Cell) -> dict[str, str]:
    """The names that tables give to a cell's method and scheme."""
    return {"label": cell.label[:LONGEST], "scheme": cell.scheme_text}


def machine_tags(provenance: Mapping[str, Any]) -> dict[str, str]:
    """What a record says of the machine and the libraries."""
    names = ("device", "device_name", "threads", "cpu", "python")
    tags = {name: str(provenance[name]) for name in names if provenance.get(name) is not None}
    versions = provenance.get("versions")
    if isinstance(versions, Mapping):
        tags |= {name: str(versions[name]) for name in ("torch", "quanttune-bench") if name in versions}
    return {name: value[:LONGEST] for name, value in tags.items()}


def parameters_of(cell: Cell) -> dict[str, str]:
    """The cell's identity, the method's parameters one by one."""
    identity = cell.identity()
    parameters = {key: value for key, value in identity.items() if key not in ("parameters", "recipe")}
    for part in ("parameters", "recipe"):
        prefix = "method" if part == "parameters" else part
        parameters |= {f"{prefix}.{key}": value for key, value in identity.get(part, {}).items()}
    return {key: str(value)[:LONGEST] for key, value in parameters.items()}


def metrics_of(record: Record) -> dict[str, float]:
    """The numbers of a measured cell; none of a skipped one.

    ``score``, ``drop`` and ``recovery`` are of every task: the leading metric, what it lost to FP32, and what
    is left of it in percent of FP32, which is the inverse ratio where less is better.
    """
    result = record.result
    if result is None:
        return {}
    noise = result.noise
    values: dict[str, float | None] = {
        "score": result.value,
        result.metric: result.value,
        "fp32": result.fp32,
        "fp32_own": result.fp32_own,
        "drop": result.drop,
        "drop_ci_low": result.ci_low,
        "drop_ci_high": result.ci_high,
        "recovery": recovery_of(record),
        "n": float(result.n),
        "duration_s": record.duration_s,
        "noise_mean": None if noise is None else noise.mean,
        "noise_deviation": None if noise is None else noise.deviation,
        "noise_common": None if noise is None else noise.common,
        "flips": None if noise is None else noise.flips,
        "largest_ratio": record.details.get("largest_ratio"),
        **record.cost,
    }
    return {key: float(value) for key, value in values.items() if value is not None}


def recovery_of(record: Record) -> float | None:
    """What is left of the FP32 reference's metric, in percent of it."""
    result = record.result
    if result is None:
        return None
    part, whole = (result.value, result.fp32) if result.higher_is_better else (result.fp32, result.value)
    return 100 * part / whole if whole else None


def course_of(record: Record, stages: Stages) -> dict[str, list[tuple[int, float]]]:
    """How the training of a cell's weights went: steps and values, by name, at most :data:`POINTS` each."""
    if record.quantized is None or record.quantized.weights is None:
        return {}
    columns = stages.course(record.quantized.weights)
    steps = [int(step) for step in columns.pop("step", [])]
    every = max(1, -(-len(steps) // POINTS))
    chosen = [place for place in range(len(steps)) if (place + 1) % every == 0 or place == len(steps) - 1]
    return {f"train/{name}": [(steps[at], values[at]) for at in chosen] for name, values in columns.items()}


def data_sets(cell: Cell, items: int | None, trains: bool) -> list[DatasetInput]:
    """What a cell was evaluated on, calibrated with and trained on.

    Args:
        cell: The cell.
        items: How many items were evaluated, where that is known.
        trains: Whether its method fine-tunes.
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag

    uses: list[tuple[str, str, int | None]] = [(cell.split, cell.task_fingerprint, items)]
    if not cell.is_reference:
        drawn = json_digest([cell.task_fingerprint, "calibration", cell.calibration_items, cell.seed])
        uses.append(("calibration", drawn, cell.calibration_items))
    if trains:
        uses.append(("training", json_digest([cell.task_fingerprint, "training"]), None))
    inputs = []
    for use, digest, count in uses:
        # MLflow keeps 36 letters of a digest; the whole fingerprint is in the profile
        profile = json.dumps({"fingerprint": cell.task_fingerprint, "items": count})
        source = json.dumps({"task": cell.task, "fingerprint": cell.task_fingerprint, "use": use})
        name = cell.task if use == cell.split else f"{cell.task} {use}"
        data = Dataset(name, digest[:32], "code", source, profile=profile)
        inputs.append(DatasetInput(data, [InputTag("mlflow.data.context", use)]))
    return inputs


def write_files(folder: Path, record: Record) -> None:
    """Write what a run carries besides numbers: record, site table, range plot and log."""
    (folder / "record.json").write_text(json.dumps(record.to_json(), indent=1), encoding="utf-8")
    (folder / "log.txt").write_text(_log_text(record), encoding="utf-8")
    if record.sites:
        import csv

        with (folder / "sites.csv").open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, fieldnames=list(record.sites[0]))
            writer.writeheader()
            writer.writerows(record.sites)
        from benchmark.report.ranges import save_range_plot

        save_range_plot(record, folder / "ranges.png")


def table_text(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table as MLflow's UI shows one."""
    return json.dumps({"columns": list(columns), "data": [list(row) for row in rows]})


def ended_at(record: Record) -> int:
    """When a cell was finished, in milliseconds since 1970."""
    return int(datetime.fromisoformat(record.finished_at).timestamp() * 1000)


def _log_text(record: Record) -> str:
    lines = [f"{record.finished_at} {record.status} {record.cell} in {record.duration_s:.1f} s"]
    if record.reason:
        lines.append(record.reason)
    lines += [f"{key}: {value}" for key, value in metrics_of(record).items()]
    for title, block in (("details", record.details), ("provenance", record.provenance)):
        lines.append(f"{title}: {json.dumps(dict(block), indent=1)}")
    return "\n".join([*lines, ""])
