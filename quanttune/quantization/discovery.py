"""Find a model's sites, and what each one is, by watching one forward pass.

The role of a tensor follows from what produced it and what consumes it, so the walk leaves a mark on every
result and carries it through operations that only rearrange numbers or scale them by a constant. That is how
a query that is a view of a linear output is known not to need a second rounding, how a linear layer in front
of an activation function is known to stay in float, and how the logits are found.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quanttune.errors import QuantTuneError
from quanttune.inputs import ModelInputs, call_model, logits_of
from quanttune.quantization.sites import Site, SiteKind, SiteTable
from quanttune.quantization.tracing import SiteVisitor, walks

_MARK = "_quanttune_site"
_EMBEDDING = "<embedding>"
_PRODUCT = "<product>"  # of two tensors, element by element

_RESULT_KINDS = {
    "linear": SiteKind.LINEAR_OUTPUT,
    "conv": SiteKind.LINEAR_OUTPUT,
    "softmax": SiteKind.UNQUANTIZED,  # becomes SOFTMAX when a matrix product consumes it
    "layer_norm": SiteKind.NORM,
    "rms_norm": SiteKind.NORM,
    "matmul": SiteKind.UNQUANTIZED,  # attention scores; the product of a softmax becomes ATTENTION_OUTPUT
}
_OPERAND_KINDS = {
    "linear": SiteKind.LINEAR_INPUT,
    "conv": SiteKind.LINEAR_INPUT,
    "matmul": SiteKind.MATMUL_INPUT,
}
_ACTIVATION_FUNCTIONS = frozenset({"gelu", "silu", "relu", "tanh"})

# Operations whose result holds the same numbers, up to one constant factor, in another arrangement.
_ARRANGEMENTS = (
    "chunk", "clone", "detach", "flatten", "gather", "index_select", "movedim", "narrow", "permute", "ravel",
    "repeat_interleave", "reshape", "roll", "select", "split", "squeeze", "swapaxes", "transpose", "unbind",
    "unflatten", "unsqueeze",
)  # fmt: skip
_TENSOR_ARRANGEMENTS = (
    *_ARRANGEMENTS, "__getitem__", "bfloat16", "contiguous", "cpu", "cuda", "double", "expand", "expand_as",
    "float", "half", "repeat", "reshape_as", "to", "type", "type_as", "view", "view_as",
)  # fmt: skip
_REARRANGING: frozenset[Any] = frozenset(
    {
        *(getattr(Tensor, name) for name in _TENSOR_ARRANGEMENTS),
        *(getattr(torch, name) for name in _ARRANGEMENTS),
        torch.dropout,
        F.dropout,
        F.pad,
        Tensor.T.__get__,  # type: ignore[attr-defined]
        Tensor.mT.__get__,  # type: ignore[attr-defined]
    }
)
_SUMS: frozenset[Any] = frozenset({torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__iadd__})
_SCALING: frozenset[Any] = frozenset(
    {Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.mul, Tensor.div, Tensor.__truediv__, torch.div}
)


# Matrix products that no walker opens: a model that uses them would be quantized in part without a word.
_HIDDEN_PRODUCTS: frozenset[Any] = frozenset(
    {
        *(getattr(torch, name) for name in ("addbmm", "addmm", "baddbmm", "einsum", "tensordot")),
        *(getattr(Tensor, name) for name in ("addbmm", "addmm", "baddbmm")),
        *(getattr(F, f"conv_transpose{n}d") for n in (1, 2, 3)),
        F.bilinear,
        F.conv3d,
        F.multi_head_attention_forward,
    }
)


class _Discovery(SiteVisitor):
    """Records every site of one forward pass with its kind."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.sites: dict[str, Site] = {}
        self._parameters = {id(parameter): name for name, parameter in model.named_parameters()}
        self._constants = {*self._parameters, *(id(buffer) for buffer in model.buffers())}
        self._sum: str | None = None  # the site of the addition that is running, if it is one
        self._summands: dict[str, list[str | None]] = {}
        self._scores: set[str] = set()  # results of matrix products that no softmax fed, and their sums
        self._projected_embeddings: set[str] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _HIDDEN_PRODUCTS and self.running:
            raise QuantTuneError(
                f"module {self.path!r} calls {func.__name__}, whose matrix products cannot be reached and "
                "would stay in float; write them with nn.Linear, nn.Conv2d or torch.matmul"
            )
        # Read before the call: an operation in place marks its own operand.
        operands = (*args, *(kwargs or {}).values())
        marks = [mark for value in operands for mark in _marks_in(value)]
        summands = [_mark_of(value) for value in operands[:2]]
        result = super().__torch_function__(func, types, args, kwargs)
        scales = func in _SCALING and not _is_tensor_product(operands)
        passed_on = func in _REARRANGING or scales
        if not passed_on and (func in _SUMS or not walks(func)) and _is_tensors(result):
            for mark in marks:
                self._read(mark, f"{self.path}/{getattr(func, '__name__', func)}")
        if passed_on:
            _mark_all(result, summands[0] if summands else None)
        elif func is F.embedding:
            _mark_all(result, _EMBEDDING)
        elif func is torch.cat:
            filled = [tensor for tensor in operands[0] if tensor.numel()]  # a key-value cache starts empty
            _mark_all(result, _mark_of(filled[0]) if len(filled) == 1 else None)
        elif func in _SCALING:
            _mark_all(result, _PRODUCT)
        elif func in _SUMS and (site_id := self._take_sum()) is not None:
            self._classify_sum(site_id, summands, any(id(value) in self._constants for value in operands))
        elif func is F.scaled_dot_product_attention:
            self._leave_mask_in_float(args, kwargs or {})
        elif not walks(func) or func in _SUMS:
            _mark_all(result, None)  # new numbers, perhaps in the place of old ones
        return result

    def visit(self, site_id: str, tensor: Tensor) -> Tensor:
        operation, _, operand = site_id.rpartition(".")
        name = operation.rpartition("/")[2].partition("#")[0]
        if operand == "weight":
            self._record(site_id, SiteKind.WEIGHT, tensor, parameter=self._parameters.get(id(tensor)))
        elif operand == "output":
            self._result(site_id, operation, name, tensor)
        else:
            self._operand(site_id, name, tensor)
        return tensor

    def rearranged(self, result: Tensor, source: Tensor) -> Tensor:
        _mark_all(result, _mark_of(source))
        return result

    def _operand(self, site_id: str, name: str, tensor: Tensor) -> None:
        source = _mark_of(tensor)
        if name == "linear" and source == _EMBEDDING:
            self._projected_embeddings.add(f"{site_id.rpartition('.')[0]}.output")
        source = source if source in self.sites else None
        if source is not None:
            self._read(source, site_id)
        if name in _ACTIVATION_FUNCTIONS and source is not None:
            self._change(source, SiteKind.UNQUANTIZED)
        if name in _OPERAND_KINDS:
            if name == "matmul" and source is not None and "/softmax" in source:
                self._change(source, SiteKind.SOFTMAX)
            self._record(site_id, _OPERAND_KINDS[name], tensor, source=source)

    def _result(self, site_id: str, operation: str, name: str, tensor: Tensor) -> None:
        if name == "add":
            kind = SiteKind.RESIDUAL_SUM  # _classify_sum, which sees the operands, has the last word
            self._sum = site_id
        elif name in _ACTIVATION_FUNCTIONS:
            kind = SiteKind.ACTIVATION
        else:
            kind = _RESULT_KINDS[name]
        if name == "matmul" and "/softmax" in (self.sites[f"{operation}.a"].source or ""):
            kind = SiteKind.ATTENTION_OUTPUT
        elif name == "matmul":
            self._scores.add(site_id)
        self._record(site_id, kind, tensor)
        _mark_all(tensor, site_id)

    def _take_sum(self) -> str | None:
        site_id, self._sum = self._sum, None
        return site_id

    def _classify_sum(self, site_id: str, marks: list[str | None], has_constant: bool) -> None:
        self._summands[site_id] = marks
        kinds = [self.sites[mark].kind if mark in self.sites else None for mark in marks]
        if any(mark in self._scores for mark in marks):
            self._scores.add(site_id)
            self._change(site_id, SiteKind.UNQUANTIZED)  # a bias on the attention scores
        elif all(mark == _PRODUCT for mark in marks):
            self._change(site_id, SiteKind.UNQUANTIZED)  # a rotation by position, quantized as an operand
        elif has_constant or all(self._is_embedded(mark) for mark in marks):
            self._change(site_id, SiteKind.EMBEDDING_SUM)
            for mark, kind in zip(marks, kinds, strict=True):
                if mark is not None and kind is SiteKind.EMBEDDING_SUM:
                    # Of a chain of sums, integers hold only the total.
                    self._change(mark, SiteKind.UNQUANTIZED)

    def _is_embedded(self, mark: str | None) -> bool:
        if mark is None or mark == _EMBEDDING or mark in self._projected_embeddings:
            return mark is not None
        return mark in self.sites and self.sites[mark].kind is SiteKind.EMBEDDING_SUM

    def _leave_mask_in_float(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The mask of a fused attention is added to the scores, so a sum that made it is no residual sum."""
        mark = _mark_of(kwargs.get("attn_mask", args[3] if len(args) > 3 else None))
        if mark in self._summands:
            self._change(mark, SiteKind.UNQUANTIZED)

    def leave_logits_in_float(self, logits: Tensor) -> None:
        """Leave in float the site that made ``logits``, and the linear outputs of which it is a mean."""
        mark = _mark_of(logits)
        if mark not in self.sites:
            return
        self._change(mark, SiteKind.UNQUANTIZED)
        for summand in self._summands.get(mark, []):
            if summand in self.sites and self.sites[summand].kind is SiteKind.LINEAR_OUTPUT:
                self._change(summand, SiteKind.UNQUANTIZED)

    def _record(
        self,
        site_id: str,
        kind: SiteKind,
        tensor: Tensor,
        parameter: str | None = None,
        source: str | None = None,
    ) -> None:
        shape = tuple(tensor.shape) if kind is SiteKind.WEIGHT else tuple(tensor.shape[1:])
        self.sites[site_id] = Site(site_id, kind, shape, parameter, source)

    def _change(self, site_id: str, kind: SiteKind) -> None:
        self.sites[site_id] = dataclasses.replace(self.sites[site_id], kind=kind)

    def _read(self, site_id: str, consumer: str) -> None:
        site = self.sites.get(site_id)
        if site is not None and consumer not in site.consumers:
            self.sites[site_id] = dataclasses.replace(site, consumers=(*site.consumers, consumer))


def _mark_of(value: Any) -> str | None:
    return getattr(value, _MARK, None) if isinstance(value, Tensor) else None


def _marks_in(value: Any) -> Iterator[str]:
    for item in value if isinstance(value, tuple | list) else (value,):
        mark = _mark_of(item)
        if mark is not None:
            yield mark


def _is_tensors(result: Any) -> bool:
    items = result if isinstance(result, tuple | list) else (result,)
    return any(isinstance(item, Tensor) for item in items)


def _mark_all(result: Any, mark: str | None) -> None:
    tensors = result if isinstance(result, tuple | list) else (result,)
    for tensor in tensors:
        if not isinstance(tensor, Tensor) or isinstance(tensor, nn.Parameter):
            continue
        if mark is not None or hasattr(tensor, _MARK):
            setattr(tensor, _MARK, mark)


def _is_tensor_product(operands: tuple[Any, ...]) -> bool:
    return len(operands) > 1 and isinstance(operands[1], Tensor) and operands[1].dim() > 0


def discover_sites(
    model: nn.Module, inputs: ModelInputs, logits: Callable[[Any], Tensor] = logits_of
) -> SiteTable:
    """Run ``model`` once and list its sites in execution order.

    Args:
        model: Any eager PyTorch model; it is run in evaluation mode and left in the mode it had.
        inputs: One batch, preferably of two or more items so that broadcast operands show as such.
        logits: Picks the logits from the model's output; the site that made them stays in float.

    Returns:
        All sites, whether or not a profile quantizes them.

    Raises:
        QuantTuneError: If no operation of the model was recognised, or one hides a matrix product.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad(), _Discovery(model) as discovery:
            output = call_model(model, inputs)
    finally:
        for module in training:
            module.training = True  # one by one: a frozen part of a training model stays frozen
    discovery.leave_logits_in_float(logits(output))
    if not discovery.sites:
        raise QuantTuneError(
            f"no linear layer, matrix product or normalisation was seen in {type(model).__name__}; "
            "quantization works on eager PyTorch modules, not on compiled or exported graphs"
        )
    return SiteTable(discovery.sites.values())
