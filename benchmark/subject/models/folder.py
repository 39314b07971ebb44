"""References from local folders: what ``save_pretrained`` of transformers or ``save_for_hf`` of timm wrote.

``folder:PATH@TASK`` names such a model wherever a model is named. The folder holds ``config.json`` and
safetensors weights; a text model also its tokenizer. Weights and task head are used as they are, so the
checkpoint must already be trained for the task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmark.subject.assets.cache import known_sha256
from benchmark.subject.models.checkpoint import (
    OWN_CODE_ALONE,
    read_config,
    read_tokenizer,
    read_transformers,
    require_complete,
    understood,
    weight_files,
)
from benchmark.subject.models.configuration import (
    Pictures,
    Timm,
    Transformers,
    class_names,
    require_room,
    require_size,
    shaped,
)
from benchmark.subject.models.entry import (
    ImageEntry,
    ModelEntry,
    Progress,
    TextEntry,
    own_random_state,
)
from benchmark.subject.models.names import MODEL_FORMS, require_fit, split_task
from benchmark.subject.tasks.preprocessing import Text
from benchmark.subject.tasks.task import Task, get_task
from quanttune.errors import AssetError, ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

FOLDER_PREFIX = "folder:"
RECIPE = {"steps": 300, "learning_rate": 3e-5, "batch_size": 32}
_MAX_LENGTH = 128


@MODEL_FORMS.register("folder")
def entry_from_folder(name: str) -> ModelEntry:
    """The entry that ``folder:PATH@TASK`` names.

    Raises:
        ConfigError: If the name has no task or the folder's configuration is of neither library.
        AssetError: If the folder, its configuration or its weights are not there.
    """
    path, task = split_task(name.removeprefix(FOLDER_PREFIX))
    if not path or not task:
        raise ConfigError(f"model {name!r} should read folder:PATH@TASK, e.g. folder:my-bert@movie_reviews")
    folder = Path(path).expanduser().resolve()
    return entry_of(folder, name=name, task=task, title=folder.name)


def entry_of(folder: Path, *, name: str, task: str, title: str) -> FolderEntry:
    """The entry of a checkpoint in a folder.

    Args:
        folder: Absolute path of what ``save_pretrained`` of transformers or ``save_for_hf`` of timm wrote.
        name: What it is called.
        task: Name of its task.
        title: For a person.

    Raises:
        UnknownNameError: If there is no such task.
        ConfigError: If the configuration is of neither library, or the model cannot do the task.
        AssetError: If the folder, its configuration or its weights are not there.
    """
    entry = _read_entry(folder, {"name": name, "task": task, "title": title})
    require_fit(entry, get_task(task))
    _require_order(folder, get_task(task))
    return entry


def _require_order(folder: Path, task: Task) -> None:
    """Refuse a head that has the task's classes in another order: every answer would count as wrong."""
    names = [name.casefold() for name in class_names(read_config(folder), folder)]
    wanted = [name.casefold() for name in task.classes]
    if names != wanted and sorted(names) == sorted(wanted):
        raise ConfigError(
            f"{folder} answers in the order {', '.join(names)}, task {task.name} has {', '.join(wanted)}; "
            f"write the model's numbers, 0 to {len(names) - 1}, in place of the labels"
        )


def _read_entry(folder: Path, facts: dict[str, Any]) -> FolderEntry:
    config = read_config(folder)
    weights = weight_files(folder)
    common = {**facts, "folder": folder, "source": str(folder)}
    if "architecture" in config and "pretrained_cfg" in config:
        about = shaped(Timm, config, folder)
        require_room(config, folder, weights)
        data = shaped(Pictures, about.pretrained_cfg, folder)
        # what the weights fit, where it is not the default
        built = about.model_args.get("img_size") or data.input_size[1:]
        height, width = built[-2:] if isinstance(built, list | tuple) and len(built) > 1 else (built, built)
        if not isinstance(height, int) or height != width:
            raise ConfigError(
                f"{folder} wants images of {height} x {width} pixels; only square ones are supported"
            )
        return TimmFolder(
            **common,
            image_size=height,
            mean=data.mean,
            std=data.std,
            interpolation=data.interpolation,
            crop_pct=data.crop_pct,
        )
    if "model_type" in config:
        told = shaped(Transformers, config, folder)
        require_room(config, folder, weights)
        length = min(_MAX_LENGTH, told.max_position_embeddings or _MAX_LENGTH)
        return TransformersFolder(**common, family=told.model_type, max_length=length)
    raise ConfigError(
        f"{folder / 'config.json'} is neither timm's (architecture) nor transformers' (model_type)"
    )


