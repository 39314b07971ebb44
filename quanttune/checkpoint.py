"""The state of an interrupted fine-tuning, as one safetensors file that is replaced atomically."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

_MODEL, _OPTIMIZER = "model|", "optimizer|"


class Checkpoint:
    """Saves and restores a model, its AdamW optimizer and any JSON state.

    Args:
        path: File to keep; ``None`` keeps nothing.
        model: The model being fine-tuned.
        optimizer: Its optimizer.
        purpose: Digest of the settings; a file written for other settings is ignored.
    """

    def __init__(
        self, path: Path | None, model: nn.Module, optimizer: torch.optim.Optimizer, purpose: str
    ) -> None:
        self._path, self._model, self._optimizer, self._purpose = path, model, optimizer, purpose

    def save(self, state: dict[str, Any]) -> None:
        """Write everything, replacing the file only when the new one is complete."""
        if self._path is None:
            return
        tensors = {_MODEL + name: tensor.detach().cpu() for name, tensor in self._model.named_parameters()}
        for index, moments in self._optimizer.state_dict()["state"].items():
            for name, value in moments.items():
                tensors[f"{_OPTIMIZER}{index}|{name}"] = torch.as_tensor(value).detach().cpu()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_suffix(f".{os.getpid()}.part")
        save_file(tensors, temporary, metadata={"purpose": self._purpose, "state": json.dumps(state)})
        temporary.replace(self._path)

    def load(self) -> dict[str, Any] | None:
        """Restore everything and return the JSON state; ``None`` if there is nothing usable to go on from."""
        if self._path is None or not self._path.is_file():
            return None
        try:
            with safe_open(self._path, framework="pt") as stream:
                metadata = stream.metadata() or {}
            tensors = load_file(self._path)
        except (SafetensorError, OSError):
            return None  # a damaged checkpoint costs time, not correctness: the run starts over
        if metadata.get("purpose") != self._purpose:
            return None
        parameters = dict(self._model.named_parameters())
        moments: dict[int, dict[str, torch.Tensor]] = {}
        with torch.no_grad():
            for name, tensor in tensors.items():
                if name.startswith(_MODEL):
                    parameters[name.removeprefix(_MODEL)].copy_(tensor)
                else:
                    _, index, moment = name.split("|")
                    moments.setdefault(int(index), {})[moment] = tensor
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": moments, "param_groups": groups})
        state: dict[str, Any] = json.loads(metadata["state"])
        return state

    def remove(self) -> None:
        """Delete the file of a finished run."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
