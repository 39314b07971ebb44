"""The model as an ONNX graph in which a node of our own stands at every site."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from quanttune.errors import QuantTuneError
from quanttune.inputs import ModelInputs, call_model
from quanttune.quantization.sites import SiteId
from quanttune.quantization.tracing import SiteHandlers
from quanttune.quantization.walkers import safe_softmax, softmax

DOMAIN, MARKER, SITE = "quanttune", "Site", "site"
_MARKED = "quanttune::Site"
OPSET = 20
"""The first that has Gelu, and the last whose quantized tensors every release of the runtimes reads."""
INPUT_NAME, OUTPUT_NAME = "input", "logits"
BATCH, TOKENS = "batch", "tokens"


class ExportVisitor(SiteHandlers):
    """Puts a node with the site's id behind every tensor that is quantized, and opens attention.

    Args:
        model: The module whose forward pass is exported.
        site_ids: The sites.
        known: Ids of all sites of the model, where they are known.
    """

    def __init__(self, model: nn.Module, site_ids: Iterable[str], known: Iterable[str] | None) -> None:
        super().__init__(model, {site_id: _marker(site_id) for site_id in site_ids}, known)

    def opens_attention(self, path: str) -> bool:
        """Everywhere, so that the graph of a model in float is that of the quantized one."""
        return True

    def apply(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: SiteId | None = None
    ) -> Any:
        """A plain softmax in every case: rows without a token are masked by a finite number instead."""
        return super().apply(softmax if func is safe_softmax else func, args, kwargs, output)


def _marker(site_id: str) -> Callable[[Tensor], Tensor]:
    def mark(tensor: Tensor) -> Tensor:
        # An attribute, not metadata: equal nodes would be merged, and their sites with them.
        return torch.onnx.ops.symbolic(
            _MARKED,
            (tensor,),
            {SITE: site_id},
            dtype=tensor.dtype,
            shape=tensor.shape,
            version=1,
        )

    return mark


class _Positional(nn.Module):
    """The model with its inputs by position, and its logits alone."""

    def __init__(self, model: nn.Module, names: tuple[str, ...], logits: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.model, self.names, self.logits = model, names, logits

    def forward(self, *tensors: Tensor) -> Tensor:
        inputs = dict(zip(self.names, tensors, strict=True)) if self.names else tensors[0]
        return self.logits(call_model(self.model, inputs))


def trace(
    model: nn.Module,
    inputs: ModelInputs,
    site_ids: Iterable[str],
    known: Iterable[str] | None,
    logits: Callable[[Any], Tensor],
) -> ir.Model:
    """The graph of a model, with a marker at every site.

    Args:
        model: In evaluation mode, on the CPU.
        inputs: An example: two items or more, and two tokens or more.
        site_ids: The sites to mark.
        known: Ids of all sites of the model, where they are known.
        logits: Picks the logits from the model's output.

    Raises:
        QuantTuneError: If torch cannot export the model, or a site was not reached.
    """
    names = tuple(inputs) if isinstance(inputs, Mapping) else ()
    tensors = tuple(inputs.values()) if isinstance(inputs, Mapping) else (inputs,)
    dimension = torch.export.Dim.AUTO
    shapes = tuple({axis: dimension for axis in _dynamic(tensor)} for tensor in tensors)
    visitor = ExportVisitor(model, site_ids, known)
    try:
        with torch.no_grad(), _quiet(), visitor:
            program = torch.onnx.export(
                _Positional(model, names, logits).eval(),
                tensors,
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=(shapes,),
                custom_opsets={DOMAIN: 1},
                input_names=list(names or (INPUT_NAME,)),
                output_names=[OUTPUT_NAME],
                verbose=False,
            )
    except QuantTuneError:
        raise
    # Whatever the exporter meets: it has no error of its own for each.
    except Exception as error:
        told = " ".join(str(error).split())[:300]
        raise QuantTuneError(f"torch.onnx cannot export {type(model).__name__}: {told}") from error
    if visitor.unreached:
        raise QuantTuneError(
            f"{len(visitor.unreached)} sites were not reached in the export, e.g. {visitor.unreached[0]}; "
            "discover the sites on this same model"
        )
    if program is None:
        raise QuantTuneError(f"torch.onnx gave no graph of {type(model).__name__}")
    found = program.model
    for value, tensor in zip(found.graph.inputs, tensors, strict=True):
        _name_axes(value, tensor)
    return found


def _dynamic(tensor: Tensor) -> tuple[int, ...]:
    """The batch, and the tokens of an input that holds one number a token."""
    return (0, 1) if tensor.dim() == 2 and not tensor.is_floating_point() else (0,)


def _name_axes(value: ir.Value, tensor: Tensor) -> None:
    for axis in _dynamic(tensor):
        if value.shape is None or isinstance(value.shape[axis], int):
            raise QuantTuneError(
                f"input {value.name} has a fixed size along dimension {axis} in the export; give an example "
                "of two items and two tokens or more, or a model whose forward pass takes any number"
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks, which are not for those who asked for a file."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(before)
