"""The matrix products of a network in one form, with the data that a scale search needs of each.

A linear layer and a convolution are ``X W'`` over rows ``X``; a product of two activations is ``A B`` per
item and head. Biases cancel in the error of a quantized product and are kept only for distances that see the
output itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines.method import Batch
from quanttune.inputs import ModelInputs
from quanttune.quantization import Observer, Site, SiteKind, SiteTable, observe
from quanttune.quantization.observation import Bounds

MEMORY = 1 << 29
"""Bytes of captured activations held at once; larger networks are captured in several passes."""

Curvature = Callable[[Batch, Sequence[str]], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Product:
    """One matrix product of the network.

    Args:
        operation: Its name, e.g. ``blocks.0.attn/matmul#2``.
        module: Path of the module that computes it.
        convolution: Whether it is a convolution.
        left: Site of the input, or of the first operand.
        right: Site of the weight, or of the second operand.
        left_quantized: Where the left operand's quantizer goes: the softmax output if the operand is one,
            else ``left``.
        weight: Name of the weight parameter; ``None`` for a product of activations.
        blocks: Number of equal blocks of output channels, each with a scale of its own (three for a joint
            qkv).
        after: What made the left operand: ``softmax``, ``gelu`` or nothing of the kind.
        output: Site of the result.
    """

    operation: str
    module: str
    convolution: bool
    left: str
    right: str
    left_quantized: str
    weight: str | None
    blocks: int
    after: str
    output: str


@dataclass
class ProductData:
    """Calibration data of one product.

    Args:
        left: Parts of the left operand: rows ``(rows, channels)``, or ``(items, heads, n, k)``.
        right: The weight as ``(outputs, channels)`` in a single part, or parts ``(items, heads, k, m)``.
        curvature: ``g**2`` of the output in the same parts; empty if not asked for.
        bias: Of shape ``(outputs,)`` for linear layers and convolutions.
    """

    left: list[Tensor] = field(default_factory=list)
    right: list[Tensor] = field(default_factory=list)
    curvature: list[Tensor] = field(default_factory=list)
    bias: Tensor | None = None


def find_products(model: nn.Module, sites: SiteTable) -> list[Product]:
    """Every linear layer, two-dimensional convolution and product of activations that can be searched.

    Left out: layers whose weight is not a parameter, convolutions in groups or other than two-dimensional,
    and products that spread one operand over the items or heads of the other.
    """
    products = []
    for site in sites.values():
        output = site.sibling("output")
        common = {"operation": str(site.call), "module": site.module, "output": output}
        if site.operand == "weight" and site.parameter is not None:
            convolution = site.operation == "conv"
            if convolution and not _unfolds(model.get_submodule(site.module)):
                continue
            left = sites[site.sibling("input")]
            products.append(
                Product(
                    **common,
                    convolution=convolution,
                    left=left.id,
                    right=site.id,
                    left_quantized=left.id,
                    weight=site.parameter,
                    blocks=_blocks(sites.get(output), site, sites),
                    after=_made_by(left, sites),
                )
            )
        elif site.operand == "a" and _pairs_up(site, sites[site.sibling("b")]):
            after = _made_by(site, sites)
            quantized = site.source if after == "softmax" and site.source is not None else site.id
            products.append(
                Product(
                    **common,
                    convolution=False,
                    left=site.id,
                    right=site.sibling("b"),
                    left_quantized=quantized,
                    weight=None,
                    blocks=1,
                    after=after,
                )
            )
    return products


def capture(
    model: nn.Module,
    products: Sequence[Product],
    sites: SiteTable,
    batches: Sequence[Batch],
    curvature: Curvature | None,
    memory: int = MEMORY,
) -> Iterator[tuple[Product, ProductData]]:
    """Run the network and yield each product with its data, a bounded number of products at a time.

    Args:
        model: The FP32 network.
        products: What to capture.
        sites: The sites of the model, for their sizes.
        batches: Calibration items.
        curvature: Gives ``g**2`` at the outputs of a batch; ``None`` if the search does not weigh errors.
        memory: Bytes of captured activations to hold at once.
    """
    items = sum(len(batch.targets) for batch in batches)
    for group in _groups(products, sites, items, memory):
        data = {product.operation: ProductData() for product in group}
        for batch in batches:
            _capture_operands(model, group, batch.inputs, data, sites)
            if curvature is not None:
                found = curvature(batch, [product.output for product in group])
                for product in group:
                    data[product.operation].curvature.append(_output_rows(product, found[product.output]))
        for product in group:
            yield product, _joined(product, data.pop(product.operation))


def _capture_operands(
    model: nn.Module,
    group: Sequence[Product],
    inputs: ModelInputs,
    data: Mapping[str, ProductData],
    sites: SiteTable,
) -> None:
    observers: dict[str, Observer] = {}
    for product in group:
        parts = data[product.operation]
        if product.weight is None:
            observers[product.left] = _Keep(parts.left, _by_head)
            observers[product.right] = _Keep(parts.right, _by_head)
            continue
        module = model.get_submodule(product.module)
        observers[product.left] = _Keep(parts.left, _rows_of(module))
        if not parts.right:
            observers[product.right] = _Keep(parts.right, lambda weight: weight.flatten(1))
            bias = getattr(module, "bias", None)
            parts.bias = bias.detach() if isinstance(bias, Tensor) else None
    observe(model, [inputs], observers, known=sites.known)


class _Keep(Observer):
    """Appends every batch, brought into the shape of a product's operand."""

    def __init__(self, target: list[Tensor], shape: Callable[[Tensor], Tensor]) -> None:
        self._target, self._shape = target, shape

    def update(self, values: Tensor, bounds: Bounds) -> None:
        self._target.append(self._shape(values.detach()).clone())


