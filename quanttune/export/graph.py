"""Small things that every pass over the graph needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from quanttune.errors import QuantTuneError

SITE_KEY = "quanttune.site"
"""Name of the metadata that tells which site a node belongs to; one site a node."""
FACTOR_KEY = "quanttune.factor"
"""Metadata of a DequantizeLinear whose scale is the site's, times this constant."""
BIAS_ENDING = ".bias"
"""Behind the site of a layer's weight in the name of its integer bias; ``.scale`` follows for the steps."""
BIAS_KEY = "quanttune.bias"
"""Metadata of a layer: its bias in float32, base64; what the integers were made from."""


class Editor:
    """Builds nodes of one graph.

    Args:
        model: The model whose graph is edited.
    """

    def __init__(self, model: ir.Model) -> None:
        self.graph = model.graph
        self._numbers: dict[str, int] = {}

    def initializer(self, name: str, array: np.ndarray) -> ir.Value:
        """The initializer called ``name``; made if it is not there yet."""
        if name in self.graph.initializers:
            return self.graph.initializers[name]
        tensor = ir.tensor(np.ascontiguousarray(array).reshape(array.shape), name=name)
        value = ir.Value(
            name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor
        )
        self.graph.register_initializer(value)
        return value

    def node(
        self,
        beside: ir.Node,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        like: ir.Value,
        *,
        after: bool = False,
        dtype: ir.DataType | None = None,
        shape: ir.Shape | None = None,
        metadata: Mapping[str, str] | None = None,
        attributes: Mapping[str, Any] | None = None,
    ) -> ir.Value:
        """A new node in front of another one, or behind it.

        Args:
            beside: The other node.
            op_type: Its operation, of ONNX's own.
            inputs: Its inputs.
            like: Whose type and shape its result has.
            after: Whether it goes behind the other one.
            dtype: Another type.
            shape: Another shape.
            metadata: Its metadata.
            attributes: Its attributes.

        Returns:
            Its result.
        """
        name = f"{op_type}_{self._next(op_type)}"
        output = ir.Value(
            name=f"{name}.out",
            type=ir.TensorType(like.dtype if dtype is None else dtype),  # type: ignore[arg-type]
            shape=like.shape if shape is None else shape,
        )
        made = ir.Node(
            "",
            op_type,
            inputs,
            ir.convenience.convert_attributes(dict(attributes or {})),
            outputs=[output],
            name=name,
            metadata_props=dict(metadata or {}),
        )
        (self.graph.insert_after if after else self.graph.insert_before)(beside, made)
        return output

    def _next(self, op_type: str) -> int:
        self._numbers[op_type] = self._numbers.get(op_type, -1) + 1
        return self._numbers[op_type]


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The numbers of an initializer or constant, turned or reshaped; ``None`` for what is computed."""
    if value is None or value.is_graph_input():
        return None
    if value.const_value is not None:
        return value.const_value.numpy()
    node = value.producer()
    if node is None:
        return None
    if node.op_type == "Constant":
        attribute = node.attributes.get("value")
        return None if attribute is None else attribute.as_tensor().numpy()
    if node.op_type not in ("Transpose", "Reshape", "Identity", "Unsqueeze"):
        return None
    source = constant(node.inputs[0])
    if source is None:
        return None
    if node.op_type == "Transpose":
        return np.transpose(source, permutation(node))
    if node.op_type == "Identity":
        return source
    shape = constant(node.inputs[1])
    if shape is None:
        return None
    if node.op_type == "Unsqueeze":
        return np.expand_dims(source, tuple(int(axis) for axis in shape.reshape(-1)))
    return source.reshape(shape)


def permutation(node: ir.Node) -> tuple[int, ...] | None:
    """The order of dimensions of a Transpose."""
    attribute = node.attributes.get("perm")
    return None if attribute is None else tuple(attribute.as_ints())


def users(value: ir.Value) -> list[tuple[ir.Node, int]]:
    """Who reads a value, and as which input."""
    return [(use.node, use.idx) for use in value.uses()]


def replace(old: ir.Value, new: ir.Value) -> None:
    """Let everybody who reads ``old`` read ``new``, an output of the graph included."""
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def sole_user(value: ir.Value) -> ir.Node | None:
    """The one node that reads a value; ``None`` if there are several, or the graph returns it."""
    found = users(value)
    return found[0][0] if len(found) == 1 and not value.is_graph_output() else None


def operand(node: ir.Node, index: int = 0) -> ir.Value:
    """An input that the operation cannot do without."""
    value = node.inputs[index]
    if value is None:
        raise QuantTuneError(f"node {node.name} ({node.op_type}) lacks its input {index}")
    return value


def made_by(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node that computes a value, if it is of that operation."""
    node = None if value is None else value.producer()
    return node if node is not None and node.domain == "" and node.op_type == op_type else None
