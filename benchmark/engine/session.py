"""One model in memory: its gated reference, sites, calibration items and copies with tuned weights."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from benchmark.engine.measure import Items, evaluate
from benchmark.engine.validation import TaskValidation
from benchmark.grid.autocast import FULL_PRECISION, autocast_type
from benchmark.grid.cells import ENGINE_VERSION
from benchmark.keep.stages import Stages
from benchmark.subject.lookup import get_model
from benchmark.subject.tasks.task import get_task
from quanttune.digests import json_digest, tensor_digest
from quanttune.errors import QuantTuneError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch
    from torch import Tensor, nn

    from baselines.method import Batch, Context
    from benchmark.grid.cells import Cell
    from quanttune.quantization import Quantized, SiteTable

CALIBRATION_BATCH = 32


class GateError(QuantTuneError):
    """A reference whose metric is not the expected one; nothing is quantized from it."""


def stage_scope(model_identity: str, reference: str, task: str, device: str) -> dict[str, Any]:
    """What is in the key of every stage that is computed from a reference.

    Args:
        model_identity: Two models may have the same weights and differ in their configuration: in the number
            of heads, an activation function or how a picture is scaled.
        reference: Digest of the weights.
        task: Fingerprint of the data.
        device: Its kind.
    """
    return {"model": model_identity, "reference": reference, "task": task, "device": device}


@dataclass(frozen=True)
class _Changed:
    """A copy of the model with other weights."""

    weights: Mapping[str, Tensor]
    digest: str
    model: nn.Module


class Session:
    """What the cells of one model share while they run in the same process.

    Args:
        model: Name of the model.
        stages: Where expensive results are kept.
        device: Where to compute.
        progress: Report of long work.
        processes: How many processes share a fine-tuning.
    """

    def __init__(
        self,
        model: str,
        stages: Stages,
        device: torch.device,
        progress: Callable[[str, int, int], None],
        processes: int = 1,
    ) -> None:
        self.name = model
        self.entry = get_model(model)
        self.task = get_task(self.entry.task)
        self.device = device
        self.progress = progress
        self.processes = processes
        self._stages = stages
        self._draws: dict[tuple[int, int], list[int]] = {}
        self._calibration: tuple[tuple[int, int], list[Batch]] | None = None
        self._changed: _Changed | None = None

    @cached_property
    def model_identity(self) -> str:
        """Digest of what decides the reference weights, as in the cells."""
        return json_digest(self.entry.identity())

    @cached_property
    def pins(self) -> dict[str, Any]:
        """What the lock file pins of this model and its data; empty where the identity holds every digest."""
        pins = self.entry.pins()
        data = self.task.content_fingerprints()
        return {**pins, **({"data": data} if data else {})}

    def _calibration_ids(self, items: int, seed: int) -> list[int]:
        if (items, seed) not in self._draws:  # among a million training items a draw takes seconds
            self._draws[items, seed] = self.task.calibration_ids(items, seed)
        return self._draws[items, seed]

    def calibration_pin(self, items: int, seed: int) -> dict[str, Any]:
        """Digest of the ids of a calibration draw, for the lock file."""
        ids = self._calibration_ids(items, seed)
        return {"calibration": {f"{items} items, seed {seed}": json_digest(ids)}}

    @cached_property
    def _weights(self) -> dict[str, Tensor]:
        return self.entry.make_reference(self._stages, self.progress, self.device)

    @cached_property
    def reference_digest(self) -> str:
        """Digest of the reference weights."""
        return tensor_digest(self._weights)

    @cached_property
    def stages(self) -> Stages:
        """Stages that belong to these reference weights, this data and this kind of device."""
        return self._stages.scoped(**self.identity)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What decides everything a method computes from the reference, apart from its own settings."""
        return stage_scope(
            self.model_identity, self.reference_digest, self.task.fingerprint(), self.device.type
        )

    @cached_property
    def model(self) -> nn.Module:
        """The reference, in evaluation mode on the device."""
        model = self.entry.build()
        model.load_state_dict(self._weights)
        return model.to(self.device).eval()

    def with_weights(self, weights: Mapping[str, Tensor] | None) -> tuple[nn.Module, str]:
        """A model with the given weights and their digest; the reference itself for ``None``.

        The last one is kept, one at a time, so that a method and the evaluation share copy and digest.
        """
        from quanttune.quantization.equivalence import load_weights

        if weights is None:
            return self.model, self.reference_digest
        if self._changed is not None and self._changed.weights is weights:
            return self._changed.model, self._changed.digest
        digest = tensor_digest(weights)
        if self._changed is None or self._changed.digest != digest:
            model = copy.deepcopy(self.model)
            load_weights(model, weights)
            self._changed = _Changed(weights, digest, model.eval())
        self._changed = replace(self._changed, weights=weights)
        return self._changed.model, digest

    def check_changed(self, quantized: Quantized, changed: nn.Module, cell: Cell) -> dict[str, float]:
        """Refuse changed weights that break what the model or the method promises.

        Args:
            quantized: A method's result that has weights.
            changed: The model that holds them.
            cell: Whose calibration items are run, where the same function was claimed.

        Returns:
            What is worth recording: the relative difference of logits, where it was measured.

        Raises:
            ChangedFunctionError: If tied weights were changed apart, or the function is another one than
                claimed.
        """
        from quanttune.inputs import to_device
        from quanttune.quantization.equivalence import check_same_function, refuse_untied

        if quantized.weights is not None:
            refuse_untied(self.model, quantized.weights, quantized.untied)
        if not quantized.same_function:
            return {}
        batches = self.calibration(cell.calibration_items, cell.seed)
        inputs = (to_device(batch.inputs, self.device) for batch in batches)
        return {"function_difference": check_same_function(self.model, changed, inputs)}

    @cached_property
    def sites(self) -> SiteTable:
        """Every site of the model."""
        from quanttune.inputs import to_device
        from quanttune.quantization import discover_sites

        first = self.calibration(2, 0)[0]
        return discover_sites(self.model, to_device(first.inputs, self.device))

    def calibration(self, items: int, seed: int) -> list[Batch]:
        """The calibration draw of a seed, the same for every method; a device holds one batch at a time."""
        if self._calibration is None or self._calibration[0] != (items, seed):
            ids = self._calibration_ids(items, seed)
            size = min(CALIBRATION_BATCH, self.task.batch_size)
            batches = self.task.batches("train", self.entry, ids=ids, batch_size=size)
            self._calibration = ((items, seed), list(batches))
        return self._calibration[1]

    def context(self, cell: Cell) -> Context:
        """Everything the method of one of this model's cells may use."""
        from baselines.method import Context

        return Context(
            model=self.model,
            sites=self.sites,
            scheme=cell.scheme,
            calibration=self.calibration(cell.calibration_items, cell.seed),
            training=self.task.training_data(self.entry),
            recipe=self.entry.recipe,
            seed=cell.seed,
            device=self.device,
            stages=self.stages,
            identity=self.identity,
            autocast=autocast_type(cell.autocast),
            processes=self.processes,
            progress=self.progress,
            weights_digest=self.reference_digest,
            copies=self.with_weights,
            validation=TaskValidation(self.task, self.entry, self.device, self.progress, self.sites.known),
        )

    def fp32_items(
        self,
        model: nn.Module,
        digest: str,
        limit: int | None,
        split: str = "test",
        autocast: str = FULL_PRECISION,
    ) -> Items:
        """What ``model``, unquantized, does on a split; measured once for given weights.

        Args:
            model: The reference or a tuned copy.
            digest: Digest of its weights.
            limit: Items of the split.
            split: ``test`` or ``validation``.
            autocast: Name of the mixed-precision type.
        """

        def make() -> dict[str, Tensor]:
            return evaluate(
                model,
                self.task,
                self.entry,
                split=split,
                limit=limit,
                device=self.device,
                progress=self.progress,
                stage="FP32 evaluation",
                autocast=autocast_type(autocast),
            ).tensors()

        key: dict[str, Any] = {"engine": ENGINE_VERSION, "weights": digest, "limit": limit}
        key |= {} if split == "test" else {"split": split}
        key |= {} if autocast == FULL_PRECISION else {"autocast": autocast}
        # what was kept before a metric was there lacks what it needs of the items
        key |= {"quantities": " ".join(self.task.quantities)} if self.task.quantities else {}
        return Items.from_tensors(self.stages.tensors("fp32_items", key, make))

    def check_gate(self, autocast: str = FULL_PRECISION) -> None:
        """Refuse a reference that is not finite, or does not reach the metric it is known for.

        The whole test split is measured, whatever the cell's limit, because the expected value belongs to it.

        Args:
            autocast: Name of the mixed-precision type to measure with.

        Raises:
            GateError: If a weight is NaN or infinite, or the metric further from the expected one than the
                entry's tolerance.
        """
        from quanttune.finite import refuse_not_finite

        try:
            refuse_not_finite(self.model)
        except QuantTuneError as error:
            raise GateError(f"model {self.name}: {error}") from error
        if self.entry.expected is None:
            return
        items = self.fp32_items(self.model, self.reference_digest, None, autocast=autocast)
        value = self.task.metric_value(items.scores)
        # Written so that NaN is refused, too.
        if not abs(value - self.entry.expected) <= self.entry.tolerance:
            raise GateError(
                f"reference of {self.name}: {self.task.metric} {value:.2f} on the test split, expected "
                f"{self.entry.expected:.2f} +- {self.entry.tolerance:g}; its weights or data are not "
                "the known ones, so nothing is quantized from it. Run with a fresh --results folder; if you "
                "changed the recipe on purpose, update `expected` in the model's file"
            )