def _joined(product: Product, data: ProductData) -> ProductData:
    if product.weight is None:
        return data
    curvature = [torch.cat(data.curvature)] if data.curvature else []
    return ProductData([torch.cat(data.left)], data.right, curvature, data.bias)


def _groups(
    products: Sequence[Product], sites: SiteTable, items: int, memory: int
) -> Iterator[list[Product]]:
    group: list[Product] = []
    used = 0
    for product in products:
        names = (product.left, product.right, product.output)
        elements = sum(_elements(sites[name]) for name in names if name in sites)
        needed = 4 * elements * items
        if group and used + needed > memory:
            yield group
            group, used = [], 0
        group.append(product)
        used += needed
    if group:
        yield group


def _elements(site: Site) -> int:
    return 0 if site.kind is SiteKind.WEIGHT else int(torch.Size(site.shape).numel())


def _blocks(output: Site | None, weight: Site, sites: SiteTable) -> int:
    """A layer whose output is cut into several operands has one block for each of them."""
    readers = [sites[name] for name in output.consumers if name in sites] if output is not None else []
    operands = [reader for reader in readers if reader.operation == "matmul"]
    blocks = max(len(operands), 1)
    return blocks if weight.shape[0] % blocks == 0 else 1


def _made_by(operand: Site, sites: SiteTable) -> str:
    source = sites[operand.source] if operand.source is not None else None
    if source is not None and source.kind is SiteKind.SOFTMAX:
        return "softmax"
    return "gelu" if source is not None and source.operation == "gelu" else ""


def _unfolds(module: nn.Module) -> bool:
    plain = isinstance(module, nn.Conv2d) and module.groups == 1 and module.padding_mode == "zeros"
    return plain and not isinstance(module.padding, str)


def _pairs_up(left: Site, right: Site) -> bool:
    """Whether both are activations of the same items and heads, so that neither is spread over the other."""
    if SiteKind.WEIGHT in (left.kind, right.kind):
        return False
    shapes = left.shape, right.shape
    return len(left.shape) == len(right.shape) >= 2 and shapes[0][:-2] == shapes[1][:-2]


def _rows_of(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """Turns a layer's input into rows, so that the layer is one matrix product."""
    if not isinstance(module, nn.Conv2d):
        return lambda values: values.flatten(0, -2)

    kernel, dilation, stride = module.kernel_size, module.dilation, module.stride
    padding = tuple(int(size) for size in module.padding)

    def unfold(values: Tensor) -> Tensor:
        columns = F.unfold(values, kernel, dilation=dilation, padding=padding, stride=stride)
        return columns.transpose(1, 2).flatten(0, 1)

    return unfold


def _by_head(values: Tensor) -> Tensor:
    """``(items, heads, n, k)``; any other number of dimensions counts as one head."""
    return values if values.dim() == 4 else values.flatten(0, -3).unsqueeze(1)


def _output_rows(product: Product, values: Tensor) -> Tensor:
    if product.weight is None:
        return _by_head(values)
    if product.convolution:
        values = values.movedim(1, -1)
    return values.flatten(0, -2)
