"""Markers become QuantizeLinear, Clip and DequantizeLinear, and weights become codes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import torch

from quanttune.export.graph import SITE_KEY, Editor, constant, made_by, operand, replace, sole_user, users
from quanttune.export.levels import Levels, activation_levels, weight_codes, weight_levels
from quanttune.export.tracing import DOMAIN, MARKER, SITE
from quanttune.quantization.quantizers import Quantizer
from quanttune.quantization.sites import SiteId

FACTORS = "factors"
"""Name in a node's notes of what channels are multiplied by behind a quantizer."""


def expand(editor: Editor, quantizers: Mapping[str, Quantizer], unsigned_weights: bool) -> None:
    """Replace every marker by what its quantizer computes.

    Args:
        editor: Of the graph.
        quantizers: Site id to quantizer.
        unsigned_weights: Whether signed weights are stored as ``uint8`` with zero point 128.

    Raises:
        ConfigError: If ONNX cannot express a quantizer.
    """
    divided: dict[tuple[ir.Value, bytes], ir.Value] = {}
    for node in list(editor.graph):
        if node.domain != DOMAIN or node.op_type != MARKER:
            continue
        site_id = node.attributes[SITE].as_string()
        value = operand(node)
        weight = constant(value)
        if weight is None:
            levels = activation_levels(site_id, quantizers[site_id])
            made = _activation(editor, node, site_id, value, levels, divided)
        else:
            quantizer = quantizers[site_id]
            levels = weight_levels(site_id, quantizer, unsigned_weights)
            codes = weight_codes(site_id, quantizer, torch.from_numpy(np.array(weight)), levels)
            made = _weight(editor, node, site_id, codes, levels)
        replace(node.outputs[0], made)
        editor.graph.remove(node, safe=True)


def _activation(
    editor: Editor,
    node: ir.Node,
    site_id: str,
    value: ir.Value,
    levels: Levels,
    divided: dict[tuple[ir.Value, bytes], ir.Value],
) -> ir.Value:
    factors = None
    if levels.factors is not None:
        factors = editor.initializer(f"{site_id}.factors", levels.factors)
        key = value, levels.factors.tobytes()
        # Every reader of a tensor has its own site in profile matmul, and they share the quotient.
        if key not in divided:
            divided[key] = editor.node(node, "Div", [value, factors], value)
        value = divided[key]
    codes = quantized(editor, node, site_id, value, levels)
    out = editor.node(
        node,
        "DequantizeLinear",
        [codes, *parameters(editor, site_id, levels)],
        value,
        metadata={SITE_KEY: site_id},
    )
    if factors is not None:
        out = editor.node(node, "Mul", [out, factors], value)
        _note(out, levels.factors)
    return out


def quantized(editor: Editor, before: ir.Node, site_id: str, value: ir.Value, levels: Levels) -> ir.Value:
    """The codes of a value, clipped to those in use where a byte holds more."""
    metadata = {SITE_KEY: site_id}
    codes = editor.node(
        before,
        "QuantizeLinear",
        [value, *parameters(editor, site_id, levels)],
        value,
        dtype=ir.DataType.UINT8,
        metadata=metadata,
    )
    at = SiteId.parse(site_id)
    limits = levels.clips(at.operation, at.operand)
    if limits is None:
        return codes
    # Of integers: a clip in float would stand between a product and the QuantizeLinear it is fused with.
    ends = [
        editor.initializer(f"{site_id}.{name}", np.array(end, dtype=np.uint8))
        for name, end in zip(("low", "high"), limits, strict=True)
    ]
    return editor.node(before, "Clip", [codes, *ends], codes, metadata=metadata)


def parameters(editor: Editor, site_id: str, levels: Levels) -> list[ir.Value]:
    """Scale and zero point of a site, each an initializer that all its nodes share."""
    return [
        editor.initializer(f"{site_id}.scale", levels.scale),
        editor.initializer(f"{site_id}.zero_point", levels.zero_point),
    ]


