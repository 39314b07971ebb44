"""The state of an interrupted fine-tuning, as one safetensors file that is replaced atomically.

The file holds a digest of everything in it and of the run it belongs to. One that is damaged, edited or of
another run costs time, never correctness: the run starts over.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from quanttune.digests import json_digest, tensor_digest
from quanttune.files import disk_error, whole_file

_MODEL, _OPTIMIZER = "model|", "optimizer|"
_STEP = "step"
_MOMENTS = {_STEP, "exp_avg", "exp_avg_sq"}


class Checkpoint:
    """Saves and restores a model, its AdamW optimizer and any JSON state.

    Args:
        path: File to keep; ``None`` keeps nothing.
        model: The model being fine-tuned, with the weights it starts from.
        optimizer: Its optimizer.
        purpose: Digest of the settings. A file written for other settings, for other first weights or under
            another name is ignored.
    """

    def __init__(
        self, path: Path | None, model: nn.Module, optimizer: torch.optim.Optimizer, purpose: str
    ) -> None:
        self._path, self._model, self._optimizer = path, model, optimizer
        # The name says what the caller knows and we do not, such as the data: a copy of another run's file
        # over this one's must be noticed.
        self._run = "" if path is None else json_digest([purpose, path.name, tensor_digest(self._tensors())])

    def save(self, state: dict[str, Any]) -> None:
        """Write everything, replacing the file only when the new one is complete.

        Raises:
            StoreError: If the disk is full or the file cannot be written; the last one stays.
        """
        if self._path is None:
            return
        # channels_last and its like are no layout of the file's
        tensors = {
            _MODEL + name: tensor.detach().cpu().contiguous() for name, tensor in self._tensors().items()
        }
        for name, buffer in self._model.named_buffers():
            # safetensors takes neither expanded tensors nor views of one another, which buffers may be
            tensors[_MODEL + name] = buffer.detach().cpu().clone(memory_format=torch.contiguous_format)
        for index, moments in self._optimizer.state_dict()["state"].items():
            for name, value in moments.items():
                tensors[f"{_OPTIMIZER}{index}|{name}"] = torch.as_tensor(value).detach().cpu().contiguous()
        text = json.dumps(state)
        metadata = {"state": text, "digest": self._digest(text, tensors)}
        try:
            with whole_file(self._path) as temporary:
                save_file(tensors, temporary, metadata=metadata)
        except (SafetensorError, OSError) as error:
            raise disk_error(self._path, error) or error from error

    def load(self, restore: Callable[[dict[str, Any]], None]) -> bool:
        """Restore everything; nothing at all if there is nothing usable to go on from.

        Args:
            restore: Takes over the JSON state, or raises ``KeyError``, ``TypeError`` or ``ValueError`` and
                leaves everything as it was if that is not what it saved.

        Returns:
            Whether the run goes on from the file.
        """
        if self._path is None or not self._path.is_file():
            return False
        try:
            with safe_open(self._path, framework="pt") as stream:
                metadata = stream.metadata() or {}
                tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
        except (SafetensorError, OSError):
            return False
        text = metadata.get("state", "")
        if metadata.get("digest") != self._digest(text, tensors):
            return False
        # A digest tells that nobody touched the file since, not that it was a checkpoint of ours then.
        try:
            moments = self._moments(tensors)
            restore(json.loads(text))
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
            return False
        with torch.no_grad():
            for name, current in self._tensors().items():
                current.copy_(tensors[_MODEL + name])
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": moments, "param_groups": groups})
        return True

    def _moments(self, tensors: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
        """The optimizer's state among the tensors of a file.

        Raises:
            KeyError: If the model's are not all there.
            ValueError: If there is one that has no place, or another shape than its place.
        """
        for name, current in self._tensors().items():
            _require(tensors[_MODEL + name], current)
        parameters = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith(_MODEL):
                continue
            kind, index, moment = name.split("|")
            if f"{kind}|" != _OPTIMIZER or moment not in _MOMENTS or not 0 <= int(index) < len(parameters):
                raise ValueError(f"no place for {name}")
            if moment != _STEP:
                _require(tensor, parameters[int(index)])
            moments.setdefault(int(index), {})[moment] = tensor
        if any(found.keys() != _MOMENTS or found[_STEP].numel() != 1 for found in moments.values()):
            raise ValueError("moments that are not AdamW's")
        return moments

    def remove(self) -> None:
        """Delete the file of a finished run."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def _tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers, each once: buffers move in training as well."""
        return {**dict(self._model.named_parameters()), **dict(self._model.named_buffers())}

    def _digest(self, state: str, tensors: Mapping[str, Tensor]) -> str:
        return json_digest([self._run, state, tensor_digest(tensors)])


def _require(found: Tensor, place: Tensor) -> None:
    if found.shape != place.shape or found.dtype != place.dtype:
        raise ValueError(f"{found.dtype} of shape {tuple(found.shape)} where {tuple(place.shape)} belongs")