class FolderEntry(ModelEntry):
    """A model whose reference is exactly what a folder holds.

    Attributes:
        folder: Absolute path.
    """

    folder: Path

    def identity(self) -> dict[str, Any]:
        """The sha256 of every file that decides the model, and the data; not the folder's place."""
        texts = [path for pattern in ("*.json", "*.txt") for path in sorted(self.folder.glob(pattern))]
        files = [*weight_files(self.folder), *texts]
        return {
            "kind": type(self).__name__,
            "version": self.version,
            "files": {path.name: known_sha256(path) for path in files},
            "task": self._task().fingerprint(),
        }

    def make_reference(
        self, stages: object, progress: Progress, device: torch.device | None = None
    ) -> dict[str, Tensor]:
        """The folder's tensors in float32; they are already on disk, so no stage keeps a second copy."""
        import torch

        return self._reference(progress, device or torch.device("cpu"))

    def _check_classes(self, found: int) -> None:
        if found != self._classes():
            raise ConfigError(
                f"{self.folder} has a head of {found} classes, task {self.task} has {self._classes()}; "
                "give a checkpoint that was trained for the task"
            )


@dataclass(frozen=True, kw_only=True)
class TransformersFolder(TextEntry, FolderEntry):
    """A sequence classifier that ``save_pretrained`` of transformers wrote, with its tokenizer."""

    name: str
    title: str
    family: str
    task: str
    source: str
    folder: Path
    max_length: int
    recipe: Mapping[str, Any] = field(default_factory=lambda: dict(RECIPE))

    @cached_property
    def _tokenizer(self) -> Any:
        return read_tokenizer(self.folder)

    @property
    def pad_id(self) -> int:  # type: ignore[override]
        """The tokenizer's padding token."""
        return int(self._tokenizer.pad_token_id)

    def encode(self, texts: Sequence[Text]) -> list[list[int]]:
        """Token ids as the folder's tokenizer makes them, cut to ``max_length``."""
        encoded = self._tokenizer(list(texts), truncation=True, max_length=self.max_length, padding=False)
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def build(self) -> nn.Module:
        """The architecture of ``config.json`` with its classification head."""
        from transformers import AutoConfig, AutoModelForSequenceClassification

        with understood(self.folder / "config.json"):
            config = AutoConfig.from_pretrained(self.folder, **OWN_CODE_ALONE)
            self._check_classes(config.num_labels)
            if config.get_text_config().pad_token_id is None:
                # A decoder finds the last token of each text by it, and refuses batches without.
                config.get_text_config().pad_token_id = self.pad_id
            make = partial(AutoModelForSequenceClassification.from_config, config, dtype="float32")
            with own_random_state(0):
                require_size(make, self.folder, weight_files(self.folder))
                model: nn.Module = make()
        return model.eval()

    def _reference(self, progress: Progress, device: torch.device) -> dict[str, Tensor]:
        from transformers import AutoConfig, AutoModelForSequenceClassification

        with understood(self.folder / "config.json"):
            self._check_classes(AutoConfig.from_pretrained(self.folder, **OWN_CODE_ALONE).num_labels)
        progress("reading weights", 0, 1)
        model, absent, unknown = read_transformers(AutoModelForSequenceClassification, self.folder)
        require_complete(self.folder, absent, unknown)
        progress("reading weights", 1, 1)
        return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


_ELSEWHERE = frozenset({"checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"})
"""Arguments by which timm reads a file that the folder chooses, which may be pickled, or asks the network."""


@dataclass(frozen=True, kw_only=True)
class TimmFolder(ImageEntry, FolderEntry):
    """An image classifier that timm wrote: ``config.json`` and ``model.safetensors``."""

    name: str
    title: str
    task: str
    source: str
    folder: Path
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    recipe: Mapping[str, Any] = field(default_factory=lambda: dict(RECIPE))
    family: str = "vit"

    def build(self) -> nn.Module:
        """The architecture of ``config.json`` with its classifier."""
        import timm

        config = shaped(Timm, read_config(self.folder), self.folder)
        self._check_classes(config.num_classes)
        if ":" in config.architecture or _ELSEWHERE & config.model_args.keys():
            raise AssetError(
                f"{self.folder / 'config.json'} would have timm read something outside of the folder "
                f"({', '.join([config.architecture, *sorted(_ELSEWHERE & config.model_args.keys())])}); "
                "save the model itself there"
            )
        settings = {"num_classes": config.num_classes, **config.model_args}
        with own_random_state(0), understood(self.folder / "config.json"):
            make = partial(timm.create_model, config.architecture, pretrained=False, **settings)
            require_size(make, self.folder, weight_files(self.folder))
            model: nn.Module = make()
        return model.eval()

    def _reference(self, progress: Progress, device: torch.device) -> dict[str, Tensor]:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        model = self.build()
        progress("reading weights", 0, 1)
        tensors: dict[str, Tensor] = {}
        try:
            for path in weight_files(self.folder):
                tensors.update(load_file(path))
            floats = {name: tensor.float() for name, tensor in tensors.items()}
            found = model.load_state_dict(floats, strict=False)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise AssetError(f"the weights in {self.folder} cannot be loaded: {error}") from error
        require_complete(self.folder, found.missing_keys, found.unexpected_keys)
        progress("reading weights", 1, 1)
        return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
