"""The comparison that matters, as the UI of MLflow opens it: filter, columns and charts under one address.

MLflow keeps such a view as a tag of the experiment, ``mlflow.sharedViewState.<key>``, and lists it among its
saved views. Its fields are those of the UI of MLflow 3 (seen in 3.17); a UI that does not know them ignores
the tag, or shows its own defaults.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow import MlflowClient

KIND_TAG, KIND = "mlflow.experimentKind", "custom_model_development"
"""By which the UI opens with runs, models and charts, and not with traces."""
DROPS, CELLS = "drop-by-precision", "cells"
_TAG = "mlflow.sharedViewState."
_SINCE = 1767225600000  # 2026-01-01: a view that is written again is the same view
_COLUMNS = {
    "params": ("model", "profile"),
    "tags": ("label", "scheme", "suite", "status"),
    "metrics": ("score", "drop", "drop_ci_low", "drop_ci_high", "recovery", "training_s", "peak_mb"),
}
_NOTE = """Cells of QuantTune-Bench: each run is one model quantized by one method at one precision.

* `drop` is FP32 minus the quantized model's metric, with its paired 95 % interval; `recovery` is what is left
  in percent; `score` is the task's own metric.
* Saved view *Drop by precision* has a chart a model and a line a method, over bits; *Cells* is the table.
* A run tagged `kind = 'invocation'` is a call of `run` or `sync`; its cells are its children.
* Searches: `tags.suite LIKE '%laptop%' and tags.scheme = 'W6A6' and metrics.drop < 1`; see docs/mlflow.md.
"""


def address(port: int, experiment_id: str, view: str = DROPS) -> str:
    """The address of a view on a UI of this machine."""
    mode = "CHART" if view == DROPS else "TABLE"
    where = f"http://127.0.0.1:{port}/#/experiments/{experiment_id}/runs"
    return f"{where}?compareRunsMode={mode}&viewStateShareKey={view}"


def mark_experiment(client: MlflowClient, experiment_id: str) -> None:
    """Say what kind of experiment ours is, once."""
    tags = client.get_experiment(experiment_id).tags
    if tags.get(KIND_TAG) != KIND:
        client.set_experiment_tag(experiment_id, KIND_TAG, KIND)
        client.set_experiment_tag(experiment_id, "mlflow.experiment.primaryMetric.name", "drop")
        client.set_experiment_tag(experiment_id, "mlflow.note.content", _NOTE)


def save_views(client: MlflowClient, experiment_id: str, parent: str, series: Iterable[str]) -> None:
    """Let the views show an invocation.

    Args:
        client: Where.
        experiment_id: Our experiment.
        parent: The invocation's run.
        series: Its metrics that are drawn over bits, ``drop/<model> <profile>/<method>``.
    """
    states = {DROPS: ("Drop by precision", _drops(parent, series)), CELLS: ("Cells", _cells())}
    for key, (name, state) in states.items():
        view = {"name": name, "createdAt": _SINCE, "updatedAt": _SINCE, "state": json.dumps(state)}
        client.set_experiment_tag(experiment_id, _TAG + key, json.dumps(view))


def _drops(parent: str, series: Iterable[str]) -> dict[str, Any]:
    by_model: dict[str, list[str]] = defaultdict(list)
    for name in sorted(set(series)):
        by_model[name.rpartition("/")[0]].append(name)
    section = {"uuid": "drops", "name": "Drop by precision (bits), per method", "display": True}
    charts = [
        {
            "type": "LINE",
            "uuid": f"drop-{number}",
            "metricSectionId": "drops",
            "isGenerated": False,
            "deleted": False,
            "displayName": model.removeprefix("drop/"),
            "metricKey": names[0],
            "selectedMetricKeys": names,
            "xAxisKey": "step",
            "useGlobalXaxisKey": False,
            "xAxisScaleType": "linear",
            "scaleType": "linear",
            "lineSmoothness": 0,
            "useGlobalLineSmoothing": False,
            "displayPoints": True,
            "selectedXAxisMetricKey": "",
            "yAxisKey": "metric",
            "yAxisExpressions": [],
            "ignoreOutliers": False,
            "range": {},
        }
        for number, (model, names) in enumerate(sorted(by_model.items()))
    ]
    return _state(
        searchFilter=f"attributes.run_id = '{parent}'",
        orderByKey="attributes.start_time",
        orderByAsc=False,
        compareRunCharts=charts,
        compareRunSections=[{**section, "isReordered": True}],
        runListHidden=False,
    )


def _cells() -> dict[str, Any]:
    chart: dict[str, Any] = {"isGenerated": False, "deleted": False, "metricSectionId": "cells"}
    axis = {"type": "METRIC"}
    charts = [
        {**chart, "type": "BAR", "uuid": "cells-drop", "metricKey": "drop", "displayName": "drop"},
        {
            **chart,
            "type": "BAR",
            "uuid": "cells-recovery",
            "metricKey": "recovery",
            "displayName": "recovery",
        },
        {
            **chart,
            "type": "SCATTER",
            "uuid": "cells-cost",
            "displayName": "drop against seconds of calibration",
            "xaxis": {"key": "calibration_s", **axis},
            "yaxis": {"key": "drop", **axis},
            "runsCountToCompare": 100,
        },
        {
            **chart,
            "type": "PARALLEL",
            "uuid": "cells-parallel",
            "displayName": "method, precision, drop",
            "selectedParams": ["model", "method", "precision"],
            "selectedMetrics": ["drop"],
            "showAllRuns": True,
        },
    ]
    return _state(
        searchFilter="tags.kind = 'cell' and attributes.status = 'FINISHED'",
        orderByKey="metrics.`drop`",
        orderByAsc=True,
        compareRunCharts=charts,
        compareRunSections=[{"uuid": "cells", "name": "Cells", "display": True, "isReordered": True}],
        runsHiddenMode="SHOW_ALL",
    )


def _state(**fields: Any) -> dict[str, Any]:
    columns = [f"{kind}.`{name}`" for kind, names in _COLUMNS.items() for name in names]
    return {
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "modelVersionFilter": "All Runs",
        "datasetsFilter": [],
        "selectedColumns": columns,
        "isAccordionReordered": True,
        "groupBy": None,
        "useGroupedValuesInCharts": True,
        "hideEmptyCharts": True,
        **fields,
    }
