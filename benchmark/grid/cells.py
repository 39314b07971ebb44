"""Cells: one measured number each, its identity, and the one generator of a suite's grid."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from benchmark.grid.autocast import FULL_PRECISION
from benchmark.grid.noise import SUBSET
from benchmark.grid.schemes import scheme_of
from quanttune.digests import canonical_json, json_digest
from quanttune.errors import QuantTuneError
from quanttune.fields import FieldError, fitting

if TYPE_CHECKING:
    from baselines.method import Method
    from quanttune.quantization.scheme import Scheme

ENGINE_VERSION = 3
"""Part of every cell id: raise it when the engine measures the same settings differently.

2: products on integer codes, everything else in float64 and rounded once, ranges of 16 significant bits.
3: histograms of calibration that know no limits, in place of float16's. No kept table is of engine 2.
"""

REFERENCE_METHOD = "fp32"
REFERENCE_PRECISION = "FP32"
NO_RECIPE = "{}"


@dataclass(frozen=True)
class Cell:
    """Everything that decides one number, and nothing else.

    Attributes:
        model_identity: Digest of :meth:`ModelEntry.identity`: what decides the reference weights.
        task_fingerprint: Digest of the task's data and splits.
        parameters_json: The method's parameters as canonical JSON.
        profile: Which sites are quantized; ``"none"`` for the reference itself.
        limit: Items measured, ``None`` for the whole split.
        split: The split measured: ``test``, or ``validation`` in a search of hyperparameters.
        autocast: Mixed precision of the reference's evaluation and of fine-tuning, see
            :data:`benchmark.grid.autocast.AUTOCAST`; simulations compute in FP32 whatever it is.
        noise: Items on which the noise of rounding is measured, see :data:`benchmark.grid.noise.NOISE`: it
            widens the interval of the drop.
        recipe_json: For a method that trains, the model's recipe as canonical JSON; empty for the others.
    """

    model: str
    model_identity: str
    task: str
    task_fingerprint: str
    method: str
    variant: str
    method_version: str
    parameters_json: str
    profile: str
    precision: str
    weight_granularity: str
    symmetric: bool
    seed: int
    calibration_items: int
    limit: int | None
    split: str = "test"
    autocast: str = FULL_PRECISION
    noise: str = SUBSET
    recipe_json: str = NO_RECIPE

    @property
    def parameters(self) -> dict[str, Any]:
        """The method's parameters."""
        return dict(json.loads(self.parameters_json))

    @property
    def is_reference(self) -> bool:
        """Whether this cell is a model's FP32 row."""
        return self.method == REFERENCE_METHOD

    def identity(self) -> dict[str, Any]:
        """The cell as a JSON object, with the engine's version: what :attr:`cell_id` is the digest of."""
        # every field is a plain value, so there is nothing to copy deeply
        fields: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields["parameters"] = json.loads(fields.pop("parameters_json"))
        recipe = json.loads(fields.pop("recipe_json"))
        if recipe:
            fields["recipe"] = recipe
        if self.split == "test":
            del fields["split"]  # what a cell of a table measures needs no saying
        if self.autocast == FULL_PRECISION:
            del fields["autocast"]
        if self.noise == SUBSET:
            del fields["noise"]
        return {"engine": ENGINE_VERSION, **fields}

    @classmethod
    def from_identity(cls, identity: Mapping[str, Any]) -> Cell:
        """The inverse of :meth:`identity`.

        Raises:
            ValueError: If it is no cell's.
        """
        fields = {name: value for name, value in identity.items() if name != "engine"}
        for name in ("parameters", "recipe"):
            value = fields.pop(name, {})
            if not isinstance(value, dict):
                raise FieldError(f"{name} = {value!r}: give values by name")
            fields[f"{name}_json"] = canonical_json(value)
        try:
            cell = cls(**fields)
        except TypeError as error:
            raise FieldError(str(error)) from error
        fitting(cls, fields)
        return cell

    @cached_property
    def cell_id(self) -> str:
        """sha256 of the identity, 64 hexadecimal digits."""
        return json_digest(self.identity())

    @cached_property
    def training_group(self) -> str:
        """Digest shared by the cells that may reuse one expensive stage, such as tuned weights.

        Whatever a method calibrates with comes after that stage, so cells that differ in it belong together.
        """
        shared = {name: value for name, value in self.parameters.items() if name != "calibrator"}
        return json_digest([self.model_identity, self.method, shared, self.seed, self.autocast])

    @cached_property
    def scheme(self) -> Scheme:
        """How the tensors of this cell are quantized; the reference has none."""
        return scheme_of(self.precision, self.weight_granularity, self.symmetric, self.profile)

    @property
    def scheme_text(self) -> str:
        """The scheme in one word, such as ``W8tA8-asym``; ``FP32`` for the reference."""
        return self.precision if self.is_reference else str(self.scheme)

    def make_method(self) -> Method:
        """The method of this cell with its parameters."""
        from baselines import METHODS

        return METHODS.get(self.method)(**self.parameters)

    def __str__(self) -> str:
        if self.is_reference:
            return f"{self.model} {self.method}"
        extra = "" if self.autocast == FULL_PRECISION else f" {self.autocast}"
        return f"{self.model} {self.label} {self.scheme_text} {self.profile}{extra} seed {self.seed}"

    @cached_property
    def label(self) -> str:
        """The method's own short name, which tells apart other parameters."""
        try:
            return self.make_method().label
        # a record may be of a method that is not here, or that no longer takes these parameters
        except (QuantTuneError, TypeError, ValueError):
            return f"{self.method}{self.parameters_json if self.parameters else ''}"
