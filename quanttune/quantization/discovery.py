"""Find a model's sites, and what each one is, by watching one forward pass.

The role of a tensor follows from what produced it and what consumes it, so the walk leaves a mark on every
result and carries it through operations that only rearrange numbers or scale them by a constant. That is how
a query that is a view of a linear output is known not to need a second rounding, how a linear layer in front
of an activation function is known to stay in float, and how the logits are found.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quanttune.errors import QuantTuneError
from quanttune.inputs import ModelInputs, call_model, in_evaluation, logits_of
from quanttune.quantization.arrangements import REARRANGING, SCALING
from quanttune.quantization.axes import channel_axis, produced_axis
from quanttune.quantization.elementwise import Composition, is_activation
from quanttune.quantization.parameters import Parameters, View
from quanttune.quantization.provenance import chain_all, chain_of, is_tensors, mark_all, mark_of, marks_in
from quanttune.quantization.sites import Site, SiteId, SiteKind, SiteTable
from quanttune.quantization.tracing import SiteVisitor
from quanttune.quantization.walkers import walks

_EMBEDDING = "<embedding>"
_PRODUCT = "<product>"  # of two tensors, element by element

_RESULT_KINDS = {
    "linear": SiteKind.LINEAR_OUTPUT,
    "conv": SiteKind.LINEAR_OUTPUT,
    "softmax": SiteKind.FREE_SOFTMAX,  # becomes SOFTMAX when a matrix product consumes it
    "layer_norm": SiteKind.NORM,
    "rms_norm": SiteKind.NORM,
    "matmul": SiteKind.SCORES,  # the product of a softmax becomes ATTENTION_OUTPUT
}
_ACTIVATION_FUNCTIONS = frozenset({"gelu", "silu", "relu", "tanh"})
_OPERAND_KINDS = {
    "linear": SiteKind.LINEAR_INPUT,
    "conv": SiteKind.LINEAR_INPUT,
    "matmul": SiteKind.MATMUL_INPUT,
    "softmax": SiteKind.SOFTMAX_INPUT,
    "layer_norm": SiteKind.NORM_INPUT,
    "rms_norm": SiteKind.NORM_INPUT,
    **dict.fromkeys(_ACTIVATION_FUNCTIONS, SiteKind.PRE_ACTIVATION),
}

_SUMS: frozenset[Any] = frozenset(
    {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__}
)


class _Discovery(SiteVisitor):
    """Records every site of one forward pass with its kind."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.unchecked = True
        self.sites: dict[str, Site] = {}
        self._parameters = Parameters(model)
        self._products_of_weights: set[str] = set()
        self._sum: str | None = None  # the site of the addition that is running, if it is one
        self._summands: dict[str, list[str | None]] = {}
        self._scores: set[str] = set()  # results of matrix products that no softmax fed, and their sums
        self._projected_embeddings: set[str] = set()
        self._tensors: dict[str, Tensor] = {}  # what a normalisation may read, for the axis of its channels
        self._widths = {len(parameter) for parameter in model.parameters() if parameter.dim() == 1}
        # What feeds activation functions: what it was before, and how their reads begin.
        self._front: dict[str, tuple[SiteKind, set[str]]] = {}
        self._composition: Composition | None = None  # of the running module, if it has no parts
        self._entered_with: tuple[int, str | None] = (0, None)  # how many sites were known; its operand's

    def _entered(self, name: str) -> Callable[[nn.Module, Any], None]:
        enter = super()._entered(name)

        def hook(module: nn.Module, args: Any) -> None:
            enter(module, args)
            may_be_activation = len(args) == 1 and isinstance(args[0], Tensor) and not any(module.children())
            self._composition = Composition() if may_be_activation else None
            # Read before it runs: it may write to its operand.
            self._entered_with = len(self.sites), mark_of(args[0]) if args else None

        return hook

    def _left(self, module: nn.Module, args: Any, output: Any) -> None:
        path = self.path
        super()._left(module, args, output)
        found, self._composition = self._composition, None
        if found is None or not found.is_activation or not isinstance(output, Tensor):
            return
        known, source = self._entered_with
        inside = list(self.sites)[known:]
        if (found.calls == 1 and inside) or output.shape != args[0].shape:
            # One function that is walked has sites of its own.
            return
        for site_id in inside:
            self._change(site_id, SiteKind.PRE_ACTIVATION)
        if source in self.sites:
            self._feed(source, f"{path}/")
        mark_all(output, None)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Read before the call: an operation in place marks its own operand.
        operands = (*args, *(kwargs or {}).values())
        marks = [mark for value in operands for mark in marks_in(value)]
        summands = [mark_of(value) for value in operands[:2]]
        chain = {site_id for value in operands for site_id in chain_of(value)}
        chain.update(mark for mark in marks if mark in self._scores)
        result = super().__torch_function__(func, types, args, kwargs)
        scales = func in SCALING and not _is_tensor_product(operands)
        passed_on = func in REARRANGING or scales
        if self._composition is not None and isinstance(result, Tensor) and result.is_floating_point():
            self._composition.add(func)
        if not passed_on and (func in _SUMS or not walks(func)) and is_tensors(result):
            reader = f"{self.path}/{getattr(func, '__name__', func)}"
            for mark in marks:
                self._read(mark, reader)
                if is_activation(func) and mark in self.sites:
                    self._feed(mark, reader)
        if passed_on:
            mark_all(result, summands[0] if summands else None)
        elif func is F.embedding:
            mark_all(result, _EMBEDDING)
        elif func is torch.cat:
            filled = [tensor for tensor in operands[0] if tensor.numel()]  # a key-value cache starts empty
            mark_all(result, mark_of(filled[0]) if len(filled) == 1 else None)
        elif func in SCALING:
            mark_all(result, _PRODUCT)
        elif func in _SUMS and (site_id := self._take_sum()) is not None:
            self._classify_sum(
                site_id,
                summands,
                any(isinstance(value, Tensor) and self.is_constant(value) for value in operands),
            )
            chain.add(site_id)
        elif func is F.scaled_dot_product_attention:
            self._leave_mask_in_float(args, kwargs or {})
        elif not walks(func) or func in _SUMS:
            mark_all(result, None)  # new numbers, perhaps in the place of old ones
        made = mark_of(result)
        if made in self.sites and self.sites[made].operation in _ACTIVATION_FUNCTIONS:
            chain_all(result, {*chain, made})
        elif not walks(func) or func in _SUMS:
            chain_all(result, chain)
        return result

    def visit(self, site: SiteId, tensor: Tensor) -> Tensor:
        if site.operand == "weight":
            self._record(site, SiteKind.WEIGHT, tensor, *self._parameters.whole(tensor))
        elif site.operand == "output":
            self._result(site, tensor)
        else:
            self._operand(site, tensor)
        return tensor

    def rearranged(self, result: Tensor, source: Tensor) -> Tensor:
        mark_all(result, mark_of(source))
        return result

    def _operand(self, site: SiteId, tensor: Tensor) -> None:
        name, source = site.operation, mark_of(tensor)
        if name == "matmul" and (weight := self._parameters.weight(tensor, self.path)) is not None:
            self._record(site, SiteKind.WEIGHT, tensor, *weight)
            return
        if name == "linear" and source == _EMBEDDING:
            self._projected_embeddings.add(str(site.call.site("output")))
        if name == "softmax":
            self._leave_scores_in_float(tensor)
        source = source if source in self.sites else None
        if source is not None:
            self._read(source, str(site))
            if name in _ACTIVATION_FUNCTIONS:
                self._feed(source, str(site))
            if name == "matmul" and self.sites[source].operation == "softmax":
                self._change(source, SiteKind.SOFTMAX)
            if _OPERAND_KINDS[name] is SiteKind.NORM_INPUT:
                self._set_axis(source, tensor)
            if name == "softmax":
                if source in self._products_of_weights:
                    self._change(source, SiteKind.SCORES)
                # Scaled and masked on the way, and how much of that is seen depends on the implementation.
                source = None
        self._record(site, _OPERAND_KINDS[name], tensor, source=source)

    def _result(self, site: SiteId, tensor: Tensor) -> None:
        name = site.operation
        if name == "add":
            kind = SiteKind.RESIDUAL_SUM  # _classify_sum, which sees the operands, has the last word
            self._sum = str(site)
        elif name in _ACTIVATION_FUNCTIONS:
            kind = SiteKind.ACTIVATION
        else:
            kind = _RESULT_KINDS[name]
        if name == "matmul":
            source = self.sites[str(site.call.site("a"))].source
            if source is not None and self.sites[source].operation == "softmax":
                kind = SiteKind.ATTENTION_OUTPUT
                values = str(site.call.site("b"))
                self.sites[values] = dataclasses.replace(self.sites[values], weighed=True)
            elif self.sites[str(site.call.site("b"))].kind is SiteKind.WEIGHT:
                kind = SiteKind.LINEAR_OUTPUT
                self._products_of_weights.add(str(site))
            else:
                self._scores.add(str(site))
        self._record(site, kind, tensor)
        # Where shapes alone tell the channels, the numbers are not kept: all activations at once are many.
        sizes = tensor.shape[1:]
        ambiguous = any(sizes.count(size) > 1 for size in self._widths.intersection(sizes))
        self._tensors[str(site)] = tensor if ambiguous else torch.empty(tensor.shape, device="meta")
        mark_all(tensor, str(site))

    def _feed(self, site_id: str, reader: str) -> None:
        """Note that an activation function, whose reads begin with ``reader``, takes in what a site made."""
        self._front.setdefault(site_id, (self.sites[site_id].kind, set()))[1].add(reader)
        self._change(site_id, SiteKind.PRE_ACTIVATION)

    def keep_what_others_read(self) -> None:
        """What feeds an activation function and something else as well is held in memory."""
        for site_id, (kind, readers) in self._front.items():
            if not all(consumer.startswith(tuple(readers)) for consumer in self.sites[site_id].consumers):
                self._change(site_id, kind)

    def _take_sum(self) -> str | None:
        site_id, self._sum = self._sum, None
        return site_id

    def _classify_sum(self, site_id: str, marks: list[str | None], has_constant: bool) -> None:
        self._summands[site_id] = marks
        kinds = [self.sites[mark].kind if mark in self.sites else None for mark in marks]
        if any(mark in self._scores for mark in marks):
            self._scores.add(site_id)
            self._change(site_id, SiteKind.SCORES)  # with a bias
        elif all(mark == _PRODUCT for mark in marks):
            self._change(site_id, SiteKind.ROTATED)  # quantized as an operand
        elif has_constant or all(self._is_embedded(mark) for mark in marks):
            self._change(site_id, SiteKind.EMBEDDING_SUM)
            for mark, kind in zip(marks, kinds, strict=True):
                if mark is not None and kind is SiteKind.EMBEDDING_SUM:
                    # Of a chain of sums, integers hold only the total.
                    self._change(mark, SiteKind.PARTIAL_SUM)

    def _is_embedded(self, mark: str | None) -> bool:
        if mark is None or mark == _EMBEDDING or mark in self._projected_embeddings:
            return mark is not None
        return mark in self.sites and self.sites[mark].kind is SiteKind.EMBEDDING_SUM

    def _leave_mask_in_float(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The mask of a fused attention is added to the scores, so what made it is no residual sum."""
        mask = kwargs.get("attn_mask", args[3] if len(args) > 3 else None)
        for site_id in self.sites.keys() & chain_of(mask):
            self._change(site_id, SiteKind.MASK)

    def _leave_scores_in_float(self, tensor: Tensor) -> None:
        """Of what a softmax takes in, everything behind the product is arithmetic on scores."""
        chain = chain_of(tensor)
        if self._scores.intersection(chain):
            for site_id in self.sites.keys() & chain:
                self._change(site_id, SiteKind.SCORES)

    def leave_logits_in_float(self, logits: Tensor) -> None:
        """Leave in float the site that made ``logits``, and the linear outputs of which it is a mean."""
        mark = mark_of(logits)
        if mark not in self.sites:
            return
        self._change(mark, SiteKind.LOGITS)
        for summand in self._summands.get(mark, []):
            if summand in self.sites and self.sites[summand].kind is SiteKind.LINEAR_OUTPUT:
                self._change(summand, SiteKind.LOGITS)

    def _record(
        self,
        site: SiteId,
        kind: SiteKind,
        tensor: Tensor,
        parameter: str | None = None,
        view: View | None = None,
        source: str | None = None,
    ) -> None:
        shape = tuple(tensor.shape) if kind is SiteKind.WEIGHT else tuple(tensor.shape[1:])
        axis = produced_axis(site, tensor, kind is SiteKind.WEIGHT)
        self.sites[str(site)] = Site(site, kind, shape, axis, parameter, view, source)

    def _set_axis(self, site_id: str, normalised: Tensor) -> None:
        """What a normalisation takes for channels is more than what made the tensor can tell."""
        # Popped: the first normalisation that reads a tensor decides.
        tensor = self._tensors.pop(site_id, None)
        if tensor is not None:
            axis = channel_axis(tensor, normalised)
            self.sites[site_id] = dataclasses.replace(self.sites[site_id], channel_axis=axis)

    def _change(self, site_id: str, kind: SiteKind) -> None:
        self.sites[site_id] = dataclasses.replace(self.sites[site_id], kind=kind)

    def _read(self, site_id: str, consumer: str) -> None:
        site = self.sites.get(site_id)
        if site is not None and consumer not in site.consumers:
            self.sites[site_id] = dataclasses.replace(site, consumers=(*site.consumers, consumer))


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
    with torch.no_grad(), in_evaluation(model), _Discovery(model) as discovery:
        output = call_model(model, inputs)
    discovery.keep_what_others_read()
    discovery.leave_logits_in_float(logits(output))
    if not discovery.sites:
        raise QuantTuneError(
            f"no linear layer, matrix product or normalisation was seen in {type(model).__name__}; "
            "quantization works on eager PyTorch modules, not on compiled or exported graphs"
        )
    return SiteTable(discovery.sites.values(), frozenset(discovery.sites))
