"""What an exporter leaves in a graph that does not belong into a file for others."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from quanttune.export.graph import BIAS_KEY, FACTOR_KEY, SITE_KEY, Editor
from quanttune.export.tracing import BATCH, DOMAIN, OUTPUT_NAME, TOKENS

_OWN_KEYS = frozenset({SITE_KEY, FACTOR_KEY, BIAS_KEY})


def tidy(model: ir.Model, editor: Editor) -> None:
    """Remove dead nodes, the exporter's notes, its types of inner tensors and our own domain; name the axes.

    The exporter's metadata holds stack traces with paths of the machine it ran on.
    """
    common.RemoveUnusedNodesPass()(model)
    graph = model.graph
    model.doc_string = graph.doc_string = None
    model.metadata_props.clear()
    graph.metadata_props.clear()
    model.producer_version = None
    for node in graph.all_nodes():
        node.doc_string = None
        for key in [key for key in node.metadata_props if key not in _OWN_KEYS]:
            del node.metadata_props[key]
        for value in node.outputs:
            value.metadata_props.clear()
            if not value.is_graph_output():
                # Names of unknown sizes differ from node to node; whoever runs the graph infers them.
                value.shape = value.type = None
    for value in (*graph.inputs, *graph.outputs, *graph.initializers.values()):
        value.metadata_props.clear()
        value.doc_string = None
    for value in graph.inputs:
        sizes = list(value.shape or ())
        names = (BATCH, TOKENS)
        value.shape = ir.Shape(
            [size if isinstance(size, int) else names[axis] for axis, size in enumerate(sizes)]
        )
    logits = graph.outputs[0]
    logits.name = OUTPUT_NAME
    known = [size if isinstance(size, int) else None for size in logits.shape or ()]
    logits.shape = ir.Shape([BATCH if axis == 0 else size for axis, size in enumerate(known)])
    model.opset_imports.pop(DOMAIN, None)


def finite_masks(editor: Editor) -> None:
    """Let masks be the most negative number in place of minus infinity.

    A row of attention without a token then has equal probabilities and no NaN, and every other row what it
    had; zeros there, as in the fused kernel, would cost two passes over all scores.
    """
    least = np.finfo(np.float32).min
    for value in list(editor.graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.size != 1:
            continue
        numbers = tensor.numpy()
        if np.isneginf(numbers).all():
            value.const_value = ir.tensor(np.full(numbers.shape, least, dtype=np.float32), name=value.name)
    for node in editor.graph:
        attribute = node.attributes.get("value") if node.op_type == "Constant" else None
        if attribute is None:
            continue
        numbers = attribute.as_tensor().numpy()
        if numbers.dtype == np.float32 and numbers.size and np.isneginf(numbers).all():
            node.attributes["value"] = ir.AttrTensor(
                "value", ir.tensor(np.full(numbers.shape, least, np.float32))
            )
