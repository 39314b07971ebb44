"""What models of Hub repositories share: finding the checkpoint, what is pinned of it, what is in the way."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

from benchmark.subject.assets.catalogue import Hub
from benchmark.subject.assets.pretrained import find, obstacle, obtain
from benchmark.subject.models.checkpoint import weight_files
from benchmark.subject.models.entry import ModelEntry
from benchmark.subject.obstacles import Obstacle
from quanttune.digests import json_digest, tensor_digest
from quanttune.errors import AssetError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

WEIGHTS = "model.safetensors"
BERT_FILES = ("config.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json", "vocab.txt")
OPT_FILES = ("config.json", WEIGHTS, "merges.txt", "tokenizer_config.json", "vocab.json")
TIMM_FILES = ("config.json", WEIGHTS)

_PROBE = "The gate's reference-model (2024) isn't naïve;\n\n one can't <unk> it."


class HubEntry(ModelEntry):
    """A model whose pretrained weights come from a Hub repository, or from a folder that stands in for it.

    Their digest is not known in advance: the identity holds where they come from, and the lock file of a
    results folder what they were at first use.

    Attributes:
        repo: ``owner/name``.
        revision: Branch, tag or commit.
        files: Of the repository.
    """

    repo: str
    revision: str
    files: tuple[str, ...]

    @property
    def hub(self) -> Hub:
        """Where the checkpoint comes from."""
        return Hub(self.repo, self.files, revision=self.revision)

    @property
    def folder(self) -> Path:
        """The checkpoint's folder on this machine, brought here if need be.

        Raises:
            AssetError: If it cannot be had.
        """
        return obtain(self.hub, lambda _line: None).folder

    def origin(self) -> dict[str, Any]:
        """What the identity holds of the checkpoint: what is known without its weights."""
        return {"repo": self.repo, "revision": self.revision}

    def fetch(self, say: Callable[[str], None]) -> list[tuple[Path, bool]]:
        """The checkpoint's folder, and whether this call downloaded it."""
        found = obtain(self.hub, say)
        weight_files(found.folder)
        return [(found.folder, found.fresh)]

    def obstacle(self) -> Obstacle | None:
        """That the checkpoint is neither here nor to be had, or is here and cannot be used."""
        found = find(self.hub)
        if found is None:
            return obstacle(self.hub)
        try:
            weight_files(found.folder)
        except AssetError as error:
            return Obstacle(str(error), "save the checkpoint there as safetensors")
        return None

    @cached_property
    def checkpoint_digest(self) -> str:
        """Digest of the checkpoint's tensors as its files hold them, whole or in shards."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        tensors: dict[str, Tensor] = {}
        try:
            for path in weight_files(self.folder):
                tensors.update(load_file(path))
        except (SafetensorError, OSError) as error:
            raise AssetError(f"the weights in {self.folder} cannot be read: {error}") from error
        return tensor_digest(tensors)

    def pins(self) -> dict[str, Any]:
        """Repository, revision, commit where it is known, and the digest of the tensors."""
        commit = obtain(self.hub, lambda _line: None).commit
        return {**self.origin(), "commit": commit, "weights": self.checkpoint_digest}


def tokenizer_digest(tokenizer: Any) -> str:
    """A digest of a tokenizer by what it does, whatever files it was read from.

    The text of every token of the vocabulary is encoded, so that rules that build tokens count, too.

    Args:
        tokenizer: Of transformers.
    """
    vocabulary = tokenizer.get_vocab()
    texts = [tokenizer.convert_tokens_to_string([token]) for token in sorted(vocabulary)]
    return json_digest([vocabulary, tokenizer([_PROBE, *texts])["input_ids"]])
