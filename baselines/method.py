"""What a quantization method is given, what it returns, and where it registers."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from quanttune.digests import tensor_digest
from quanttune.inputs import ModelInputs, to_device
from quanttune.quantization import Precision, Quantizer, SiteTable, TensorStatistics, collect_statistics
from quanttune.quantization.statistics import statistics_from_tensors, statistics_to_tensors
from quanttune.registry import Registry

Progress = Callable[[str, int, int], None]
"""Called with the name of a stage, the steps done and the steps in all."""


@dataclass(frozen=True)
class Batch:
    """Items of a task.

    Args:
        inputs: What the model is called with, ``N`` items.
        targets: Class ids of shape ``(N,)``, or token ids of shape ``(N, tokens)``.
    """

    inputs: ModelInputs
    targets: Tensor


class TrainingData(Protocol):
    """The training split of a task, as a method that trains sees it."""

    @property
    def size(self) -> int:
        """Number of training items."""
        ...

    def batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
        """Endless batches, reshuffled each epoch with ``generator``."""
        ...

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The task's mean loss, a scalar."""
        ...


class StageCache(Protocol):
    """Keeps expensive intermediate tensors, shared by every cell that needs them."""

    def tensors(
        self, stage: str, key: Mapping[str, Any], make: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Return the tensors of ``stage`` for ``key``, making and keeping them if they are not there yet."""
        ...

    def checkpoint(self, stage: str, key: Mapping[str, Any]) -> Path | None:
        """Where unfinished work on that stage is saved for a resumption; ``None`` for nowhere."""
        ...


class MemoryStages:
    """A stage cache for one process, for use without the suite."""

    def __init__(self) -> None:
        self._kept: dict[str, dict[str, Tensor]] = {}

    def tensors(
        self, stage: str, key: Mapping[str, Any], make: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """See :class:`StageCache`."""
        name = f"{stage}:{sorted(key.items())!r}"
        if name not in self._kept:
            self._kept[name] = make()
        return self._kept[name]

    def checkpoint(self, stage: str, key: Mapping[str, Any]) -> Path | None:
        """Nothing outlives the process."""
        return None


def _inputs_digest(inputs: ModelInputs) -> str:
    return tensor_digest(inputs if isinstance(inputs, Mapping) else {"": inputs})


def silent(stage: str, done: int, total: int) -> None:
    """Report nothing."""


@dataclass
class Context:
    """Everything a method may use for one cell.

    Args:
        model: The FP32 reference in evaluation mode; never modified.
        sites: Every site of the model; ``sites.profile(profile)`` are those to quantize.
        profile: Name of the profile.
        precision: Bit widths.
        calibration: Batches of training items drawn by ``seed``.
        training: The training split; ``None`` if the task has none.
        recipe: The model entry's learning rate, steps and batch size for methods that train.
        weight_granularity: ``per_channel`` or ``per_tensor``.
        symmetric: Whether uniform activation quantizers are symmetric.
        seed: The cell's seed; derive further ones from it with :func:`quanttune.seeds.derive_seed`.
        device: Where to compute.
        stages: Keeps what several cells share.
        identity: What decides the reference weights and the data, for the keys of stages.
        autocast: Mixed-precision type of fine-tuning; ``None`` for full precision.
        processes: How many processes share a fine-tuning, each on a device of its own.
        progress: Report of long work.
    """

    model: nn.Module
    sites: SiteTable
    profile: str
    precision: Precision
    calibration: Sequence[Batch]
    training: TrainingData | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    weight_granularity: str = "per_channel"
    symmetric: bool = True
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    stages: StageCache = field(default_factory=MemoryStages)
    identity: Mapping[str, Any] = field(default_factory=dict)
    autocast: torch.dtype | None = None
    processes: int = 1
    progress: Progress = silent

    @property
    def profile_sites(self) -> SiteTable:
        """The sites of the cell's profile."""
        return self.sites.profile(self.profile)

    def stage_key(self, model: nn.Module | None = None) -> dict[str, Any]:
        """What decides every stage computed from weights and calibration inputs: digests of both.

        Args:
            model: Whose weights; the reference's by default.
        """
        measured = self.model if model is None else model
        return {
            **self.identity,
            "weights": tensor_digest(measured.state_dict()),
            "calibration": [_inputs_digest(batch.inputs) for batch in self.calibration],
        }

    def statistics(self, model: nn.Module | None = None) -> dict[str, TensorStatistics]:
        """Statistics of every activation site of the profile, of ``model`` or of the reference.

        Collected once for given weights and calibration items, whatever the rule and the width.
        """
        measured = self.model if model is None else model
        sites = self.profile_sites

        def collect() -> dict[str, Tensor]:
            total = len(self.calibration)
            statistics = collect_statistics(
                measured,
                (to_device(batch.inputs, self.device) for batch in self.calibration),
                sites,
                progress=lambda done: self.progress("statistics", done, total),
            )
            return statistics_to_tensors(statistics)

        key = {**self.stage_key(measured), "profile": self.profile}
        return statistics_from_tensors(self.stages.tensors("statistics", key, collect))


@dataclass
class Quantized:
    """A method's result.

    Args:
        quantizers: Site id to quantizer.
        weights: The state dict of a method that trains; ``None`` where the reference's weights are kept.
        details: What else is worth recording, as plain JSON values.
    """

    quantizers: Mapping[str, Quantizer]
    weights: dict[str, Tensor] | None = None
    details: dict[str, Any] = field(default_factory=dict)


ROLES: Mapping[str, str] = {
    "reference": "the unquantized model itself",
    "calibrator": "static ranges from calibration data, quantizers as usual",
    "rival": "a published method with means of its own, without training",
    "control": "the training of a trained method without what is new in it",
    "trained": "changes weights by training before it calibrates",
}
"""What a method is in a comparison: reports choose by role, never by name."""


@dataclass(frozen=True)
class Method(ABC):
    """A way to turn a reference model into a quantized one; the dataclass fields are its parameters.

    Class attributes:
        name: The registered name.
        variant: ``paper``, ``reference-code``, or ``ours`` where neither says enough.
        version: Raised whenever a change of the code changes results; part of a cell's identity.
        role: One of :data:`ROLES`.
        trains: Whether the method fine-tunes weights.
    """

    name: ClassVar[str]
    variant: ClassVar[str] = "ours"
    version: ClassVar[int] = 1
    role: ClassVar[str] = "rival"
    trains: ClassVar[bool] = False

    def parameters(self) -> dict[str, Any]:
        """The method's parameters as plain JSON values."""
        return dataclasses.asdict(self)

    @property
    def label(self) -> str:
        """Short name for tables; tells apart the same method with other parameters."""
        changed = [
            f"{item.name}={getattr(self, item.name)}"
            for item in dataclasses.fields(self)
            if getattr(self, item.name) != item.default
        ]
        return self.name + (f"[{','.join(changed)}]" if changed else "")

    def skip(self, sites: SiteTable, profile: str) -> str | None:
        """Why the method does not apply to a model with these sites; ``None`` if it does."""
        return None

    @abstractmethod
    def quantize(self, context: Context) -> Quantized:
        """Quantize the reference of ``context``."""


METHODS: Registry[type[Method]] = Registry("method", packages=("baselines",))
"""Every method, by name; ``METHODS.get("mse")()`` makes one with default parameters."""
