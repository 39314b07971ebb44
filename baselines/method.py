"""What a quantization method is given, what it returns, and where it registers."""

from __future__ import annotations

import copy
import dataclasses
import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from baselines.validation import Validation
from quanttune.digests import json_digest, tensor_digest
from quanttune.inputs import ModelInputs, to_device
from quanttune.quantization import (
    Quantized,
    Scheme,
    SiteTable,
    TensorStatistics,
    Transform,
    collect_statistics,
)
from quanttune.quantization.equivalence import changed_apart, load_weights, sites_of_untied
from quanttune.quantization.exact import ARITHMETIC
from quanttune.quantization.statistics import LAYOUT, statistics_from_tensors, statistics_to_tensors
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

    def reference(self, stage: str, key: Mapping[str, Any]) -> str | None:
        """How to name what is kept for ``key``, so that it is found again; ``None`` if it is not kept."""
        ...

    def tensors(
        self, stage: str, key: Mapping[str, Any], make: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Return the tensors of ``stage`` for ``key``, making and keeping them if they are not there yet."""
        ...

    def checkpoint(self, stage: str, key: Mapping[str, Any]) -> Path | None:
        """Where unfinished work on that stage is saved for a resumption; ``None`` for nowhere."""
        ...

    def keep_course(self, stage: str, key: Mapping[str, Any], course: Sequence[Mapping[str, float]]) -> None:
        """Keep how the work on that stage went, a row a step, for whoever looks; nothing depends on it."""
        ...


class MemoryStages:
    """A stage cache for one process, for use without the suite."""

    def __init__(self) -> None:
        self._kept: dict[str, dict[str, Tensor]] = {}

    def reference(self, stage: str, key: Mapping[str, Any]) -> str | None:
        """Nothing outlives the process."""
        return None

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

    def keep_course(self, stage: str, key: Mapping[str, Any], course: Sequence[Mapping[str, float]]) -> None:
        """Nothing outlives the process."""


def _inputs_digest(inputs: ModelInputs) -> str:
    return tensor_digest(inputs if isinstance(inputs, Mapping) else {"": inputs})


def _transform_digest(transform: Transform) -> str:
    state = transform.state()
    return json_digest([state.kind, state.settings, tensor_digest(state.tensors)])


def silent(stage: str, done: int, total: int) -> None:
    """Report nothing."""


@dataclass(frozen=True)
class Origin:
    """How another process makes the same context again, from plain values alone.

    Args:
        maker: ``module:function``; called with the device, the progress and the arguments by name.
        arguments: JSON values.
    """

    maker: str
    arguments: Mapping[str, Any]

    def make(self, device: torch.device, progress: Progress) -> Context:
        """The context, of the reference."""
        module, _, function = self.maker.partition(":")
        made: Context = getattr(importlib.import_module(module), function)(device, progress, **self.arguments)
        return made


@dataclass
class Context:
    """Everything a method may use for one cell.

    Args:
        model: The FP32 reference in evaluation mode; never modified.
        sites: Every site of the model; ``scheme.sites(sites)`` are those to quantize.
        scheme: Formats of weights and activations, and the profile.
        calibration: Batches of training items drawn by ``seed``.
        training: The training split; ``None`` if the task has none.
        recipe: The model entry's learning rate, steps and batch size for methods that train.
        seed: The cell's seed; derive further ones from it with :func:`quanttune.seeds.derive_seed`.
        device: Where to compute.
        stages: Keeps what several cells share.
        identity: What decides the reference weights and the data, for the keys of stages.
        autocast: Mixed-precision type of fine-tuning; ``None`` for full precision.
        processes: How many processes share a fine-tuning, each on a device of its own.
        progress: Report of long work.
        weights_digest: Digest of the model's weights if it is known; computed when it is asked for otherwise.
        copies: Gives a model with other weights, and their digest; keeps the last one.
        origin: How another process makes it again; needed where several share a fine-tuning.
        validation: Scores quantized models on validation items, for methods that choose among several;
            ``None`` if there are none.
    """

    model: nn.Module
    sites: SiteTable
    scheme: Scheme
    calibration: Sequence[Batch]
    training: TrainingData | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    stages: StageCache = field(default_factory=MemoryStages)
    identity: Mapping[str, Any] = field(default_factory=dict)
    autocast: torch.dtype | None = None
    processes: int = 1
    progress: Progress = silent
    weights_digest: str | None = None
    copies: Callable[[Mapping[str, Tensor]], tuple[nn.Module, str]] | None = None
    origin: Origin | None = None
    validation: Validation | None = None

    @property
    def profile_sites(self) -> SiteTable:
        """The sites to quantize."""
        return self.scheme.sites(self.sites)

    def changed(self, weights: Mapping[str, Tensor]) -> Context:
        """The context of the same model with other weights; their statistics are collected anew.

        Args:
            weights: A whole state dict. Where it holds tied weights apart, the model has both.
        """
        sites = sites_of_untied(self.sites, changed_apart(self.model, weights))
        if self.copies is not None:
            model, digest = self.copies(weights)
            return dataclasses.replace(self, model=model, sites=sites, weights_digest=digest)
        model = copy.deepcopy(self.model)
        load_weights(model, weights)
        return dataclasses.replace(self, model=model.to(self.device).eval(), sites=sites, weights_digest=None)

    @property
    def weights_key(self) -> str:
        """Digest of the model's weights, which every stage that is computed from them has in its key."""
        return self.weights_digest or tensor_digest(self.model.state_dict())

    def stage_key(self) -> dict[str, Any]:
        """What decides every stage computed from weights and calibration inputs: digests of both."""
        return {
            **self.identity,
            "arithmetic": ARITHMETIC,
            "weights": self.weights_key,
            "calibration": [_inputs_digest(batch.inputs) for batch in self.calibration],
        }

    def statistics(self, transforms: Sequence[Transform] = ()) -> dict[str, TensorStatistics]:
        """Statistics of every activation site of the profile; none where no range is static.

        Collected once for given weights and calibration items, whatever the rule and the width.

        Args:
            transforms: Where one stands at a site, what the quantizer there sees is summarised.
        """
        sites = self.profile_sites
        if not self.scheme.is_static:
            return {}

        def collect() -> dict[str, Tensor]:
            total = len(self.calibration)
            statistics = collect_statistics(
                self.model,
                (to_device(batch.inputs, self.device) for batch in self.calibration),
                sites,
                progress=lambda done: self.progress("statistics", done, total),
                transforms=transforms,
            )
            return statistics_to_tensors(statistics)

        key = {**self.stage_key(), "profile": self.scheme.profile, "layout": LAYOUT}
        if transforms:
            key["transforms"] = [_transform_digest(transform) for transform in transforms]
        return statistics_from_tensors(self.stages.tensors("statistics", key, collect))


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
        version: Raised whenever a change of the code changes results; part of a cell's identity, see
            :attr:`versions`.
        role: One of :data:`ROLES`.
        trains: Whether the method fine-tunes weights.
        validates: Whether it chooses by scores on validation items: its row then stands for a choice that was
            made before the test items were seen.
        per_width: Whether it trains, or optimises, anew for each precision; one training serves all if not.
        changes: What it changes of a model, in a few words, for the table of methods.
        source: The paper, or what else defines it.
        licence: That of the authors' code as its repository states it; ``none`` where there is no code, or
            code without a licence. Nothing of it is copied here.
    """

    name: ClassVar[str]
    variant: ClassVar[str] = "ours"
    version: ClassVar[int] = 1
    role: ClassVar[str] = "rival"
    trains: ClassVar[bool] = False
    validates: ClassVar[bool] = False
    per_width: ClassVar[bool] = False
    changes: ClassVar[str] = "ranges"
    source: ClassVar[str] = "common practice"
    licence: ClassVar[str] = "none"

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

    def used(self) -> tuple[str, ...]:
        """Names of the other methods that this one calls: a change of theirs changes its results, too."""
        return ()

    @property
    def versions(self) -> str:
        """Its version, with those of methods that it uses where they are not the first: ``2+brecq.2``."""
        found, waiting = dict[str, int](), list(self.used())
        while waiting:
            name = waiting.pop()
            if name not in found:
                kind = METHODS.get(name)
                found[name] = kind.version
                waiting += kind().used()
        return "+".join(
            [str(self.version), *(f"{name}.{found[name]}" for name in sorted(found) if found[name] != 1)]
        )

    def skip(self, sites: SiteTable, scheme: Scheme) -> str | None:
        """Why the method does not apply to a model with these sites under a scheme; ``None`` if it does."""
        return None

    @abstractmethod
    def quantize(self, context: Context) -> Quantized:
        """Quantize the reference of ``context``."""


class FoldingMethod(Method):
    """A method that can change weights such that the model computes what it did and is easier to quantize."""

    @abstractmethod
    def folded(self, context: Context) -> dict[str, Tensor]:
        """A whole state dict that computes the same function; what the model has where nothing can be folded.

        Training may go on from it: see ``before`` of :class:`baselines.training.FineTuning`.
        """


METHODS: Registry[type[Method]] = Registry("method", packages=("baselines",))
"""Every method, by name; ``METHODS.get("mse")()`` makes one with default parameters."""
