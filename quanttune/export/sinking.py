"""DequantizeLinear goes below what only moves or scales numbers, so that products find it at their inputs."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from quanttune.export.graph import FACTOR_KEY, SITE_KEY, Editor, constant, made_by, operand, replace, users

_MOVING = frozenset(
    {
        "Reshape",
        "Transpose",
        "Slice",
        "Squeeze",
        "Unsqueeze",
        "Flatten",
        "Identity",
        "Gather",
        "Split",
        "Expand",
    }
)


def sink(editor: Editor) -> None:
    """Move numbers as codes. A constant that scales them becomes part of the scale."""
    for node in editor.graph:
        if node.op_type == "DequantizeLinear" and not node.attributes:
            _sink_one(editor, node)
    for node in list(editor.graph):
        reader = made_by(node.inputs[0], "DequantizeLinear") if node.op_type == "MatMul" else None
        if reader is not None:
            _scale_product(editor, reader, node)


def _sink_one(editor: Editor, node: ir.Node) -> None:
    if operand(node).is_initializer():
        return
    for user, index in users(node.outputs[0]):
        if user.op_type in _MOVING and index == 0:
            _move(editor, node, user)
        elif user.op_type in ("Mul", "Div"):
            _scale(editor, node, user, index)
    if not users(node.outputs[0]) and not node.outputs[0].is_graph_output():
        editor.graph.remove(node, safe=True)


def _move(editor: Editor, node: ir.Node, user: ir.Node) -> None:
    if any(out.is_graph_output() for out in user.outputs):
        return
    user.replace_input_with(0, node.inputs[0])
    for out in user.outputs:
        readers, kind = users(out), out.dtype
        out.dtype = ir.DataType.UINT8
        made = editor.node(
            user,
            "DequantizeLinear",
            [out, *node.inputs[1:]],
            out,
            after=True,
            dtype=kind,
            metadata=node.metadata_props,
        )
        for reader, index in readers:
            reader.replace_input_with(index, made)


def _scale(editor: Editor, node: ir.Node, user: ir.Node, index: int) -> None:
    factor = _number(user.inputs[1 - index])
    if factor is None or (user.op_type == "Div" and index == 1):
        return
    if user.outputs[0].is_graph_output() or node.outputs[0].dtype != user.outputs[0].dtype:
        return
    made = _scaled(editor, node, user, factor if user.op_type == "Mul" else 1 / factor)
    if made is not None:
        replace(user.outputs[0], made)
        editor.graph.remove(user, safe=True)


def _scale_product(editor: Editor, node: ir.Node, product: ir.Node) -> None:
    """``(a b) c`` as ``(a c) b``: the scores of attention are many more than its queries."""
    user = product.outputs[0].uses()
    if (
        len(user) != 1
        or product.outputs[0].is_graph_output()
        or made_by(product.inputs[1], "DequantizeLinear") is None
    ):
        return
    scaling = next(iter(user)).node
    if scaling.op_type != "Mul":
        return
    factor = _number(scaling.inputs[1 - next(iter(user)).idx])
    made = None if factor is None else _scaled(editor, node, product, factor)
    if made is not None:
        product.replace_input_with(0, made)
        replace(scaling.outputs[0], product.outputs[0])
        editor.graph.remove(scaling, safe=True)


def _scaled(editor: Editor, node: ir.Node, before: ir.Node, factor: float) -> ir.Value | None:
    """The same codes read with another scale."""
    scale = constant(node.inputs[1])
    if scale is None or factor <= 0:
        return None
    whole = float(node.metadata_props.get(FACTOR_KEY, 1.0)) * factor
    site_id = node.metadata_props[SITE_KEY]
    value = editor.initializer(
        f"{site_id}.scale*{whole!r}",
        (editor.graph.initializers[f"{site_id}.scale"].const_value.numpy().astype(np.float64) * whole).astype(  # type: ignore[union-attr]
            np.float32
        ),
    )
    metadata = {**node.metadata_props, FACTOR_KEY: repr(whole)}
    out = node.outputs[0]
    return editor.node(
        before, "DequantizeLinear", [node.inputs[0], value, *node.inputs[2:]], out, metadata=metadata
    )


def _number(value: ir.Value | None) -> float | None:
    found = constant(value)
    return (
        float(found.reshape(-1)[0])
        if found is not None and found.size == 1 and np.isfinite(found).all()
        else None
    )
