"""Reference and tuned weights as models of MLflow: named by digest, with the metrics measured with them.

Nothing is uploaded: a model says where the store has its safetensors.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from benchmark.keep.record import Record

if TYPE_CHECKING:
    from mlflow import MlflowClient

_NOT_IN_NAMES = re.compile(r"[/:.%\"'`]+")
_EXTERNAL = "mlflow.model.isExternal"


class Weights:
    """The models of one experiment, each made once.

    Args:
        client: Where.
        experiment_id: Our experiment.
    """

    def __init__(self, client: MlflowClient, experiment_id: str) -> None:
        self._client, self._experiment_id = client, experiment_id
        self._known: dict[str, str] = {}

    def of(self, record: Record, run_id: str) -> str | None:
        """The model whose weights a cell was measured with; ``None`` for a skipped cell.

        Args:
            record: The cell.
            run_id: Its run, which is the origin of a model that is new.
        """
        digest = record.weights_digest
        if digest is None or record.result is None:
            return None
        if digest not in self._known:
            self._known[digest] = self._find(digest) or self._make(record, digest, run_id)
        return self._known[digest]

    def link(self, record: Record, run_id: str) -> None:
        """Show the weights that a run began with as its input, and those it tuned as its output."""
        from mlflow.entities import LoggedModelInput, LoggedModelOutput

        own = self.of(record, run_id)
        reference = self._known.get(record.reference_digest or "") or self._find(
            record.reference_digest or ""
        )
        if reference is not None:
            self._known[record.reference_digest or ""] = reference
            self._client.log_inputs(run_id, models=[LoggedModelInput(reference)])
        if own is not None and own != reference:
            self._client.log_outputs(run_id, [LoggedModelOutput(own, 0)])

    def _find(self, digest: str) -> str | None:
        if not digest:
            return None
        found = self._client.search_logged_models(
            [self._experiment_id], filter_string=f"tags.weights_digest = '{digest}'", max_results=1
        )
        return str(found[0].model_id) if found else None

    def _make(self, record: Record, digest: str, run_id: str) -> str:
        cell = record.cell
        tuned = digest != record.reference_digest
        kept = None if record.quantized is None else record.quantized.weights
        name = f"{cell.model} {cell.method if tuned else 'reference'}"
        about = {
            "model": cell.model,
            "weights": "tuned" if tuned else "reference",
            "method": cell.method if tuned else "",
            "stage": kept or "",
            "digest": digest,
        }
        model = self._client.create_logged_model(
            self._experiment_id,
            name=_NOT_IN_NAMES.sub("_", name),
            source_run_id=run_id,
            tags={"weights_digest": digest, _EXTERNAL: "true"},
            params={key: value for key, value in about.items() if value},
            model_type="safetensors",
        )
        self._client.finalize_logged_model(model.model_id, "READY")
        return str(model.model_id)
