"""Read Parquet files with ``datasets``: digests first, no network, cache in the suite's own folder."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmark.subject.assets.cache import cache_folder, out_of_space
from benchmark.subject.data.manifest import DATA_FOLDER, RESTORE, content_digest, describe
from quanttune.digests import sha256_file
from quanttune.errors import AssetError

if TYPE_CHECKING:
    from datasets import Dataset

_MAGIC = b"PAR1"  # Parquet files begin and end with it


@lru_cache
def load_bundled(dataset: str, folder: Path = DATA_FOLDER) -> Dataset:
    """All rows of a bundled data set, checked against the manifest; kept for the life of the process.

    Raises:
        AssetError: If a file is absent, is not Parquet or is not the one the manifest promises.
    """
    parts = describe(dataset, folder)["files"]
    paths = []
    for part in parts:
        path = folder / part["file"]
        require_parquet(path, RESTORE)
        found = sha256_file(path)
        if found != part["sha256"]:
            raise AssetError(f"{path} has sha256 {found}, manifest.json promises {part['sha256']}; {RESTORE}")
        paths.append(path)
    expected = [part["content_sha256"] for part in parts]
    data = read_parquet(paths)
    if _contents(data, parts) != expected:  # the library's converted copy in the cache is damaged
        forget_converted()
        data = read_parquet(paths)
        if _contents(data, parts) != expected:
            raise AssetError(
                f"the contents of {_names(paths)} are not what manifest.json promises; {RESTORE}"
            )
    return data


def read_parquet(paths: Sequence[Path]) -> Dataset:
    """Read Parquet files of one schema as one ``datasets.Dataset``, memory-mapped from the suite's cache.

    Raises:
        AssetError: If a file cannot be read as Parquet or the cache folder cannot be written.
    """
    for path in paths:
        require_parquet(path)
    import datasets
    import pyarrow

    cache = cache_folder() / "datasets"
    # The library draws bars for its one-second conversion; they would tear the suite's own progress line.
    bars = datasets.utils.are_progress_bars_disabled()
    datasets.utils.disable_progress_bars()
    try:
        return datasets.Dataset.from_parquet([str(path) for path in paths], cache_dir=str(cache))
    except (datasets.exceptions.DatasetsError, pyarrow.ArrowException, OSError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        if isinstance(cause, OSError):
            out_of_space(cause, cache)
        raise AssetError(f"cannot read {_names(paths)} as Parquet: {cause or error}") from error
    finally:
        if not bars:
            datasets.utils.enable_progress_bars()


def require_parquet(path: Path, remedy: str = "give the Parquet file itself") -> None:
    """Refuse what is not a Parquet file before any library reads it.

    Raises:
        AssetError: If the file is absent, too short, or lacks Parquet's marks at its beginning and end.
    """
    if not path.is_file():
        raise AssetError(f"data file {path} is not there; {remedy}")
    with path.open("rb") as stream:
        head = stream.read(64)
        stream.seek(-min(4, path.stat().st_size), 2)
        tail = stream.read(4)
    if head[:4] == _MAGIC and tail == _MAGIC:
        _require_footer(path, remedy)
        return
    if head[:4] == _MAGIC:
        what = "a Parquet file cut short"
    elif head.startswith(b"version https://git-lfs"):
        what = "a Git LFS pointer"
    elif not head:
        what = "an empty file"
    elif all(byte in b"\t\r\n" or 32 <= byte < 127 for byte in head):
        what = "a text file"
    else:
        what = "not a Parquet file"
    raise AssetError(f"{path} should be a Parquet file but is {what}; {remedy}")


def _require_footer(path: Path, remedy: str) -> None:
    import pyarrow
    import pyarrow.parquet

    try:
        pyarrow.parquet.read_metadata(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise AssetError(
            f"{path} is a damaged Parquet file ({str(error).splitlines()[0]}); {remedy}"
        ) from error


def forget_converted() -> None:
    """Delete what ``datasets`` keeps in the suite's cache; it is made again on the next use."""
    shutil.rmtree(cache_folder() / "datasets", ignore_errors=True)


def _contents(data: Dataset, parts: Sequence[dict[str, Any]]) -> list[str]:
    digests, start = [], 0
    for part in parts:
        digests.append(content_digest(data.data.table.slice(start, part["rows"])))
        start += part["rows"]
    return digests


def _names(paths: Sequence[Path]) -> str:
    return ", ".join(str(path) for path in paths)
