"""Reading checkpoints of transformers and timm: configuration, tokenizer and weights, never a pickle."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmark.subject.models.entry import own_random_state
from quanttune.errors import AssetError, QuantTuneError
from quanttune.files import read_json

if TYPE_CHECKING:
    from torch import nn

_TOKENIZERS = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model")
_PICKLED = ("*.bin", "*.pt", "*.pth")

OWN_CODE_ALONE: Mapping[str, Any] = {"local_files_only": True, "trust_remote_code": False}
"""For ``from_pretrained``: nothing from the network, and no code that a checkpoint brings; where that is left
open, the library asks on the terminal."""


def read_transformers(kind: Any, folder: Path, **settings: Any) -> tuple[nn.Module, set[str], set[str]]:
    """Load a checkpoint of transformers in float32 from safetensors.

    Args:
        kind: Class of transformers with ``from_pretrained``.
        folder: Holds configuration and weights.
        settings: Further arguments of the configuration.

    Returns:
        The model in evaluation mode, what the checkpoint has no weights for (drawn from torch's global
        generator), and the weights that have no place in the model.

    Raises:
        AssetError: If the weights cannot be read.
    """
    from safetensors import SafetensorError

    weight_files(folder)
    try:
        told = understood(folder / "config.json", SafetensorError, RuntimeError)
        with told, own_random_state(0), _no_report():
            model, found = kind.from_pretrained(
                folder,
                **OWN_CODE_ALONE,
                use_safetensors=True,
                dtype="float32",
                output_loading_info=True,
                **settings,
            )
    except (SafetensorError, OSError, RuntimeError) as error:
        raise AssetError(f"the weights in {folder} cannot be loaded: {error}") from error
    return model.eval(), set(found["missing_keys"]), set(found["unexpected_keys"])


@contextlib.contextmanager
def understood(path: Path, *passing: type[Exception]) -> Iterator[None]:
    """Name the configuration where a library cannot make a model of it; they fail in every way there is.

    Args:
        path: The configuration.
        passing: What is no fault of the configuration; trouble with files and memory never is.

    Raises:
        AssetError: In place of what a wrong value raises.
    """
    others: tuple[type[Exception], ...] = (QuantTuneError, OSError, MemoryError, *passing)
    try:
        yield
    except others:
        raise
    except Exception as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise AssetError(f"{path} does not make a model: {what}") from error


@contextlib.contextmanager
def _no_report() -> Iterator[None]:
    """Keep transformers from printing what it found: the caller is told, and refuses what is wrong."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def require_complete(folder: Path, absent: Collection[str], unknown: Collection[str]) -> None:
    """Refuse a checkpoint that would leave a part of the model random, or that is of another model.

    Raises:
        AssetError: If a name is given.
    """
    for names, fault in ((absent, "has no weights for"), (unknown, "has weights without a place:")):
        if names:
            some = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise AssetError(f"{folder} {fault} {some}; give a complete checkpoint of this model")


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer of a checkpoint of transformers.

    Raises:
        AssetError: If there is none, it cannot be read or has no padding token.
    """
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in _TOKENIZERS):  # else an empty one would be made
        raise AssetError(f"{folder} has no tokenizer ({', '.join(_TOKENIZERS)}); save it there as well")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **OWN_CODE_ALONE)
    # of every kind: what a file may say is checked where it is used
    except Exception as error:
        what = str(error) or type(error).__name__
        raise AssetError(f"the tokenizer in {folder} cannot be read: {what.splitlines()[0]}") from error
    if tokenizer.pad_token_id is None:
        raise AssetError(f"the tokenizer in {folder} has no padding token; set one and save it again")
    return tokenizer


def read_config(folder: Path) -> dict[str, Any]:
    """The ``config.json`` of a checkpoint.

    Raises:
        AssetError: If it is not there or holds no JSON object.
    """
    if not folder.is_dir():
        raise AssetError(f"there is no folder {folder}")
    path = folder / "config.json"
    try:
        config = read_json(path)
    except (OSError, ValueError) as error:
        raise AssetError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise AssetError(f"{path} holds no JSON object")
    return config


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, whole or in shards, by name.

    Raises:
        AssetError: If there are none; pickled ones are refused.
    """
    files = sorted(folder.glob("*.safetensors"))
    if files:
        return files
    pickled = [path.name for pattern in _PICKLED for path in sorted(folder.glob(pattern))]
    if pickled:
        raise AssetError(
            f"{folder} holds pickled weights ({pickled[0]}), which can run code when read and are refused; "
            "save them again with safe_serialization"
        )
    raise AssetError(f"{folder} holds no *.safetensors weights")
