"""Two dimensions from layer to layer: what works number by number, or along the last one, needs no more.

A Gemm has rows and columns, and each would stand between two Reshapes. In time they cost next to nothing; the
graph is the smaller for it.
"""

from __future__ import annotations

import onnx_ir as ir

from quanttune.export.graph import Editor, constant, operand, replace, users
from quanttune.export.layers import ROWS, rows_of

_NUMBER_BY_NUMBER = frozenset(
    {"Clip", "DequantizeLinear", "Erf", "Gelu", "QuantizeLinear", "Relu", "Sigmoid", "Tanh"}
)
_PAIRWISE = frozenset({"Add", "Mul", "Sub"})

_Flat = tuple[ir.Value, ir.Value]
"""A value of two dimensions, and the shape that takes it to what it stands for."""


def stay_flat(editor: Editor) -> None:
    """Let what stands behind a Reshape from two dimensions work in front of it; leave out what undoes it."""
    flats: dict[ir.Value, _Flat] = {}
    for node in list(editor.graph):
        if node.op_type == "Reshape" and node.domain == "":
            _reshape(editor, node, flats)
        elif node.domain == "" and (inputs := _inputs(editor, node, flats)) is not None:
            _move(editor, node, inputs, flats)
    for value in flats:
        producer = value.producer()
        if producer is not None and not users(value) and not value.is_graph_output():
            editor.graph.remove(producer, safe=True)


def _reshape(editor: Editor, node: ir.Node, flats: dict[ir.Value, _Flat]) -> None:
    source, made = operand(node), node.outputs[0]
    known = flats.get(source)
    if (operand(node, 1).name or "").startswith(ROWS):
        if known is not None and _last(known[0]) == _last(made) is not None:
            replace(made, known[0])
            editor.graph.remove(node, safe=True)
            return
        before = source.producer()
        if before is not None and before.op_type == "Reshape" and before.domain == "":
            # What number of rows there are does not depend on the shape in between.
            node.replace_input_with(0, operand(before))
        return
    if (
        len(source.shape or ()) == 2
        and len(made.shape or ()) > 2
        and _last(source) == _last(made) is not None
    ):
        flats[made] = source, operand(node, 1)
    elif known is not None and _is_whole(node):
        node.replace_input_with(0, known[0])


def _is_whole(node: ir.Node) -> bool:
    """Whether a Reshape takes no size from its input."""
    keeps = node.attributes.get("allowzero")
    shape = constant(operand(node, 1))
    return (keeps is not None and keeps.as_int() == 1) or (shape is not None and bool((shape != 0).all()))


def _inputs(editor: Editor, node: ir.Node, flats: dict[ir.Value, _Flat]) -> dict[int, ir.Value] | None:
    """What a node reads of two dimensions, by number of the input; ``None`` if it cannot work there."""
    known = [index for index, value in enumerate(node.inputs) if value in flats]
    if not known or node.outputs[0].is_graph_output() or len(node.outputs) != 1:
        return None
    shape = operand(node, known[0]).shape
    if node.outputs[0].shape != shape:
        return None
    if node.op_type == "LayerNormalization":
        axis = node.attributes.get("axis")
        along = -1 if axis is None else axis.as_int()
        if known != [0] or along not in (-1, len(shape or ()) - 1):
            return None
    elif node.op_type in _NUMBER_BY_NUMBER:
        others = [constant(value) for value in node.inputs[1:] if value is not None]
        if known != [0] or any(other is None or other.size != 1 for other in others):
            return None
    elif node.op_type not in _PAIRWISE:
        return None
    found = {}
    for index, value in enumerate(node.inputs):
        if value is None or (index and node.op_type not in _PAIRWISE):
            continue
        if value in flats:
            found[index] = flats[value][0]
        elif (numbers := constant(value)) is not None and (
            numbers.ndim <= 1 or (numbers.size == 1 and numbers.ndim <= 2)
        ):
            continue
        elif value.shape == shape and isinstance(_last(value), int):
            found[index] = rows_of(editor, node, value)
        else:
            return None
    return found


def _move(editor: Editor, node: ir.Node, inputs: dict[int, ir.Value], flats: dict[ir.Value, _Flat]) -> None:
    made, target = node.outputs[0], next(flats[value][1] for value in node.inputs if value in flats)
    shaped, readers = made.shape, users(made)
    for index, value in inputs.items():
        node.replace_input_with(index, value)
    if node.op_type == "LayerNormalization":
        node.attributes["axis"] = ir.AttrInt64("axis", -1)
    made.shape = ir.Shape([None, _last(made)])
    moved = editor.node(node, "Reshape", [made, target], made, after=True, shape=shaped)
    for reader, index in readers:
        reader.replace_input_with(index, moved)
    flats[moved] = made, target


def _last(value: ir.Value) -> int | ir.SymbolicDim | None:
    return value.shape[-1] if value.shape is not None and len(value.shape) else None
