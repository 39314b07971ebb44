"""What figures need from the models themselves: measured by `analyse`, kept as stages, read without one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmark.engine.session import Session, stage_scope
from benchmark.keep.reference_store import ReferenceStore, measuring_option
from benchmark.keep.stages import Stages
from benchmark.keep.store import Store
from benchmark.report.rows import SuiteRows
from benchmark.report.site_tables import (
    REACHES,
    VERSION,
    errors_of,
    metrics_of,
    reaches_of,
    rules_of,
    site_tables,
)
from benchmark.report.sweep import saturation_scores
from benchmark.report.weight_sets import REFERENCE, WeightSet, weight_sets
from quanttune.digests import tensor_digest
from quanttune.errors import QuantTuneError, StoreError
from quanttune.quantization.scheme import Scheme

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from baselines.method import Context
    from quanttune.quantization import TensorStatistics

Progress = Callable[[str, int, int], None]


class NotMeasuredError(QuantTuneError):
    """What a figure asks for is not kept, and this analysis only reads."""


class ModelAnalysis:
    """One model of a suite under its first profile, seed and granularity.

    What is analysed are static ranges of activations: precisions that quantize weights alone, or choose a
    range anew for every token, take no part.

    Args:
        rows: The suite's finished cells.
        store: Where they are.
        model: Name of the model.
        device: Where to compute what is not kept yet, and whose kept results are read.
        progress: Told of that work; ``None`` if nothing is to be measured, which makes what is not kept a
            :class:`NotMeasuredError`.
    """

    def __init__(
        self, rows: SuiteRows, store: Store, model: str, device: torch.device, progress: Progress | None
    ) -> None:
        self.model = model
        self.suite = rows.suite
        self._store = store
        self._device = device
        self._reads_only = progress is None
        self._progress = progress or _nobody
        self._done = [
            record
            for cell in rows.cells
            if cell.model == model
            and (record := rows.records.get(cell.cell_id))
            and record.result
            and (cell.is_reference or cell.scheme.is_static)
        ]
        self.cell = next(record.cell for record in self._done if not record.cell.is_reference)
        self._reference_digest = str(self._done[0].reference_digest)
        self.precisions = tuple(
            text for text in dict.fromkeys(rows.suite.precisions) if Scheme.parse(text).is_static
        )

    def close(self) -> None:
        """Free the model and what was read, if they were needed; both come back when they are asked for."""
        for name in ("_session", "_read"):
            self.__dict__.pop(name, None)

    @cached_property
    def weight_sets(self) -> list[WeightSet]:
        """The reference, then what each method that trains made of it, controls first."""
        return weight_sets(self._done, self.cell, self._reference_digest)

    @cached_property
    def rules(self) -> tuple[str, ...]:
        """The range rules that the error is split for, see :func:`benchmark.report.site_tables.rules_of`."""
        return rules_of(type(record.cell.make_method()) for record in self._done)

    @property
    def sites(self) -> list[tuple[str, str]]:
        """Id and kind of each activation site of the profile, in the order of the forward pass."""
        rows = next(record.sites for record in self._done if record.sites)
        return [(str(row["id"]), str(row["kind"])) for row in rows if row["kind"] != "weight"]

    def metrics(self, weights: WeightSet) -> dict[str, dict[str, float]]:
        """The outlier metrics of each site, see :data:`benchmark.report.site_tables.METRICS`."""
        return metrics_of(self._tables(weights), self._site_ids)

    def errors(self, weights: WeightSet) -> Iterator[tuple[str, str, dict[str, float]]]:
        """Precision, range rule and the parts of the quantization error, of one site after the other."""
        return errors_of(self._tables(weights), self._site_ids, self.precisions, self.rules)

    def reaches(self, weights: WeightSet) -> dict[str, dict[float, float]]:
        """By precision and limit of the ordinary: the mean share of the amplification with min-max."""
        return reaches_of(self._tables(weights), self._site_ids, self.precisions)

    def statistics(self, weights: WeightSet, sites: list[str]) -> dict[str, TensorStatistics]:
        """Statistics, histogram included, of a few sites."""
        from quanttune.quantization.statistics import LAYOUT, statistics_from_tensors, statistics_to_tensors

        def make() -> dict[str, Tensor]:
            statistics = self._loaded(weights).statistics()
            return statistics_to_tensors({site_id: statistics[site_id] for site_id in sites})

        key = {**self._key(weights), "sites": sites, "layout": LAYOUT}
        return statistics_from_tensors(self._kept("histograms", key, make))

    def sweep(self, precision: str, items: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores of the reference's items under each saturation.

        Args:
            precision: Bit widths.
            items: How many items of the suite's split, evenly spaced over the split.

        Returns:
            Ids of shape ``(items,)``; scores of shape ``(saturations, items)``.
        """
        from quanttune.analysis import SATURATIONS

        limit = items if self.cell.limit is None else min(items, self.cell.limit)
        key = {
            **self._key(self.weight_sets[0]),
            "precision": precision,
            "saturations": list(SATURATIONS),
            "items": limit,
            "split": self.cell.split,
            "weight_granularity": self.cell.weight_granularity,
        }

        def make() -> dict[str, Tensor]:
            return saturation_scores(self._session, self.cell, precision, limit, self._progress)

        kept = self._kept("saturation", key, make)
        return kept["ids"].numpy(), kept["scores"].numpy()

    def reference_scores(self, ids: np.ndarray) -> np.ndarray | None:
        """The FP32 reference's scores of these items; ``None`` if the suite has not measured them."""
        for record in self._done:
            if record.cell.is_reference:
                items = self._store.items(record.cell.cell_id)
                place = {int(item): index for index, item in enumerate(items["ids"])}
                if all(int(item) in place for item in ids):
                    return items["scores"][[place[int(item)] for item in ids]]
        return None

    def _kept(
        self, stage: str, key: Mapping[str, Any], make: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """A stage: measured unless it is kept, or refused if it is not and nothing is to be measured."""
        if not self._reads_only:
            return self._stages.tensors(stage, key, make)
        name = self._stages.reference(stage, key)
        if name not in self._read:
            found = self._stages.open(name)
            if found is None:
                raise NotMeasuredError(f"{stage} of {self.model} is not kept in {self._stages.folder}")
            self._read[name] = found
        return self._read[name]

    @cached_property
    def _read(self) -> dict[str, dict[str, Tensor]]:
        return {}

    @cached_property
    def _stages(self) -> Stages:
        # Known from the records, so that what is kept can be read without making the model.
        return self._store.stages.scoped(**self._scope)

    @property
    def _scope(self) -> dict[str, Any]:
        cell = self.cell
        return stage_scope(
            cell.model_identity, self._reference_digest, cell.task_fingerprint, self._device.type
        )

    def _key(self, weights: WeightSet) -> dict[str, Any]:
        cell = self.cell
        return {
            "version": VERSION,
            "weights": weights.digest,
            "profile": cell.profile,
            "calibration_items": cell.calibration_items,
            "seed": cell.seed,
            "symmetric": cell.symmetric,
        }

    @property
    def _site_ids(self) -> list[str]:
        return [site_id for site_id, _ in self.sites]

    def _tables(self, weights: WeightSet) -> Mapping[str, Tensor]:
        key = {
            **self._key(weights),
            "precisions": list(self.precisions),
            "rules": list(self.rules),
            "reaches": list(REACHES),
        }
        return self._kept("site_analysis", key, lambda: self._analyse(weights))

    def _analyse(self, weights: WeightSet) -> dict[str, Tensor]:
        from quanttune.analysis import infinity_norms
        from quanttune.inputs import to_device

        context = self._loaded(weights)
        statistics = context.statistics()
        what = f"{self.model}, {weights.name}"
        norms = infinity_norms(
            context.model,
            (to_device(batch.inputs, self._device) for batch in context.calibration),
            context.profile_sites,
            lambda done: self._progress(f"{what}: infinity norms", done, len(context.calibration)),
        )
        return site_tables(
            statistics,
            norms,
            self.precisions,
            self.rules,
            self.cell.symmetric,
            lambda done: self._progress(f"{what}: error by cause", done, len(statistics)),
        )

    def _loaded(self, weights: WeightSet) -> Context:
        """The context of the weights' cell, with a model that holds them."""
        session = self._session
        if weights.name == REFERENCE:
            return session.context(self.cell)
        context = session.context(weights.cell)
        tuned = self._kept_weights(weights)
        if tuned is None:
            tuned = weights.cell.make_method().quantize(context).weights
        if tuned is None or (loaded := context.changed(tuned)).weights_digest != weights.digest:
            raise self._changed(weights.name)
        return loaded

    def _kept_weights(self, weights: WeightSet) -> dict[str, Tensor] | None:
        """The tuned weights that the record names, if they are still kept."""
        # Older versions named no model there; what is kept is known by its content.
        unnamed = {name: value for name, value in self._scope.items() if name != "model"}
        for scope in (self._scope, unnamed):
            for key, tensors in Stages(self._stages.folder, scope).kept("tuning"):
                if key.get("method") == weights.cell.method and tensor_digest(tensors) == weights.digest:
                    return tensors
        return None

    def _changed(self, what: str) -> StoreError:
        again = "run --all" if isinstance(self._store, ReferenceStore) else "run --all --overwrite always"
        again += f" --suite {self.suite.origin}{measuring_option(self._store)}"
        return StoreError(
            f"{what} weights of {self.model} are not those that were measured; measure the suite on this "
            f"machine: `python -m benchmark {again}`"
        )

    @cached_property
    def _session(self) -> Session:
        session = Session(self.model, self._store.stages, self._device, self._progress)
        if session.reference_digest != self._reference_digest:
            raise self._changed(REFERENCE)
        return session


def _nobody(name: str, done: int, total: int) -> None:
    """Told of work that is never done."""


def analyses_of(
    rows: SuiteRows, store: Store, device: torch.device, progress: Progress | None
) -> list[ModelAnalysis]:
    """One analysis for each model of which a cell with static ranges of activations is done.

    Args:
        rows: The suite's finished cells.
        store: Where they are.
        device: As of :class:`ModelAnalysis`.
        progress: As of :class:`ModelAnalysis`.
    """
    done = [rows.records[cell.cell_id] for cell in rows.cells if cell.cell_id in rows.records]
    models = dict.fromkeys(
        record.cell.model
        for record in done
        if record.result and not record.cell.is_reference and record.cell.scheme.is_static
    )
    return [ModelAnalysis(rows, store, model, device, progress) for model in models]
