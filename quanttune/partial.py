"""Results of a long piece of work that is done part by part, kept so that an interruption loses one part."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from quanttune.digests import json_digest, tensor_digest
from quanttune.files import disk_error, whole_file


class PartialResults:
    """Named tensors that grow, in one safetensors file that is replaced atomically.

    A file that is damaged, or was written for another purpose, costs time, never correctness: the work starts
    over.

    Args:
        path: File to keep; ``None`` keeps nothing.
        purpose: What decides the tensors beside the file's name.
    """

    def __init__(self, path: Path | None, purpose: str) -> None:
        self._path = path
        # The name says what the caller knows: a copy of another work's file over this one must be noticed.
        self._work = "" if path is None else json_digest([purpose, path.name])

    def load(self) -> dict[str, Tensor]:
        """What was kept; nothing if there is nothing usable."""
        if self._path is None or not self._path.is_file():
            return {}
        try:
            with safe_open(self._path, framework="pt") as stream:
                digest = (stream.metadata() or {}).get("digest")
                tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
        except (SafetensorError, OSError):
            return {}
        return tensors if digest == self._digest(tensors) else {}

    def save(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep everything that is known by now.

        Raises:
            StoreError: If the disk is full or the file cannot be written; the last one stays.
        """
        if self._path is None:
            return
        metadata = {"digest": self._digest(tensors)}
        try:
            with whole_file(self._path) as temporary:
                save_file(dict(tensors), temporary, metadata=metadata)
        except (SafetensorError, OSError) as error:
            raise disk_error(self._path, error) or error from error

    def remove(self) -> None:
        """Delete the file of finished work."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def _digest(self, tensors: Mapping[str, Tensor]) -> str:
        return json_digest([self._work, tensor_digest(tensors)])
