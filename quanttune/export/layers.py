"""Linear layers as Gemm of two dimensions with an integer bias, which runtimes compute on integers."""

from __future__ import annotations

import base64

import numpy as np
import onnx_ir as ir

from quanttune.export.graph import (
    BIAS_ENDING,
    BIAS_KEY,
    SITE_KEY,
    Editor,
    constant,
    made_by,
    operand,
    permutation,
    replace,
    sole_user,
    users,
)

ROWS = "rows."
"""How the names of shapes of two dimensions begin: all rows, and so many columns."""
_LARGEST_BIAS = 1 << 30
"""Codes of a bias beyond would leave a sum in 32 bits no room."""


def lower_layers(editor: Editor) -> None:
    """Turn weights offline, make Gemm of linear layers with a bias, and give biases integer codes."""
    shapes = _Shapes(editor)
    for node in list(editor.graph):
        if node.op_type in ("MatMul", "Gemm"):
            _lower_linear(editor, node, shapes)
        elif node.op_type == "Conv":
            _integer_bias(editor, node, node)


def _lower_linear(editor: Editor, node: ir.Node, shapes: _Shapes) -> None:
    weight, left = _turned_weight(editor, node), operand(node)
    if weight is None:
        return
    node.replace_input_with(1, weight)
    if node.op_type == "Gemm":
        node.attributes.pop("transB", None)
        _integer_bias(editor, node, node)
        return
    following = sole_user(node.outputs[0])
    bias = _bias_of(following, node.outputs[0])
    if following is None or bias is None or made_by(left, "DequantizeLinear") is None:
        return
    codes = bias_codes(left, weight, constant(bias))
    if codes is None or left.shape is None or len(left.shape) < 3:
        return
    _as_gemm(editor, node, following, bias, codes, shapes)


def _turned_weight(editor: Editor, node: ir.Node) -> ir.Value | None:
    """The weight of a linear layer, inputs first; ``None`` if the second operand is no quantized weight."""
    right = operand(node, 1)
    if node.op_type == "Gemm":
        turned, plain = "transB" in node.attributes and bool(node.attributes["transB"].as_int()), right
    else:
        turn = made_by(right, "Transpose")
        turned = turn is not None and permutation(turn) == (1, 0)
        plain = operand(turn) if turn is not None and turned else right
    reader = made_by(plain, "DequantizeLinear")
    stored = None if reader is None else constant(reader.inputs[0])
    if reader is None or stored is None or stored.ndim != 2:
        return None
    if not turned:
        return plain
    site_id = reader.metadata_props[SITE_KEY]
    return editor.node(
        node,
        "DequantizeLinear",
        [editor.initializer(f"{site_id}.codes.T", stored.T), *reader.inputs[1:]],
        plain,
        shape=ir.Shape(stored.T.shape),
        metadata=reader.metadata_props,
        attributes={"axis": 1 - reader.attributes["axis"].as_int()} if "axis" in reader.attributes else {},
    )


def _bias_of(node: ir.Node | None, product: ir.Value) -> ir.Value | None:
    if node is None or node.op_type != "Add":
        return None
    other = node.inputs[1] if node.inputs[0] is product else node.inputs[0]
    found = constant(other)
    return other if found is not None and found.ndim == 1 else None


def bias_codes(
    left: ir.Value, weight: ir.Value, bias: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray] | None:
    """A bias in the steps of the sums it is added to.

    Args:
        left: What DequantizeLinear makes of the input.
        weight: What it makes of the weight.
        bias: Shape ``(outputs,)``.

    Returns:
        Codes, int32, and steps, float32 of shape ``()`` or ``(outputs,)``; ``None`` if they do not fit.
    """
    readers = [made_by(value, "DequantizeLinear") for value in (left, weight)]
    steps = [None if reader is None else constant(reader.inputs[1]) for reader in readers]
    if bias is None or steps[0] is None or steps[1] is None:
        return None
    scale = (steps[0].astype(np.float64) * steps[1].astype(np.float64)).astype(np.float32)
    codes = np.rint(bias.astype(np.float64) / scale)
    if not np.all(np.abs(codes) <= _LARGEST_BIAS) or not np.all(scale >= np.finfo(np.float32).tiny):
        return None
    return codes.astype(np.int32), scale


def _bias_value(
    editor: Editor, before: ir.Node, weight: ir.Value, bias: ir.Value, codes: tuple[np.ndarray, np.ndarray]
) -> ir.Value:
    reader = made_by(weight, "DequantizeLinear")
    site_id = "" if reader is None else reader.metadata_props[SITE_KEY]
    numbers, scale = codes
    inputs = [
        editor.initializer(f"{site_id}{BIAS_ENDING}", numbers),
        editor.initializer(f"{site_id}{BIAS_ENDING}.scale", scale),
    ]
    attributes = {"axis": 0} if scale.ndim else {}
    return editor.node(before, "DequantizeLinear", inputs, bias, attributes=attributes)


