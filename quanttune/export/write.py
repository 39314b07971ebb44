"""A quantized model as an ONNX file whose products runtimes compute on integers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn

from quanttune.errors import ConfigError, QuantTuneError
from quanttune.export.expand import absorb_relu, expand, fold_factors
from quanttune.export.flattening import stay_flat
from quanttune.export.graph import Editor
from quanttune.export.layers import lower_layers
from quanttune.export.levels import require_expressible
from quanttune.export.sinking import sink
from quanttune.export.tidy import finite_masks, tidy
from quanttune.export.tracing import trace
from quanttune.files import whole_file
from quanttune.inputs import ModelInputs, batch_size_of, in_evaluation, logits_of
from quanttune.quantization.quantizers import Quantizer
from quanttune.quantization.scheme import Scheme

PRODUCER, FORMAT = "quanttune", 1
METADATA_PREFIX = "quanttune."
WEIGHT_CONTAINERS = ("int8", "uint8")
_LARGEST_FILE = 2 << 30  # what protobuf holds


class QuantizedModelValue(Protocol):
    """What is exported: a :class:`~quanttune.quantization.Quantized`, which hands itself over."""

    @property
    def quantizers(self) -> Mapping[str, Quantizer]:
        """Site id to quantizer."""

    @property
    def known(self) -> frozenset[str] | None:
        """Ids of all sites of the model."""

    @property
    def scheme(self) -> Scheme | None:
        """What was asked for."""

    @property
    def extra_operations(self) -> dict[str, str]:
        """What integer inference computes beside the network's own operations."""

    def quantizers_digest(self) -> str:
        """Of the quantizers alone."""

    def apply(self, model: nn.Module) -> Any:
        """A copy of the model, under ``model``, with the weights that the quantizers belong to."""


def export_onnx(
    quantized: QuantizedModelValue,
    path: Path | str,
    model: nn.Module,
    inputs: ModelInputs,
    *,
    weights: str = "int8",
    logits: Callable[[Any], Tensor] = logits_of,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write ``quantized`` as ONNX; see :meth:`quanttune.quantization.Quantized.to_onnx`.

    Returns:
        The file.

    Raises:
        ConfigError: If a quantizer has no form in ONNX, or an argument does not fit; before any work.
        QuantTuneError: If torch cannot export the model, or the result is not valid.
    """
    path = Path(path)
    if weights not in WEIGHT_CONTAINERS:
        raise ConfigError(f"weights = {weights!r}: give {' or '.join(WEIGHT_CONTAINERS)}")
    if not path.parent.is_dir():
        raise ConfigError(f"{path} cannot be written: there is no folder {path.parent}")
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; give the name of a file")
    require_expressible(quantized.quantizers)
    proto = to_proto(quantized, model, inputs, weights=weights, logits=logits, metadata=metadata)
    if proto.ByteSize() >= _LARGEST_FILE:
        raise QuantTuneError(f"the model takes {proto.ByteSize() / 2**30:.1f} GiB; an ONNX file holds 2")
    onnx.checker.check_model(proto, full_check=True)
    with whole_file(path) as temporary:
        onnx.save(proto, temporary)
    return path


def to_proto(
    quantized: QuantizedModelValue,
    model: nn.Module,
    inputs: ModelInputs,
    *,
    weights: str = "int8",
    logits: Callable[[Any], Tensor] = logits_of,
    metadata: Mapping[str, str] | None = None,
) -> onnx.ModelProto:
    """The same as an ONNX message."""
    applied = quantized.apply(model).model.cpu()
    with in_evaluation(applied):
        found = trace(applied, _example(inputs), quantized.quantizers, quantized.known, logits)
    editor = Editor(found)
    expand(editor, quantized.quantizers, weights == "uint8")
    absorb_relu(editor)
    fold_factors(editor)
    sink(editor)
    lower_layers(editor)
    stay_flat(editor)
    finite_masks(editor)
    tidy(found, editor)
    found.producer_name = PRODUCER
    for key, value in sorted({**_own_metadata(quantized), **(metadata or {})}.items()):
        found.metadata_props[f"{METADATA_PREFIX}{key}"] = value
    return ir.to_proto(found)


def _own_metadata(quantized: QuantizedModelValue) -> dict[str, str]:
    scheme = quantized.scheme
    return {
        "format": str(FORMAT),
        "scheme": "FP32" if scheme is None else str(scheme),
        "profile": "none" if scheme is None else scheme.profile,
        "quantizers": quantized.quantizers_digest(),
        "extra_operations": json.dumps(quantized.extra_operations, sort_keys=True),
    }


def _example(inputs: ModelInputs) -> ModelInputs:
    """Two items: of a batch of one the export would take the size for fixed."""
    size = batch_size_of(inputs)

    def two(tensor: Tensor) -> Tensor:
        return torch.cat([tensor, tensor]) if size == 1 else tensor[:2]

    if isinstance(inputs, Mapping):
        return {name: two(tensor.cpu()) for name, tensor in inputs.items()}
    return two(inputs.cpu())
