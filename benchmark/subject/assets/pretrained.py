"""Checkpoints whose digest nobody could pin in advance: where they are on this machine, and how they come.

Looked for in a local folder (``QUANTTUNE_MODELS``), in the Hub's own cache, on the Hub. Whatever the source,
the result is one folder as ``save_pretrained`` of transformers or ``save_for_hf`` of timm leaves it. What the
weights are is filled in at first use and pinned by the lock file, see :mod:`benchmark.keep.lock`.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from benchmark.subject.assets.catalogue import Hub
from benchmark.subject.assets.sources import Say, SourceUnavailable, from_hub, from_hub_cache, hub_silence
from benchmark.subject.obstacles import Obstacle
from quanttune.errors import AssetError

VARIABLE = "QUANTTUNE_MODELS"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_CONVERTER, _CONVERSION = "SFconvertbot", "Adding `safetensors` variant of this model"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is on this machine.

    Attributes:
        folder: Holds the configuration, the weights and, for a text model, the tokenizer.
        commit: The Hub's commit, where it is known.
        fresh: Whether this call brought it.
    """

    folder: Path
    commit: str | None = None
    fresh: bool = False


def models_folder() -> Path | None:
    """The user's folder of checkpoints, ``QUANTTUNE_MODELS``; None if it is not set."""
    chosen = os.environ.get(VARIABLE)
    return Path(chosen).expanduser().absolute() if chosen else None


def find(hub: Hub) -> Checkpoint | None:
    """The checkpoint of a Hub repository on this machine, None if it is not there; the network is not asked.

    ``QUANTTUNE_MODELS/owner/name``, then ``QUANTTUNE_MODELS/name``, then the Hub's own cache.
    """
    root = models_folder()
    if root is not None:
        for folder in (root / hub.repo, root / hub.repo.rpartition("/")[2]):
            if (folder / "config.json").is_file():
                return Checkpoint(folder)
    for revision in (hub.revision, *_cached_conversions(hub)):
        files = from_hub_cache(dataclasses.replace(hub, revision=revision))
        if files is not None:
            return _in_cache(files)
    return None


def obtain(hub: Hub, say: Say) -> Checkpoint:
    """The checkpoint of a Hub repository, downloaded into the Hub's cache if this machine lacks it.

    Raises:
        AssetError: If it is not here and the Hub does not give it; the message says what to do.
    """
    found = find(hub)
    if found is not None:
        return found
    try:
        return dataclasses.replace(_in_cache(_download(hub, say)), fresh=True)
    except SourceUnavailable as error:
        raise AssetError(str(_absent(hub, str(error)))) from error


def obstacle(hub: Hub) -> Obstacle | None:
    """Why the checkpoint cannot be had on this machine, None if it is here or the Hub answers.

    The network is asked whether the Hub answers, once in a process.
    """
    if find(hub) is not None:
        return None
    silence = hub_silence()
    return None if silence is None else _absent(hub, f"not in the Hub's local cache, and {silence}")


def _absent(hub: Hub, why: str) -> Obstacle:
    root = models_folder()
    places = f"{VARIABLE} is not set" if root is None else f"not in {root / hub.repo}"
    target = (root or Path("models")) / hub.repo
    command = ["hf", "download", hub.repo, *hub.files, "--revision", hub.revision, "--local-dir", str(target)]
    return Obstacle(
        f"the weights of {hub.repo} are not on this machine ({places}; {why})",
        f"`{shlex.join(command)}` where the Hub answers, then set {VARIABLE}={root or 'models'}; or mount "
        "the HF_HOME of a machine on which `python -m benchmark fetch` was run",
    )


def _download(hub: Hub, say: Say) -> dict[str, Path]:
    try:
        return from_hub(hub, say)
    except SourceUnavailable:
        revision = None if hub_silence() else _conversion(hub)
        if revision is None:
            raise
    say(f"{hub.repo} has no safetensors at {hub.revision}; taking the Hub's own conversion, {revision}")
    return from_hub(dataclasses.replace(hub, revision=revision), say)


def _conversion(hub: Hub) -> str | None:
    """The reference of the pull request by which the Hub offers pickled weights as safetensors.

    Only the Hub's own converter is trusted to have made it: anyone can open a pull request.
    """
    from huggingface_hub import get_repo_discussions
    from huggingface_hub.errors import HfHubHTTPError

    try:
        offers = get_repo_discussions(hub.repo, author=_CONVERTER, discussion_type="pull_request")
        found = [offer.git_reference for offer in offers if offer.title == _CONVERSION]
    except (HfHubHTTPError, OSError):
        return None  # the first refusal, which is raised then, says more
    return found[0] if found else None


def _cached_conversions(hub: Hub) -> list[str]:
    """References of pull requests in the Hub's cache: what an earlier download may have had to take."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"models--{hub.repo.replace('/', '--')}" / "refs" / "refs" / "pr"
    return [f"refs/pr/{path.name}" for path in sorted(folder.glob("*"))]


def _in_cache(files: dict[str, Path]) -> Checkpoint:
    folder = next(iter(files.values())).parent
    return Checkpoint(folder, folder.name if _COMMIT.fullmatch(folder.name) else None)