def _weight(editor: Editor, node: ir.Node, site_id: str, codes: np.ndarray, levels: Levels) -> ir.Value:
    out = node.outputs[0]
    stored = editor.initializer(f"{site_id}.codes", codes)
    axis = {} if levels.axis is None else {"axis": levels.axis}
    made = editor.node(
        node,
        "DequantizeLinear",
        [stored, *parameters(editor, site_id, levels)],
        out,
        shape=ir.Shape(codes.shape),
        metadata={SITE_KEY: site_id},
        attributes=axis,
    )
    if levels.factors is not None:
        made = editor.node(
            node, "Mul", [made, editor.initializer(f"{site_id}.factors", levels.factors)], made
        )
        _note(made, levels.factors)
    return made


def _note(value: ir.Value, factors: np.ndarray | None) -> None:
    value.meta[FACTORS] = factors


def fold_factors(editor: Editor) -> None:
    """Leave out factors of an activation and a weight that cancel in their product.

    A quotient behind a layer normalisation that nothing else reads becomes part of its weight and bias.
    """
    for node in list(editor.graph):
        if node.op_type not in ("MatMul", "Gemm"):
            continue
        left, right = operand(node), operand(node, 1)
        turned = made_by(right, "Transpose")
        weight = right if turned is None else operand(turned)
        scaled, weighted = made_by(left, "Mul"), made_by(weight, "Mul")
        if scaled is None or weighted is None or FACTORS not in left.meta or FACTORS not in weight.meta:
            continue
        a, b = left.meta[FACTORS], weight.meta[FACTORS]
        if not (np.array_equal(1 / a, b) or np.array_equal(a, 1 / b)):
            continue
        node.replace_input_with(0, scaled.inputs[0])
        if turned is None:
            node.replace_input_with(1, weighted.inputs[0])
        else:
            turned.replace_input_with(0, weighted.inputs[0])
    for node in list(editor.graph):
        norm = made_by(node.inputs[0], "LayerNormalization") if node.op_type == "Div" else None
        if norm is not None:
            _fold_quotient(editor, node, norm)


def _fold_quotient(editor: Editor, node: ir.Node, norm: ir.Node) -> None:
    normalised, factors = operand(node), constant(node.inputs[1])
    if factors is None or len(users(normalised)) != 1 or normalised.is_graph_output():
        return
    for index in range(1, len(norm.inputs)):
        value = norm.inputs[index]
        numbers = constant(value)
        if value is None or numbers is None:
            return
        folded = (numbers / factors).astype(np.float32)
        norm.replace_input_with(index, editor.initializer(f"{value.name}/{normalised.name}", folded))
    replace(node.outputs[0], normalised)
    editor.graph.remove(node, safe=True)


def absorb_relu(editor: Editor) -> None:
    """Let the clip of codes at that of zero take the place of a Relu in front of it: the codes are the same.

    A Relu behind a Gemm is fused with it in float by the runtime, which then finds no integer product there.
    """
    for node in list(editor.graph):
        if node.op_type != "Relu":
            continue
        value, readers = operand(node), users(node.outputs[0])
        if not readers or node.outputs[0].is_graph_output():
            continue
        if any(reader.op_type != "QuantizeLinear" for reader, _ in readers):
            continue
        for reader, _ in readers:
            site_id = reader.metadata_props[SITE_KEY]
            low = editor.initializer(f"{site_id}.zero_point", np.array(0))
            following = sole_user(reader.outputs[0])
            reader.replace_input_with(0, value)
            if following is not None and following.op_type == "Clip":
                following.replace_input_with(1, low)
                continue
            codes, behind = reader.outputs[0], users(reader.outputs[0])
            clipped = editor.node(
                reader, "Clip", [codes, low], codes, after=True, metadata={SITE_KEY: site_id}
            )
            for each, index in behind:
                each.replace_input_with(index, clipped)
        editor.graph.remove(node, safe=True)
