"""Processor, memory and GPU of this machine while a run lasts, as MLflow's own system metrics."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow import MlflowClient


@contextlib.contextmanager
def watch_system(client: MlflowClient, run_id: str) -> Iterator[None]:
    """Log what the machine does to a run, every ten seconds, in a thread; nothing without ``psutil``."""
    logging.getLogger("mlflow.system_metrics").setLevel(logging.CRITICAL)
    try:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        monitor = SystemMetricsMonitor(run_id, tracking_uri=client.tracking_uri)
        monitor.start()
    except Exception:  # an optional package, or a version without it: the run is logged all the same
        yield
        return
    try:
        yield
    finally:
        with contextlib.suppress(Exception):
            monitor.finish()
