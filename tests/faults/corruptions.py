"""Ways in which a file that is kept comes to harm."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

Harm = Callable[[Path, random.Random], None]
"""Does its worst to a file."""


def _edit(change: Callable[[bytes, random.Random], bytes]) -> Harm:
    def harm(path: Path, rng: random.Random) -> None:
        path.write_bytes(change(path.read_bytes(), rng))

    return harm


def _flipped(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content))
    return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]


def _overwritten(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content))
    return content[:at] + rng.randbytes(min(64, len(content) - at)) + content[at + 64 :]


def _swapped(path: Path, rng: random.Random) -> None:
    """Another file of the same kind under this one's name."""
    others = [other for other in sorted(path.parent.glob(f"*{path.suffix}")) if other != path]
    if others:
        path.write_bytes(rng.choice(others).read_bytes())
    else:
        path.write_bytes(path.read_bytes()[::-1])


def _folder(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.mkdir()


def _nowhere(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.symlink_to(path.with_name("not there"))


def _outside(path: Path, rng: random.Random) -> None:
    """A link to something of the user's own, which nothing here may change."""
    path.unlink()
    path.symlink_to(precious(path))


def _elsewhere(path: Path, rng: random.Random) -> None:
    """A link to the very content, on another disk perhaps."""
    aside = path.parent.parent / f"{path.name}.aside"
    shutil.move(path, aside)
    path.symlink_to(aside)


def precious(path: Path) -> Path:
    """A file outside of the results that hold ``path``."""
    results = next(parent for parent in path.parents if parent.name == "results")
    return results.parent / "precious.txt"


HARMS: Mapping[str, Harm] = {
    "a bit flipped": _edit(_flipped),
    "bytes overwritten": _edit(_overwritten),
    "cut": _edit(lambda content, rng: content[: rng.randrange(len(content))]),
    "a byte more": _edit(lambda content, rng: content + b"\n"),
    "twice in one": _edit(lambda content, rng: content + content),
    "emptied": _edit(lambda content, rng: b""),
    "zeroed": _edit(lambda content, rng: bytes(len(content))),
    "another content": _edit(lambda content, rng: rng.randbytes(len(content))),
    "another of its kind": _swapped,
    "removed": lambda path, rng: path.unlink(),
    "a folder": _folder,
    "a link to nothing": _nowhere,
    "a link to something else": _outside,
    "a link to the same": _elsewhere,
}
