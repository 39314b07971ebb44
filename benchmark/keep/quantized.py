"""A cell's quantized model beside its record: quantizers in one file, weights by reference to their stage.

``cells/<cell id>.quantized.safetensors`` holds the tensors of the quantizers, and in its header the JSON that
says what they are. The record holds the file's digest and the name of the stage that has changed weights, so
that the weights of one training are kept once, whatever the number of cells that use them.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmark.keep.atomic import write_atomically
from benchmark.keep.record import Kept, plain
from benchmark.keep.stages import Stages
from quanttune.digests import canonical_json, sha256_file
from quanttune.errors import StoreError

if TYPE_CHECKING:
    from quanttune.quantization import Quantized

_HEADER = "quantized"


def write_quantized(path: Path, quantized: Quantized, weights_digest: str) -> str:
    """Keep a quantized model, without its weights.

    Args:
        path: The file.
        quantized: What a method found.
        weights_digest: Digest of its weights, if it has weights of its own.

    Returns:
        The file's sha256.

    Raises:
        StoreError: If it cannot be written.
    """
    from safetensors.torch import save_file

    # The weights are hashed once a session; a cell only names them.
    document, tensors = replace(quantized, weights=None).to_state()
    document["weights"] = None if quantized.weights is None else weights_digest
    header = {_HEADER: canonical_json(plain(document))}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=header))
    return sha256_file(path)


def keep_quantized(path: Path, quantized: Quantized, weights_digest: str, stages: Stages) -> Kept:
    """Keep a quantized model, and its weights as a stage unless they are one.

    Args:
        path: As in :func:`write_quantized`, which this calls.
        quantized: See there.
        weights_digest: See there.
        stages: Where weights are kept.
    """
    weights, origin = quantized.weights, quantized.weights_origin
    if weights is not None and origin is None:
        key = {"digest": weights_digest}
        stages.tensors("weights", key, lambda: weights)
        origin = stages.reference("weights", key)
    return Kept(write_quantized(path, quantized, weights_digest), origin)


def read_quantized(path: Path, sha256: str, stages: Stages, weights: str | None) -> Quantized:
    """The inverse of :func:`write_quantized`.

    Args:
        path: The file.
        sha256: Its digest, from the record.
        stages: Where the weights are.
        weights: The stage that has them; ``None`` for the reference's own.

    Raises:
        StoreError: If the file or the weights are absent or damaged.
    """
    from safetensors import SafetensorError, safe_open

    from quanttune.quantization import Quantized

    if not path.is_file() or sha256_file(path) != sha256:
        raise StoreError(f"{path} is absent or not what the record names")
    try:
        with safe_open(path, framework="pt") as file:
            document: dict[str, Any] = json.loads(file.metadata()[_HEADER])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise StoreError(f"{path} holds no quantized model: {error}") from error
    kept = None if weights is None else stages.open(weights)
    if weights is not None and kept is None:
        raise StoreError(f"the weights {weights} are no longer kept in {stages.folder}")
    return Quantized.from_state(document, tensors, kept)