def _integer_bias(editor: Editor, node: ir.Node, before: ir.Node) -> None:
    """Give a Gemm or Conv whose operands are both quantized an integer bias."""
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return
    bias, weight = operand(node, 2), operand(node, 1)
    numbers = constant(bias)
    codes = bias_codes(operand(node), weight, numbers)
    if codes is not None and numbers is not None:
        node.replace_input_with(2, _bias_value(editor, before, weight, bias, codes))
        node.metadata_props[BIAS_KEY] = _kept(numbers)


def _kept(bias: np.ndarray) -> str:
    return base64.b64encode(bias.astype("<f4").tobytes()).decode()


def _as_gemm(
    editor: Editor,
    node: ir.Node,
    addition: ir.Node,
    bias: ir.Value,
    codes: tuple[np.ndarray, np.ndarray],
    shapes: _Shapes,
) -> None:
    left, weight = operand(node), operand(node, 1)
    reader = made_by(left, "DequantizeLinear")
    numbers, sizes = constant(bias), weight.shape
    if reader is None or numbers is None or sizes is None:
        return
    inputs, outputs = (int(size) for size in sizes)  # type: ignore[arg-type]
    rows, stored = ir.Shape([None, inputs]), operand(reader)
    flat = rows_of(editor, node, stored)
    flat = editor.node(
        node, "DequantizeLinear", [flat, *reader.inputs[1:]], left, shape=rows, metadata=reader.metadata_props
    )
    made = editor.node(
        node,
        "Gemm",
        [flat, weight, _bias_value(editor, node, weight, bias, codes)],
        addition.outputs[0],
        shape=ir.Shape([None, outputs]),
        metadata={BIAS_KEY: _kept(numbers)},
    )
    target = shapes.of(node, left, outputs)
    # What quantizes the result comes first: only next to each other are they one kernel.
    last, old, site = made, addition.outputs[0], None
    while True:
        following = sole_user(old)
        if following is None or following.op_type not in ("QuantizeLinear", "Clip"):
            break
        following.replace_input_with(0, last)
        site, old = following, following.outputs[0]
        last = old
    if site is None:
        replace(old, editor.node(addition, "Reshape", [made, target], old))
        return
    readers, shaped = users(old), old.shape
    old.shape = ir.Shape([None, outputs])
    moved = editor.node(site, "Reshape", [old, target], old, after=True, shape=shaped)
    for reader_node, index in readers:
        reader_node.replace_input_with(index, moved)


def rows_of(editor: Editor, before: ir.Node, value: ir.Value) -> ir.Value:
    """A value in two dimensions, the last one as it is."""
    last = int(value.shape[-1])  # type: ignore[arg-type, index]
    shape = editor.initializer(f"{ROWS}{last}", np.array([-1, last], dtype=np.int64))
    return editor.node(before, "Reshape", [value, shape], value, shape=ir.Shape([None, last]))


class _Shapes:
    """The shapes that results of two dimensions are brought back to; made once for all layers of a kind."""

    def __init__(self, editor: Editor) -> None:
        self._editor = editor
        self._leading: dict[tuple[str, ...], ir.Value] = {}
        self._whole: dict[tuple[tuple[str, ...], int], ir.Value] = {}

    def of(self, before: ir.Node, like: ir.Value, outputs: int) -> ir.Value:
        """The shape of ``like`` with another last dimension."""
        dims = list(like.shape or ())[:-1]
        editor = self._editor
        unknown = [dim for dim in dims if not isinstance(dim, int)]
        if len(unknown) <= 1:
            sizes = [dim if isinstance(dim, int) else -1 for dim in dims] + [outputs]
            name = "shape." + ".".join(map(str, sizes))
            return editor.initializer(name, np.array(sizes, dtype=np.int64))
        key = tuple(map(str, dims))
        int64, rank = ir.DataType.INT64, len(dims)
        if key not in self._leading:
            self._leading[key] = editor.node(
                before,
                "Shape",
                [like],
                like,
                dtype=int64,
                shape=ir.Shape([rank]),
                attributes={"start": 0, "end": -1},
            )
        if (key, outputs) not in self._whole:
            last = editor.initializer(f"outputs.{outputs}", np.array([outputs], dtype=np.int64))
            self._whole[key, outputs] = editor.node(
                before,
                "Concat",
                [self._leading[key], last],
                last,
                shape=ir.Shape([rank + 1]),
                attributes={"axis": 0},
            )
        return self._whole[key, outputs]
