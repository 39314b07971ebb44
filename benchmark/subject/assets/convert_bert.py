"""BERT encoders with Hugging Face names: the tensors of the Hub's own file, without the position ids."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def from_transformers(files: dict[str, Path]) -> dict[str, Tensor]:
    """Read ``model.safetensors`` of a ``BertModel``, without ``position_ids``, a constant rebuilt on load."""
    from safetensors.torch import load_file

    tensors = load_file(files["model.safetensors"])
    return {
        name: tensor.float().contiguous()
        for name, tensor in tensors.items()
        if not name.endswith("position_ids")
    }
