"""What a checkpoint's ``config.json`` must say before anything is made of it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from safetensors import SafetensorError, safe_open

from quanttune.errors import AssetError
from quanttune.fields import FieldError, fitting

if TYPE_CHECKING:
    from torch import nn

_Shape = TypeVar("_Shape")


@dataclass(frozen=True)
class Transformers:
    """A configuration of transformers; null is what a key that is absent means."""

    model_type: str
    max_position_embeddings: int | None = None

    def __post_init__(self) -> None:
        if self.max_position_embeddings is not None and self.max_position_embeddings < 1:
            raise FieldError(f"max_position_embeddings = {self.max_position_embeddings}: give at least 1")


@dataclass(frozen=True)
class Pictures:
    """How a checkpoint of timm wants its pictures: ``pretrained_cfg``."""

    input_size: tuple[int, int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0

    def __post_init__(self) -> None:
        for name in ("input_size", "std", "crop_pct"):
            value = getattr(self, name)
            if min(value if isinstance(value, tuple) else (value,)) <= 0:
                raise FieldError(f"{name} = {value}: give positive numbers")


@dataclass(frozen=True)
class Timm:
    """A configuration of timm; ``model_args`` is what the architecture is made with."""

    architecture: str
    num_classes: int
    pretrained_cfg: dict[str, Any]
    model_args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Labels:
    """The names of the classes, as either library writes them."""

    id2label: dict[str, Any] | None = None
    label_names: list[Any] | None = None

    def names(self) -> list[str]:
        """In the order of the classes' numbers.

        Raises:
            FieldError: If a class has another key than its number.
        """
        if not self.id2label:
            return list(map(str, self.label_names or ()))
        for key in self.id2label:
            if not key.isdecimal():
                raise FieldError(f"id2label has the key {key!r}: give the numbers of the classes")
        return [str(self.id2label[key]) for key in sorted(self.id2label, key=int)]


def shaped(kind: type[_Shape], values: Mapping[str, Any], folder: Path) -> _Shape:
    """A part of a checkpoint's configuration with the fields of ``kind``; what else it holds is left out.

    Raises:
        AssetError: If a field is missing or holds what it cannot; the message names file, field and value.
    """
    try:
        return kind(**fitting(kind, values))
    except FieldError as error:
        raise AssetError(
            f"{folder / 'config.json'}: {error}; put the file that belongs to the weights there"
        ) from None


_COUNTS = re.compile(r"(^|_)(layers?|depths?|experts|blocks)$")
_NAMES = frozenset({"id2label", "label2id", "label_names"})
_SIZES = re.compile(
    r"(size|dim|heads|width|channels|labels|classes|position_embeddings|^d_[a-z]+|^n_[a-z]+)$"
)
_ROOM = 4
"""A number may be so many times what the weights have room for: blocks may share tensors."""
_FREE = 1 << 20
"""Sizes up to this cost nothing by themselves: rotary positions have no weights."""


def require_room(config: Mapping[str, Any], folder: Path, weights: Iterable[Path]) -> None:
    """Refuse a configuration whose network the weights beside it could not fill, before anything is built.

    Args:
        config: What ``config.json`` says.
        folder: Where it lies.
        weights: The checkpoint's safetensors files; their headers are read.

    Raises:
        AssetError: If it asks for more layers than there are tensors, or for a size above the number of
            weights; or if a file is no safetensors.
    """
    tensors, elements = _counted(weights)
    for name, value in _numbers(config):
        room = tensors if _COUNTS.search(name) else max(elements, _FREE) if _SIZES.search(name) else value
        if value > _ROOM * room:
            raise AssetError(
                f"{folder / 'config.json'}: {name} = {value}, but the weights are {tensors} tensors of "
                f"{elements} numbers; put the file that belongs to them there"
            )


def require_size(build: Callable[[], nn.Module], folder: Path, weights: Iterable[Path]) -> None:
    """Refuse a network far larger than the weights beside it, by building it without memory.

    Args:
        build: Makes the network; it is called on device ``meta``. What cannot be made there passes.
        folder: Where the checkpoint lies.
        weights: Its safetensors files.

    Raises:
        AssetError: If the network has several times the parameters that there are.
    """
    import torch

    try:
        with torch.device("meta"):
            parameters = sum(parameter.numel() for parameter in build().parameters())
    except Exception:
        # Whatever it is, the network itself is built next and says it.
        return
    _, elements = _counted(weights)
    if parameters > _ROOM * elements:
        raise AssetError(
            f"{folder / 'config.json'} describes a network of {parameters} parameters, but the weights are "
            f"{elements} numbers; put the file that belongs to them there"
        )


def _counted(weights: Iterable[Path]) -> tuple[int, int]:
    """Tensors and numbers in some safetensors files."""
    tensors = elements = 0
    for path in weights:
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 - it is no mapping
                    tensors += 1
                    elements += math.prod(file.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            raise AssetError(f"the weights in {path} cannot be read: {error}") from None
    return tensors, elements


def _numbers(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Every whole number of a configuration with its name, those of parts and lists included."""
    for name, value in config.items():
        if name in _NAMES:
            continue
        if isinstance(value, Mapping):
            yield from _numbers(value)
            continue
        for each in value if isinstance(value, list) else (value,):
            if isinstance(each, int) and not isinstance(each, bool):
                yield name, each


def class_names(config: Mapping[str, Any], folder: Path) -> list[str]:
    """The names of the classes in the order of their numbers; empty where the configuration has none.

    Raises:
        AssetError: If they are no names by number.
    """
    try:
        return shaped(Labels, config, folder).names()
    except FieldError as error:
        raise AssetError(f"{folder / 'config.json'}: {error}") from None
