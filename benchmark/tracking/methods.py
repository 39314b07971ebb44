"""A run for each method: its drop over bits, a metric a model, so that methods can be compared as runs.

They are rebuilt from cells like everything here. A run stays as long as the numbers that it has stay; numbers
that changed give a new one in its place, because MLflow never forgets a point of a metric.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from benchmark.keep.record import Record
from benchmark.tracking.runs import RESULTS_TAG, search_all
from benchmark.tracking.summary import means
from quanttune.digests import json_digest

if TYPE_CHECKING:
    from mlflow import MlflowClient

KIND = "method"
_LATEST = "numbers"
Numbers = Mapping[tuple[str, int], float]


def log_methods(client: MlflowClient, experiment_id: str, records: Iterable[Record], results: str) -> None:
    """Bring the runs of methods up to date.

    Args:
        client: Where.
        experiment_id: Our experiment.
        records: Finished cells; what a method's run has of others stays.
        results: The folder they are in.
    """
    by_label: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        if record.result is not None and not record.cell.is_reference:
            by_label[record.cell.label].append(record)
    known = {
        run.data.tags.get("label"): run
        for run in search_all(client, experiment_id, f"tags.kind = '{KIND}'")
        if run.data.tags.get(RESULTS_TAG) == results
    }
    for label, found in sorted(by_label.items()):
        _log(client, experiment_id, known.get(label), label, found, results)


def _log(
    client: MlflowClient, experiment_id: str, run: Any, label: str, records: list[Record], results: str
) -> None:
    from mlflow.entities import Metric, Param

    numbers = means(records)
    digest = json_digest([[name, step, value] for (name, step), value in sorted(numbers.items())])
    if run is not None and run.data.tags.get(_LATEST) == digest:
        return
    kept: Numbers = {} if run is None else _numbers_of(client, run)
    changed = {key for key in set(kept) & set(numbers) if kept[key] != numbers[key]}
    if run is not None and changed:
        client.delete_run(run.info.run_id)
    if run is None or changed:
        tags = {"kind": KIND, "label": label, RESULTS_TAG: results, "mlflow.source.name": "quanttune-bench"}
        run = client.create_run(experiment_id, run_name=label, tags=tags)
        client.log_batch(run.info.run_id, params=[Param("method", records[0].cell.method)])
        kept, numbers = {}, {**kept, **numbers}
    now = int(time.time() * 1000)
    metrics = [
        Metric(name, value, now, step)
        for (name, step), value in sorted(numbers.items())
        if (name, step) not in kept
    ]
    for start in range(0, len(metrics), 1000):
        client.log_batch(run.info.run_id, metrics=metrics[start : start + 1000])
    client.set_terminated(run.info.run_id, "FINISHED")
    client.set_tag(run.info.run_id, _LATEST, digest)


def _numbers_of(client: MlflowClient, run: Any) -> dict[tuple[str, int], float]:
    """What a run has, by metric and step."""
    return {
        (name, point.step): point.value
        for name in sorted(run.data.metrics)
        for point in client.get_metric_history(run.info.run_id, name)
    }
