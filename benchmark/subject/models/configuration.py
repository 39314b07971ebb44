"""What a checkpoint's ``config.json`` must say before anything is made of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from quanttune.errors import AssetError
from quanttune.fields import FieldError, fitting

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


def class_names(config: Mapping[str, Any], folder: Path) -> list[str]:
    """The names of the classes in the order of their numbers; empty where the configuration has none.

    Raises:
        AssetError: If they are no names by number.
    """
    try:
        return shaped(Labels, config, folder).names()
    except FieldError as error:
        raise AssetError(f"{folder / 'config.json'}: {error}") from None
