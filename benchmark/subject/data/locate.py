"""Where an external data set is: a user's folder, the Hub's caches, the Hub; and why it is nowhere."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from benchmark.subject.assets.sources import hub_silence
from benchmark.subject.data.external import VARIABLE, External, data_folder, get_external
from benchmark.subject.data.rows import (
    ArrowRows,
    FolderRows,
    ParquetRows,
    Rows,
    TextRows,
    fingerprint,
    parquet_files,
)
from benchmark.subject.obstacles import Obstacle
from quanttune.errors import AssetError

if TYPE_CHECKING:
    from huggingface_hub import HfFileSystem

Say = Callable[[str], None]
FETCH = "python -m benchmark fetch --suite paper"


def open_split(data: External, split: str) -> Rows:
    """The rows of one of the Hub's splits of a data set.

    A user's folder, if there is one, decides; then the Hub's caches; a split that is streamed is read from
    the Hub by row, any other must have been fetched.

    Raises:
        AssetError: If it is not here, not readable, or has another number of rows than declared.
    """
    rows = _on_this_machine(data, split)
    if rows is None and split in data.streamed and _reach(data) is None:
        rows = _streamed(data, split)
    if rows is None:
        raise AssetError(str(obstacle(data) or _not_fetched(data, split)))
    if len(rows) != data.rows[split]:
        raise AssetError(
            f"data set {data.name}, split {split}: declared {data.rows[split]:,} rows, found {len(rows):,} "
            f"in {rows.place}; complete it, or say what it is in dataset.json in the folder {data.name} of "
            f"{VARIABLE}, which gives other cells"
        )
    return rows


def obstacle(data: External) -> Obstacle | None:
    """Why a data set cannot be had here, None if it is here or the Hub may give it.

    Folders and the files' ends are looked at; whether the Hub answers is asked once in a process.
    """
    try:
        data = data.here()
        absent = [split for split in data.rows if _on_this_machine(data, split) is None]
        if not data.images:  # counting the pictures of a large folder takes minutes
            for split in set(data.rows) - set(absent):
                open_split(data, split)
    except AssetError as error:
        return Obstacle(str(error), f"put data set {data.name} right, then `{FETCH}`")
    if not absent:
        return None
    return _reach(data)


def fetch_data(data: External, say: Say) -> list[tuple[str, str]]:
    """Bring what is not streamed of a data set into the Hub's cache, and check all that is here.

    Returns:
        For each of the Hub's splits, its name and where it is.

    Raises:
        AssetError: If something cannot be had or is not as declared; the message says what to do.
    """
    blocked = obstacle(data)
    if blocked is not None:
        raise AssetError(str(blocked))
    data = data.here()
    found = []
    for split in data.rows:
        if _on_this_machine(data, split) is None and split not in data.streamed:
            _download(data, split, say)
        found.append((split, open_split(data, split).place))
    return found


def content_fingerprints(name: str) -> dict[str, str]:
    """Digests of the content of every split of a data set as it is here, by our names; reads texts whole.

    Raises:
        AssetError: If a split cannot be read.
    """
    data = get_external(name).here()
    return {ours: content_fingerprint(data, split) for ours, split in data.splits.items()}


def content_fingerprint(data: External, split: str) -> str:
    """The digest of one of the Hub's splits, see :func:`benchmark.subject.data.rows.fingerprint`."""
    return fingerprint(open_split(data, split), data.columns, images=data.images)


def _on_this_machine(data: External, split: str) -> Rows | None:
    rows = _local(data, split)
    return _cached(data, split) if rows is None else rows


def _local(data: External, split: str) -> Rows | None:
    """The rows in the user's folder, None if there is no folder.

    Raises:
        AssetError: If there is a folder without this split, or what it holds cannot be read.
    """
    folder = data.folder()
    if folder is None:
        return None
    if data.images:
        for name in (split, "val") if split == "validation" else (split,):
            if (folder / name).is_dir():
                return FolderRows(folder / name, data.classes or 0)
    parquet = _shards(folder, f"{split}*.parquet")
    if parquet:
        return parquet_files(folder, parquet, data.columns)
    text = folder / f"{split}.txt"
    if text.is_file() and data.columns == ("text",):
        return TextRows(text, data.lines_keep_end)
    raise AssetError(str(_folder_lacks(data, split)))


def _folder_lacks(data: External, split: str) -> Obstacle:
    forms = [f"{split}*.parquet"]
    if data.images:
        forms.append(f"{split}/CLASS/PICTURE")
    if data.columns == ("text",):
        forms.append(f"{split}.txt")
    return Obstacle(
        f"{data.folder()} holds no split {split} of {data.name}",
        f"put {' or '.join(forms)} there, or take the folder away to use the Hub",
    )


