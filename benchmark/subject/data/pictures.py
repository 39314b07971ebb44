"""A user's own folder of pictures: a folder a class, perhaps in folders of the splits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmark.subject.assets.cache import known_sha256
from benchmark.subject.data.columns import split_of
from quanttune.errors import AssetError

_ENDINGS = frozenset((".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"))


@dataclass(frozen=True)
class Pictures:
    """Pictures with their classes.

    Attributes:
        paths: Of the pictures.
        labels: Class number of each.
        classes: Names of the classes' folders, sorted.
        splits: Split of each, where there are folders of splits.
    """

    paths: list[Path]
    labels: list[int]
    classes: tuple[str, ...]
    splits: list[str] | None

    def contents(self) -> list[str]:
        """A digest of the bytes of every picture."""
        return [known_sha256(path) for path in self.paths]


def read_pictures(folder: Path) -> Pictures:
    """Find the pictures of ``folder/CLASS`` or ``folder/SPLIT/CLASS``; none is opened.

    Raises:
        AssetError: If there are not two classes, or a class has no pictures.
    """
    found = class_folders(folder)
    classes = tuple(sorted({path.name for _, path in found}))
    if len(classes) < 2:
        raise AssetError(
            f"{folder} holds {len(classes)} folders of classes; there must be two, each with the pictures of "
            "a class, or folders train, validation and test that hold them"
        )
    paths, labels, of = [], [], []
    for split, path in found:
        pictures = sorted(file for file in path.iterdir() if file.suffix.lower() in _ENDINGS)
        if not pictures and split in ("", "train"):
            raise AssetError(f"{path} holds no pictures ({', '.join(sorted(_ENDINGS))})")
        paths += pictures
        labels += [classes.index(path.name)] * len(pictures)
        of += [split] * len(pictures)
    return Pictures(paths, labels, classes, of if any(of) else None)


def class_folders(folder: Path) -> list[tuple[str, Path]]:
    """Every folder of a class, after the split it is in; empty where no folders are of splits."""
    folders = _folders(folder)
    splits = {path: split_of(path.name) for path in folders}
    if all(splits.values()):
        return [(str(split), inner) for path, split in splits.items() for inner in _folders(path)]
    return [("", path) for path in folders]


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
