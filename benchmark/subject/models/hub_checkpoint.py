"""References from any repository of the Hub: ``hub:REPO@TASK`` wherever a model is named.

``hub:REPO:REVISION@TASK`` takes a branch, tag or commit other than ``main``. The repository holds a sequence
classifier of transformers with its tokenizer, or an image classifier of timm, already trained for the task.
``QUANTTUNE_MODELS`` and the Hub's cache on this machine are looked into first; what the weights are is pinned
by ``lock.json`` of the results folder at first use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from benchmark.subject.assets.pretrained import find
from benchmark.subject.models.checkpoint import read_config, read_tokenizer
from benchmark.subject.models.entry import ImageEntry, Progress
from benchmark.subject.models.folder import RECIPE, FolderEntry, entry_of
from benchmark.subject.models.hub import HubEntry, tokenizer_digest
from benchmark.subject.models.names import MODEL_FORMS, split_task
from benchmark.subject.obstacles import Obstacle
from benchmark.subject.tasks.preprocessing import Text
from benchmark.subject.tasks.task import get_task
from quanttune.digests import json_digest
from quanttune.errors import ConfigError, QuantTuneError

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor, nn

HUB_PREFIX = "hub:"

# Of a configuration: what the libraries write into it about themselves, and not about the model.
_NOT_THE_MODEL = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures")


@dataclass(frozen=True, kw_only=True)
class HubCheckpoint(HubEntry):
    """A classifier whose reference is exactly what a repository of the Hub holds.

    What it is, of which library and for which inputs, its configuration says, once it is on this machine.

    Args:
        name: As it was asked for.
        repo: ``owner/name``.
        revision: Branch, tag or commit.
        task: Name of its task.
    """

    name: str
    repo: str
    revision: str
    task: str
    files: tuple[str, ...] = ()
    recipe: Mapping[str, Any] = field(default_factory=lambda: dict(RECIPE))

    @property
    def title(self) -> str:  # type: ignore[override]
        """The repository."""
        return self.repo

    @property
    def source(self) -> str:  # type: ignore[override]
        """The repository."""
        return self.repo

    @property
    def family(self) -> str:  # type: ignore[override]
        """Of the checkpoint where it is on this machine; ``hub`` before."""
        return self._checkpoint.family if find(self.hub) is not None else "hub"

    @cached_property
    def _checkpoint(self) -> FolderEntry:
        return entry_of(self.folder, name=self.name, task=self.task, title=self.title)

    def identity(self) -> dict[str, Any]:
        """Repository, revision and the data; the lock file pins the rest."""
        return {
            "kind": type(self).__name__,
            "version": self.version,
            **self.origin(),
            "task": self._task().fingerprint(),
        }

    def pins(self) -> dict[str, Any]:
        """The weights, the configuration, and what makes inputs: tokenizer or preprocessing of pictures."""
        config = {key: value for key, value in read_config(self.folder).items() if key not in _NOT_THE_MODEL}
        inputs: dict[str, Any] = {}
        if isinstance(self._checkpoint, ImageEntry):
            inputs["data_config"] = config["pretrained_cfg"]
        else:
            inputs["tokenizer"] = tokenizer_digest(read_tokenizer(self.folder))
        return {**super().pins(), "config": json_digest(config), **inputs}

    def obstacle(self) -> Obstacle | None:
        """That the checkpoint is neither here nor to be had, or is here and cannot do the task."""
        found = super().obstacle()
        if found is not None or find(self.hub) is None:
            return found
        try:
            _ = self._checkpoint
        except QuantTuneError as error:
            return Obstacle(str(error), "name another repository or task")
        return None

    def build(self) -> nn.Module:
        """The architecture as the checkpoint's configuration gives it."""
        return self._checkpoint.build()

    def make_reference(
        self, stages: object, progress: Progress, device: torch.device | None = None
    ) -> dict[str, Tensor]:
        """The repository's tensors in float32; they are already on disk, so no stage keeps a second copy."""
        return self._checkpoint.make_reference(stages, progress, device)

    def _reference(self, progress: Progress, device: torch.device) -> dict[str, Tensor]:
        return self._checkpoint.make_reference(None, progress, device)

    def image_inputs(self, images: Tensor) -> Tensor:
        """As the checkpoint's configuration says."""
        return self._checkpoint.image_inputs(images)

    def image_batch(self, images: Sequence[Image]) -> Tensor:
        """As the checkpoint's configuration says."""
        return self._checkpoint.image_batch(images)

    def encode(self, texts: Sequence[Text]) -> list[list[int]]:
        """As the checkpoint's tokenizer does."""
        return self._checkpoint.encode(texts)

    def text_inputs(self, tokens: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """As the checkpoint's tokenizer pads."""
        return self._checkpoint.text_inputs(tokens)


@MODEL_FORMS.register("hub")
def entry_from_hub(name: str) -> HubCheckpoint:
    """The entry that ``hub:REPO@TASK`` or ``hub:REPO:REVISION@TASK`` names; the network is not asked.

    Raises:
        ConfigError: If the name is not of that form, or the task is one of language models.
        UnknownNameError: If there is no such task.
    """
    where, task = split_task(name.removeprefix(HUB_PREFIX))
    repo, mark, revision = where.partition(":")
    if repo.count("/") != 1 or not all(repo.split("/")) or not task or (mark and not revision):
        raise ConfigError(
            f"model {name!r} should read hub:OWNER/NAME@TASK, or hub:OWNER/NAME:REVISION@TASK, "
            "e.g. hub:textattack/bert-base-uncased-SST-2@glue_sst2"
        )
    if get_task(task).n_classes is None:
        raise ConfigError(f"model {name!r}: what is read from the Hub is a classifier; {task} has no classes")
    return HubCheckpoint(name=name, repo=repo, revision=revision or "main", task=task)