def _cached(data: External, split: str) -> Rows | None:
    """The rows in the Hub's caches on this machine; the network is not asked."""
    found = _snapshot(data)
    shards = [] if found is None else _shards(found / data.config, f"{split}-*.parquet")
    if found is not None and _complete(shards):
        return parquet_files(found / data.config, shards, data.columns)
    return _prepared(data, split)


def _snapshot(data: External) -> Path | None:
    """The cached snapshot of the repository, whatever part of it is there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(data.repo, repo_type="dataset", revision=data.revision, local_files_only=True)
        )
    except LocalEntryNotFoundError:
        return None


def _complete(shards: list[str]) -> bool:
    """Whether all of ``split-00000-of-00014.parquet`` and so on are there."""
    if not shards:
        return False
    of = shards[0].removesuffix(".parquet").split("-of-")[-1].partition("-")[0]
    return not of.isdigit() or len(shards) == int(of)


def _prepared(data: External, split: str) -> Rows | None:
    """What ``datasets`` made of it earlier, in ``HF_DATASETS_CACHE``."""
    from huggingface_hub import constants

    # As ``datasets`` finds it, whose import takes seconds.
    cache = os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets"
    root = Path(cache).expanduser() / data.repo.replace("/", "___")
    config = "default" if data.config == "data" else data.config
    name = data.repo.rpartition("/")[2].replace("-", "_")
    for pattern in (
        f"{name}-{split}.arrow",
        f"{name}-{split}-*.arrow",
        f"*-{split}.arrow",
        f"*-{split}-*.arrow",
    ):
        found = sorted((root / config).glob(f"*/*/{pattern}"))
        if found:
            import datasets

            parts = [path for path in found if path.parent == found[-1].parent]
            loaded = datasets.concatenate_datasets([datasets.Dataset.from_file(str(part)) for part in parts])
            return ArrowRows(loaded, data.columns, str(parts[0].parent))
    return None


def _reach(data: External) -> Obstacle | None:
    """What stands between this machine and the data on the Hub."""
    from huggingface_hub import get_token

    root = data_folder()
    places = f"{VARIABLE} is not set" if root is None else f"no folder {root / data.name}"
    local = f"`export {VARIABLE}=FOLDER` where FOLDER/{data.name} holds it"
    silence = hub_silence()
    if silence is not None:
        where = f"`{FETCH}` where the Hub answers, with HF_HOME on a disk that both machines see"
        return Obstacle(
            f"data set {data.name} is not on this machine ({places}; not in the Hub's cache, and {silence})",
            f"{local}; or {where}",
        )
    if data.gated and get_token() is None:
        return _gated(data, "nobody is logged in")
    return None


def _gated(data: External, why: str) -> Obstacle:
    return Obstacle(
        f"the Hub gives {data.repo} only to those who accepted its terms, and {why}",
        f"accept them at {data.page}, then `hf auth login` and `{FETCH}`; "
        f"or `export {VARIABLE}=FOLDER` where FOLDER/{data.name} holds it",
    )


def _not_fetched(data: External, split: str) -> Obstacle:
    return Obstacle(f"split {split} of data set {data.name} is not on this machine", f"`{FETCH}`")


def _download(data: External, split: str, say: Say) -> None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    say(f"downloading {data.repo}, split {split}, from the Hugging Face Hub")
    pattern = f"{data.config}/{split}-*.parquet"
    try:
        snapshot_download(data.repo, repo_type="dataset", revision=data.revision, allow_patterns=[pattern])
    except (HfHubHTTPError, OSError) as error:
        raise AssetError(_refusal(data, error)) from error


def _streamed(data: External, split: str) -> Rows:
    """Rows on the Hub, of which only the asked row groups travel."""
    from huggingface_hub import HfFileSystem
    from huggingface_hub.errors import HfHubHTTPError

    try:
        hub: HfFileSystem = HfFileSystem()
        folder = f"datasets/{data.repo}@{data.revision}/{data.config}"
        names = sorted(hub.glob(f"{folder}/{split}-*.parquet"))
        files = [(name.rpartition("/")[2], lambda name=name: hub.open(name, "rb")) for name in names]
        return ParquetRows(files, data.columns, f"{data.page}, streamed")
    except (HfHubHTTPError, OSError) as error:
        raise AssetError(_refusal(data, error)) from error


def _refusal(data: External, error: Exception) -> str:
    response = getattr(error, "response", None)
    if data.gated and response is not None and response.status_code in (401, 403):
        return str(_gated(data, f"refused this account ({response.status_code})"))
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"the Hub does not give data set {data.name} ({data.repo}): {reason}; see {data.page}"


def _shards(folder: Path, pattern: str) -> list[str]:
    return sorted(path.name for path in folder.glob(pattern))
