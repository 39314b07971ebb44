"""The comparison that matters, as the UI of MLflow opens it: filter, columns and charts under one address.

MLflow keeps such a view as a tag of the experiment, ``mlflow.sharedViewState.<key>``, and lists it among its
saved views. Its fields are those of the UI of MLflow 3 (seen in 3.17); a UI that does not know them ignores
the tag, or shows its own defaults.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow import MlflowClient

KIND_TAG, KIND = "mlflow.experimentKind", "custom_model_development"
"""By which the UI opens with runs, models and charts, not with traces; that of 3.17 goes by its address."""
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
* Runs of `tags.kind = 'method'` are methods; one of `'invocation'` is a call of `run` or `sync`, whose
  children, of `'cell'`, are cells.
* Searches: `tags.suite LIKE '%laptop%' and tags.scheme = 'W6A6' and metrics.drop < 1`; see docs/mlflow.md.
"""


def address(port: int, experiment_id: str, view: str = DROPS) -> str:
    """The address of a view on a UI of this machine."""
    mode = "CHART" if view == DROPS else "TABLE"
    where = f"http://127.0.0.1:{port}/#/experiments/{experiment_id}/runs"
    return f"{where}?workflowType=machine_learning&compareRunsMode={mode}&viewStateShareKey={view}"


def mark_experiment(client: MlflowClient, experiment_id: str) -> None:
    """Say what kind of experiment ours is, once."""
    tags = client.get_experiment(experiment_id).tags
    if tags.get(KIND_TAG) != KIND:
        client.set_experiment_tag(experiment_id, KIND_TAG, KIND)
        client.set_experiment_tag(experiment_id, "mlflow.experiment.primaryMetric.name", "drop")
        client.set_experiment_tag(experiment_id, "mlflow.note.content", _NOTE)


def save_views(client: MlflowClient, experiment_id: str, sections: Iterable[str]) -> None:
    """Let the views show what there is; charts of what an earlier call named stay.

    Args:
        client: Where.
        experiment_id: Our experiment.
        sections: What the runs of methods have a ``drop/`` of: models and profiles.
    """
    tags = client.get_experiment(experiment_id).tags
    every = sorted({*sections, *_drawn(tags.get(_TAG + DROPS))})
    states = {DROPS: ("Drop by precision", _drops(every)), CELLS: ("Cells", _cells())}
    for key, (name, state) in states.items():
        view = {"name": name, "createdAt": _SINCE, "updatedAt": _SINCE, "state": json.dumps(state)}
        if tags.get(_TAG + key) != json.dumps(view):
            client.set_experiment_tag(experiment_id, _TAG + key, json.dumps(view))


def _drawn(view: str | None) -> list[str]:
    """What a saved view has charts of; nothing if somebody made another one of it."""
    try:
        charts = json.loads(json.loads(view or "")["state"])["compareRunCharts"]
        return [str(chart["displayName"]) for chart in charts if chart["metricKey"].startswith("drop/")]
    except (KeyError, TypeError, ValueError, AttributeError):
        return []


def _drops(sections: Iterable[str]) -> dict[str, Any]:
    line = {
        "type": "LINE",
        "isGenerated": False,
        "deleted": False,
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
    parts = {"drop": "Drop by precision: bits on the axis", "recovery": "Percent of FP32 by precision"}
    charts = [
        {
            **line,
            "uuid": f"{part}-{number}",
            "metricSectionId": part,
            "displayName": section,
            "metricKey": f"{part}/{section}",
        }
        for part in parts
        for number, section in enumerate(sections)
    ]
    return _state(
        searchFilter="tags.kind = 'method'",
        orderByKey="tags.`mlflow.runName`",
        orderByAsc=True,
        compareRunCharts=charts,
        compareRunSections=[
            {"uuid": part, "name": name, "display": True, "isReordered": True} for part, name in parts.items()
        ],
        runsHiddenMode="SHOW_ALL",
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
