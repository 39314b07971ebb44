"""Other ranges or widths in an exported file, by site, without tracing the model again."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from quanttune.errors import ConfigError, UnknownNameError
from quanttune.export.graph import BIAS_KEY, FACTOR_KEY, SITE_KEY
from quanttune.export.levels import Levels, activation_levels
from quanttune.files import whole_file
from quanttune.quantization.quantizers import Quantizer
from quanttune.quantization.sites import SiteId


def said(path: Path | str) -> dict[str, str]:
    """What an exported file says of itself, without the prefix.

    Raises:
        ConfigError: If it is no exported file.
    """
    start = "quanttune."
    facts = {prop.key: prop.value for prop in _read(path).metadata_props if prop.key.startswith(start)}
    if f"{start}scheme" not in facts:
        raise ConfigError(f"{path} was not written by this export")
    return {key.removeprefix(start): value for key, value in facts.items()}


def _read(path: Path | str) -> onnx.ModelProto:
    try:
        return onnx.load(path)
    # protobuf's own errors and those of files have no base in common
    except Exception as error:
        raise ConfigError(f"{path} cannot be read as ONNX: {error}") from error


def rewrite_ranges(
    path: Path | str,
    output: Path | str,
    quantizers: Mapping[str, Quantizer],
    facts: Mapping[str, str] | None = None,
) -> Path:
    """Give activations of an exported file other ranges, or other widths.

    What the graph computes with follows: the scales that hold a constant factor, and the biases of layers,
    whose integers are in steps of their input.

    Args:
        path: The file.
        output: The new file; may be the same.
        quantizers: Site id to its new quantizer; other sites stay as they are.
        facts: What the file says of itself from then on, by name without ``quanttune.``.

    Returns:
        The new file.

    Raises:
        UnknownNameError: If the file has no such activation.
        ConfigError: If ONNX cannot express a quantizer, it has factors of channels, or the file is no export.
    """
    model = _read(path)
    file = _File(model)
    for site_id, quantizer in quantizers.items():
        if site_id not in file.activations:
            raise UnknownNameError("activation site of the file", site_id, sorted(file.activations))
        levels = activation_levels(site_id, quantizer)
        if levels.factors is not None:
            raise ConfigError(
                f"site {site_id} has factors of channels, which are part of the weights; export it"
            )
        file.change(site_id, levels)
    file.renew_biases()
    for prop in model.metadata_props:
        prop.value = (facts or {}).get(prop.key.removeprefix("quanttune."), prop.value)
    onnx.checker.check_model(model)
    with whole_file(Path(output)) as temporary:
        onnx.save(model, temporary)
    return Path(output)


class _File:
    """An exported graph, by site.

    Args:
        model: It; changed in place.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self._graph = model.graph
        self._initializers = {each.name: each for each in model.graph.initializer}
        self._nodes: dict[str, list[onnx.NodeProto]] = {}
        for node in model.graph.node:
            site_id = _metadata(node).get(SITE_KEY)
            if site_id is not None:
                self._nodes.setdefault(site_id, []).append(node)
        self.activations = {
            site_id
            for site_id, nodes in self._nodes.items()
            if any(node.op_type == "QuantizeLinear" for node in nodes)
        }

    def change(self, site_id: str, levels: Levels) -> None:
        """New numbers for one site, and a clip where the old width or the new one needs it."""
        for node in self._nodes[site_id]:
            factor = _metadata(node).get(FACTOR_KEY)
            if factor is not None:
                scaled = levels.scale.astype(np.float64) * float(factor)
                self._set(node.input[1], scaled.astype(np.float32))
        self._set(f"{site_id}.scale", levels.scale)
        self._set(f"{site_id}.zero_point", levels.zero_point)
        at = SiteId.parse(site_id)
        self._clip(site_id, levels, levels.clips(at.operation, at.operand))

    def _clip(self, site_id: str, levels: Levels, limits: tuple[int, int] | None) -> None:
        clips = [node for node in self._nodes[site_id] if node.op_type == "Clip"]
        low, high = limits or (0, 255)
        if clips:
            # Where a Relu became a part of the clip, the smallest code is that of zero, by name.
            relu = clips[0].input[1] == f"{site_id}.zero_point"
            ends = [clips[0].input[1] if relu else self._end(site_id, "low", low)]
            ends.append(self._end(site_id, "high", high))
            del clips[0].input[1:]
            clips[0].input.extend(ends)
        elif limits is not None:
            self._insert(site_id, [self._end(site_id, "low", low), self._end(site_id, "high", high)])

    def _end(self, site_id: str, name: str, code: int) -> str:
        self._set(f"{site_id}.{name}", np.array(code, dtype=np.uint8))
        return f"{site_id}.{name}"

    def _insert(self, site_id: str, ends: list[str]) -> None:
        node = next(each for each in self._nodes[site_id] if each.op_type == "QuantizeLinear")
        codes = f"{node.output[0]}.clipped"
        for other in self._graph.node:
            for index, name in enumerate(other.input):
                if name == node.output[0]:
                    other.input[index] = codes
        clip = helper.make_node("Clip", [node.output[0], *ends], [codes], name=codes)
        clip.metadata_props.extend(node.metadata_props)
        self._graph.node.insert(list(self._graph.node).index(node) + 1, clip)
        self._nodes[site_id].append(clip)

    def renew_biases(self) -> None:
        """The integers of every bias whose input or weight has another step."""
        readers = {node.output[0]: node for node in self._graph.node if node.op_type == "DequantizeLinear"}
        for node in self._graph.node:
            kept = _metadata(node).get(BIAS_KEY)
            if kept is None:
                continue
            bias = np.frombuffer(base64.b64decode(kept), dtype="<f4").astype(np.float64)
            steps = [self._get(readers[name].input[1]).astype(np.float64) for name in node.input[:2]]
            scale = (steps[0] * steps[1]).astype(np.float32)
            integers = np.rint(bias / scale)
            if not np.all(np.abs(integers) < 2**31):
                raise ConfigError(
                    f"the bias of {node.name} does not fit 32 bits in these steps; export it again"
                )
            of_bias = readers[node.input[2]]
            self._set(of_bias.input[0], integers.astype(np.int32))
            self._set(of_bias.input[1], scale)

    def _get(self, name: str) -> np.ndarray:
        return numpy_helper.to_array(self._initializers[name])

    def _set(self, name: str, array: np.ndarray) -> None:
        tensor = numpy_helper.from_array(np.asarray(array), name)
        if name in self._initializers:
            self._initializers[name].CopyFrom(tensor)
        else:
            self._graph.initializer.append(tensor)
            self._initializers[name] = self._graph.initializer[-1]


def _metadata(node: onnx.NodeProto) -> dict[str, str]:
    return {prop.key: prop.value for prop in node.metadata_props}
