"""Whether an exported file has the codes of the simulation, site by site."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from quanttune.errors import QuantTuneError
from quanttune.export.graph import BIAS_ENDING, SITE_KEY
from quanttune.export.runtime import feed_of, open_session
from quanttune.inputs import ModelInputs, call_model
from quanttune.quantization.exact_operands import handled
from quanttune.quantization.quantized import Quantized
from quanttune.quantization.quantizers import Quantizer, State
from quanttune.quantization.quantizers.grid import Encoded
from quanttune.quantization.simulation import Simulation
from quanttune.quantization.sites import WEIGHT_OPERAND, SiteId


@dataclass(frozen=True)
class SiteCodes:
    """What a runtime computed at a site.

    Attributes:
        values: What was quantized, float32.
        codes: Its codes less the zero point, in the same shape.
    """

    values: np.ndarray
    codes: np.ndarray


@dataclass(frozen=True)
class Agreement:
    """How a site's codes compare.

    Attributes:
        number: How many there are.
        different: How many are others in the simulation.
        largest: By how much at most.
    """

    number: int
    different: int
    largest: int


def runtime_codes(path: Path | str, inputs: ModelInputs) -> dict[str, SiteCodes]:
    """The codes at every site of an activation, by ONNX Runtime with its optimisation off.

    Args:
        path: The exported file.
        inputs: A batch of the model's inputs.
    """
    proto = onnx.load(path)
    zeros = {each.name: onnx.numpy_helper.to_array(each) for each in proto.graph.initializer}
    taken: dict[str, tuple[str, str, int]] = {}
    for node in proto.graph.node:
        site_id = {prop.key: prop.value for prop in node.metadata_props}.get(SITE_KEY)
        if site_id is None:
            continue
        if node.op_type == "QuantizeLinear":
            taken[site_id] = (node.input[0], node.output[0], int(zeros[node.input[2]]))
        elif node.op_type == "Clip":
            # Behind the QuantizeLinear of its site.
            taken[site_id] = (taken[site_id][0], node.output[0], taken[site_id][2])
    present = {each.name for each in (*proto.graph.output, *proto.graph.input)}
    names = {name for value, codes, _ in taken.values() for name in (value, codes)}
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in sorted(names - present))
    session = open_session(proto.SerializeToString(), optimised=False)
    wanted = [each.name for each in session.get_outputs()]
    feed = feed_of(session, inputs)
    found = dict(zip(wanted, session.run(None, feed), strict=True)) | feed
    return {
        site_id: SiteCodes(found[value], found[codes].astype(np.int32) - zero)
        for site_id, (value, codes, zero) in taken.items()
    }


class _Led(Quantizer):
    """Compares its own codes with those of a runtime, and goes on with the runtime's.

    What a site is compared on is then what the runtime's codes in front of it make.
    """

    kind: ClassVar[str] = "led"

    def __init__(self, own: Quantizer, codes: np.ndarray) -> None:
        self.own, self.codes = own, torch.from_numpy(codes)
        self.found = Agreement(0, 0, 0)

    def encode(self, values: Tensor) -> Encoded:
        encoded = handled(self.own, values).encoded
        if encoded is None:
            raise QuantTuneError(f"a {self.own.kind} quantizer has no codes to compare")
        theirs = self.codes.reshape(values.shape).float()
        apart = (encoded.codes - theirs).abs()
        self.found = Agreement(apart.numel(), int((apart > 0).sum()), int(apart.max()))
        return Encoded(theirs, encoded.grid)

    def __call__(self, values: Tensor) -> Tensor:
        return self.encode(values).decoded()

    def state(self) -> State:
        raise NotImplementedError

    @classmethod
    def from_state(cls, state: State) -> Self:
        raise NotImplementedError


def code_agreement(
    path: Path | str, quantized: Quantized, model: nn.Module, inputs: ModelInputs, biases: bool = False
) -> Mapping[str, Agreement]:
    """The simulation's codes at every site of an activation against those of ONNX Runtime, not optimised.

    Both have the same codes at the sites in front: a difference is where it arises, and does not spread.

    Args:
        path: What :meth:`~quanttune.quantization.Quantized.to_onnx` wrote of ``quantized``.
        quantized: The quantized model.
        model: Its reference.
        inputs: A batch of the model's inputs.
        biases: Whether the simulation rounds biases as the file does.
    """
    theirs = runtime_codes(path, inputs)
    led = {site_id: _Led(quantized.quantizers[site_id], each.codes) for site_id, each in theirs.items()}
    applied = with_biases_of(path, quantized, model) if biases else quantized.apply(model).model
    with torch.no_grad(), Simulation(applied, {**quantized.quantizers, **led}, known=quantized.known):
        call_model(applied, inputs)
    return {site_id: each.found for site_id, each in led.items()}


def with_biases_of(path: Path | str, quantized: Quantized, model: nn.Module) -> nn.Module:
    """The quantized model, to be simulated, with the biases of its file: whole numbers of steps of the sums.

    What a simulation of it still does not share with the file is then the order of float operations alone.

    Args:
        path: What :meth:`~quanttune.quantization.Quantized.to_onnx` wrote of ``quantized``.
        quantized: The quantized model.
        model: Its reference; left as it is.

    Raises:
        QuantTuneError: If a bias of the file is none of the model's.
    """
    applied = quantized.apply(model).model
    parameters = dict(applied.named_parameters())
    held = {each.name: each for each in onnx.load(path).graph.initializer}
    for name, tensor in held.items():
        scale = held.get(f"{name}.scale")
        if scale is None or not name.endswith(f".{WEIGHT_OPERAND}{BIAS_ENDING}"):
            continue
        codes, steps = (onnx.numpy_helper.to_array(each) for each in (tensor, scale))
        rounded = torch.from_numpy(codes.astype(np.float32) * steps)
        own = parameters.get(f"{SiteId.parse(name.removesuffix(BIAS_ENDING)).module}.bias")
        most = 0.51 * float(steps.max())
        if own is None or own.shape != rounded.shape or float((own.detach() - rounded).abs().max()) > most:
            raise QuantTuneError(f"{path}: {name} is no bias of the model that the file was written from")
        with torch.no_grad():
            own.copy_(rounded)
    return applied
