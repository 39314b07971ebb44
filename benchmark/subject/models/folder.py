"""References from local folders: what ``save_pretrained`` of transformers or ``save_for_hf`` of timm wrote.

``folder:PATH@TASK`` names such a model wherever a model is named. The folder holds ``config.json`` and
safetensors weights; a text model also its tokenizer. Weights and task head are used as they are, so the
checkpoint must already be trained for the task.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmark.subject.assets.cache import known_sha256
from benchmark.subject.models.entry import (
    ImageEntry,
    ModelEntry,
    Progress,
    Text,
    TextEntry,
    own_random_state,
)
from quanttune.errors import AssetError, ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

FOLDER_PREFIX = "folder:"
RECIPE = {"steps": 300, "learning_rate": 3e-5, "batch_size": 32}
_MAX_LENGTH = 128
_TOKENIZERS = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model")
_PICKLED = ("*.bin", "*.pt", "*.pth")


def entry_from_folder(name: str) -> ModelEntry:
    """The entry that ``folder:PATH@TASK`` names.

    Raises:
        ConfigError: If the name has no task or the folder's configuration is of neither library.
        AssetError: If the folder, its configuration or its weights are not there.
    """
    path, mark, task = name.removeprefix(FOLDER_PREFIX).rpartition("@")
    if not mark or not path or not task:
        raise ConfigError(f"model {name!r} should read folder:PATH@TASK, e.g. folder:my-bert@movie_reviews")
    folder = Path(path).expanduser().resolve()
    config = read_config(folder)
    weight_files(folder)
    common: dict[str, Any] = {
        "name": name,
        "task": task,
        "folder": folder,
        "source": str(folder),
        "title": folder.name,
    }
    if "architecture" in config and "pretrained_cfg" in config:
        data = config["pretrained_cfg"]
        built = config.get("model_args", {}).get(
            "img_size"
        )  # what the weights fit, where it is not the default
        height, width = (built, built) if isinstance(built, int) else (built or data["input_size"])[-2:]
        if height != width:
            raise ConfigError(
                f"{folder} wants images of {height} x {width} pixels; only square ones are supported"
            )
        return TimmFolder(**common, image_size=height, mean=tuple(data["mean"]), std=tuple(data["std"]))
    if "model_type" in config:
        length = min(_MAX_LENGTH, int(config.get("max_position_embeddings", _MAX_LENGTH)))
        return TransformersFolder(**common, family=config["model_type"], max_length=length)
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

        config = AutoConfig.from_pretrained(self.folder, local_files_only=True)
        self._check_classes(config.num_labels)
        with own_random_state(0):
            model: nn.Module = AutoModelForSequenceClassification.from_config(config, dtype="float32")
        return model.eval()

    def _reference(self, progress: Progress, device: torch.device) -> dict[str, Tensor]:
        from transformers import AutoConfig, AutoModelForSequenceClassification

        self._check_classes(AutoConfig.from_pretrained(self.folder, local_files_only=True).num_labels)
        progress("reading weights", 0, 1)
        model, absent, unknown = read_transformers(AutoModelForSequenceClassification, self.folder)
        require_complete(self.folder, absent, unknown)
        progress("reading weights", 1, 1)
        return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


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
    recipe: Mapping[str, Any] = field(default_factory=lambda: dict(RECIPE))
    family: str = "vit"

    def build(self) -> nn.Module:
        """The architecture of ``config.json`` with its classifier."""
        import timm

        config = read_config(self.folder)
        self._check_classes(int(config["num_classes"]))
        settings = {"num_classes": config["num_classes"], **config.get("model_args", {})}
        with own_random_state(0):
            try:
                model: nn.Module = timm.create_model(config["architecture"], pretrained=False, **settings)
            except RuntimeError as error:
                raise ConfigError(f"timm cannot build {config['architecture']!r}: {error}") from error
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


def read_transformers(kind: Any, folder: Path, **settings: Any) -> tuple[nn.Module, set[str], set[str]]:
    """Load a checkpoint of transformers in float32 from safetensors.

    Args:
        kind: Class of transformers with ``from_pretrained``.
        folder: Holds configuration and weights.
        settings: Further arguments of the configuration.

    Returns:
        The model in evaluation mode, what the checkpoint has no weights for (drawn from torch's global
        generator), and the weights that have no place in the model.

    Raises:
        AssetError: If the weights cannot be read.
    """
    from safetensors import SafetensorError

    weight_files(folder)
    try:
        with own_random_state(0), _no_report():
            model, found = kind.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                dtype="float32",
                output_loading_info=True,
                **settings,
            )
    except (SafetensorError, OSError, RuntimeError) as error:
        raise AssetError(f"the weights in {folder} cannot be loaded: {error}") from error
    return model.eval(), set(found["missing_keys"]), set(found["unexpected_keys"])


@contextlib.contextmanager
def _no_report() -> Iterator[None]:
    """Keep transformers from printing what it found: the caller is told, and refuses what is wrong."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def require_complete(folder: Path, absent: Collection[str], unknown: Collection[str]) -> None:
    """Refuse a checkpoint that would leave a part of the model random, or that is of another model.

    Raises:
        AssetError: If a name is given.
    """
    for names, fault in ((absent, "has no weights for"), (unknown, "has weights without a place:")):
        if names:
            some = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise AssetError(f"{folder} {fault} {some}; give a complete checkpoint of this model")


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer of a checkpoint of transformers.

    Raises:
        AssetError: If there is none, it cannot be read or has no padding token.
    """
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in _TOKENIZERS):  # else an empty one would be made
        raise AssetError(f"{folder} has no tokenizer ({', '.join(_TOKENIZERS)}); save it there as well")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise AssetError(f"the tokenizer in {folder} cannot be read: {str(error).splitlines()[0]}") from error
    if tokenizer.pad_token_id is None:
        raise AssetError(f"the tokenizer in {folder} has no padding token; set one and save it again")
    return tokenizer


def read_config(folder: Path) -> dict[str, Any]:
    """The ``config.json`` of a checkpoint.

    Raises:
        AssetError: If it is not there or holds no JSON object.
    """
    if not folder.is_dir():
        raise AssetError(f"there is no folder {folder}")
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AssetError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise AssetError(f"{path} holds no JSON object")
    return config


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, whole or in shards, by name.

    Raises:
        AssetError: If there are none; pickled ones are refused.
    """
    files = sorted(folder.glob("*.safetensors"))
    if files:
        return files
    pickled = [path.name for pattern in _PICKLED for path in sorted(folder.glob(pattern))]
    if pickled:
        raise AssetError(
            f"{folder} holds pickled weights ({pickled[0]}), which can run code when read and are refused; "
            "save them again with safe_serialization"
        )
    raise AssetError(f"{folder} holds no *.safetensors weights")
