"""A quantized model as a value: what a method found, in a form that is kept, reopened and applied."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from quanttune.digests import json_digest, sha256_file, tensor_digest
from quanttune.errors import AssetError, ConfigError, QuantTuneError
from quanttune.files import whole_file
from quanttune.inputs import ModelInputs, calibration_batches, logits_of
from quanttune.quantization.equivalence import load_weights
from quanttune.quantization.quantized_model import QuantizedModel
from quanttune.quantization.quantizers import Quantizer, State, quantizer_from_state
from quanttune.quantization.scheme import Scheme
from quanttune.quantization.transforms import TRANSFORMS, Transform

SCHEMA = 1
DOCUMENT, QUANTIZERS_FILE, WEIGHTS_FILE = "quantized.json", "quantizers.safetensors", "weights.safetensors"
_MARK = "|"


@dataclass
class Quantized:
    """A method's result.

    Args:
        quantizers: Site id to quantizer.
        weights: The state dict that the quantizers belong to; ``None`` where it is the reference's own.
        details: What else is worth recording, as plain JSON values.
        scheme: What was asked for; ``None`` where nothing is quantized.
        transforms: What stands between tensors and quantizers, as the quantizers have it already.
        same_function: Whether ``weights``, unquantized, are meant to compute what the reference computes.
        weights_origin: Where ``weights`` are kept already, in the words of the stage cache.
        known: Ids of all sites of the model, where they are known; it is an error if another is reached.
        untied: Names of ``weights`` that the reference ties to another one and that are tensors of their own
            here.
        reference: Digest of the state dict that was quantized, where it is known.
    """

    quantizers: Mapping[str, Quantizer]
    weights: dict[str, Tensor] | None = None
    details: dict[str, Any] = field(default_factory=dict)
    scheme: Scheme | None = None
    transforms: tuple[Transform, ...] = ()
    same_function: bool = False
    weights_origin: str | None = None
    known: frozenset[str] | None = None
    untied: tuple[str, ...] = ()
    reference: str | None = None

    @property
    def extra_operations(self) -> dict[str, str]:
        """What integer inference computes beside the network's own operations; by site, in words."""
        return {
            site_id: what
            for transform in self.transforms
            for site_id, what in transform.extra_operations.items()
        }

    def quantizers_digest(self) -> str:
        """Of the quantizers alone: what a method records beside them decides no number."""
        document, tensors = replace(self, weights=None).to_state()
        return json_digest([document["quantizers"], tensor_digest(tensors)])

    def apply(self, model: nn.Module, *, other_weights: bool = False) -> QuantizedModel:
        """A copy of a model that computes with these weights and quantizers.

        Args:
            model: The reference that was quantized; left as it is.
            other_weights: Whether it may have other weights, for which nothing here was chosen.

        Raises:
            ConfigError: If the weights do not fit the model, or its own are not those that were quantized.
        """
        if self.reference is not None and self.weights is None and not other_weights:
            found = _weights_of(model)
            if found != self.reference:
                raise ConfigError(
                    f"this {type(model).__name__} has other weights (digest {found[:12]}) than the model "
                    f"that was quantized ({self.reference[:12]}): give that one, or quantize this one; "
                    "apply(model, other_weights=True) takes its ranges all the same"
                )
        applied = copy.deepcopy(model)
        if self.weights is not None:
            try:
                load_weights(applied, self.weights)
            except RuntimeError as error:
                raise ConfigError(
                    f"the quantized weights are not those of a {type(model).__name__}: "
                    f"{' '.join(str(error).split())[:300]}"
                ) from error
        return QuantizedModel(applied.eval(), self.quantizers, self.known)

    def to_onnx(
        self,
        path: Path | str,
        model: nn.Module,
        inputs: ModelInputs,
        *,
        weights: str = "int8",
        logits: Callable[[Any], Tensor] = logits_of,
        metadata: Mapping[str, str] | None = None,
    ) -> Path:
        """Write the quantized model as an ONNX file whose products runtimes compute on integers.

        Every site is a QuantizeLinear and a DequantizeLinear that name it in their metadata
        (``quanttune.site``). The sizes of the batch, and of the tokens of a text model, are free. Biases of
        layers are rounded to integers in steps of the sums they are added to; nothing else differs from
        :meth:`apply` but the last digit of what stays in float.

        Args:
            path: The file; an older one is replaced once the new one is whole.
            model: The reference that was quantized; left as it is.
            inputs: An example: a batch as the model takes it, of two tokens or more.
            weights: How signed weights are stored: ``int8``, or ``uint8`` with zero point 128 for processors
                without VNNI, on which products of unsigned and signed bytes can saturate. The same numbers.
            logits: Picks the logits from the model's output.
            metadata: What else to say in the file, under ``quanttune.<name>``.

        Returns:
            The file.

        Raises:
            ConfigError: If ONNX has no form of a quantizer, or a package is missing; before any work.
            QuantTuneError: If torch cannot export the model.
        """
        try:
            from quanttune.export.write import export_onnx
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"the export needs the package {error.name}: pip install 'quanttune-bench[onnx]'"
            ) from error
        return export_onnx(self, path, model, inputs, weights=weights, logits=logits, metadata=metadata)

    def to_state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Everything but the weights: a JSON document and the tensors it names."""
        tensors: dict[str, Tensor] = {}

        def described(name: str, state: State) -> dict[str, Any]:
            for part, tensor in state.tensors.items():
                tensors[f"{name}{_MARK}{part}"] = _own(tensor)
            return {"kind": state.kind, "settings": dict(state.settings)}

        scheme = self.scheme
        document: dict[str, Any] = {
            "schema": SCHEMA,
            "scheme": None if scheme is None else {"text": str(scheme), "profile": scheme.profile},
            "quantizers": {
                site_id: described(site_id, quantizer.state())
                for site_id, quantizer in self.quantizers.items()
            },
            "transforms": [
                described(f"transform {number}", transform.state())
                for number, transform in enumerate(self.transforms)
            ],
            "weights": None if self.weights is None else tensor_digest(self.weights),
            "same_function": self.same_function,
            "details": self.details,
        }
        if self.known is not None:
            document["known"] = sorted(self.known)
        if self.untied:
            document["untied"] = list(self.untied)
        if self.reference is not None:
            document["reference"] = self.reference
        return document, tensors

    @classmethod
    def from_state(
        cls,
        document: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        weights: dict[str, Tensor] | None = None,
    ) -> Quantized:
        """The inverse of :meth:`to_state`.

        Raises:
            AssetError: If the document is of another schema or form, or the weights are not those it names.
            UnknownNameError: If a kind of quantizer is not registered.
        """
        if document.get("schema") != SCHEMA:
            raise AssetError(
                f"a quantized model of schema {document.get('schema')!r}; this version reads {SCHEMA}"
            )
        promised = document.get("weights")
        if (None if weights is None else tensor_digest(weights)) != promised:
            raise AssetError(
                f"the weights beside a quantized model are not those it was made with (digest {promised})"
            )
        try:
            scheme = document["scheme"]
            return cls(
                {
                    site_id: quantizer_from_state(_state(site_id, each, tensors))
                    for site_id, each in document["quantizers"].items()
                },
                weights,
                dict(document["details"]),
                None if scheme is None else Scheme.parse(scheme["text"], scheme["profile"]),
                tuple(
                    TRANSFORMS.get(each["kind"]).from_state(_state(f"transform {number}", each, tensors))
                    for number, each in enumerate(document["transforms"])
                ),
                bool(document["same_function"]),
                known=None if document.get("known") is None else frozenset(document["known"]),
                untied=tuple(document.get("untied", ())),
                reference=document.get("reference"),
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise AssetError(f"a quantized model's document is damaged: {error!r}") from error

    def save(self, folder: Path | str) -> Path:
        """Keep everything in a folder: ``quantized.json`` and safetensors, whole or absent.

        Returns:
            The folder.

        Raises:
            ConfigError: If the path leads through a file.
        """
        folder = Path(folder)
        if any(place.is_file() for place in (folder, *folder.parents)):
            raise ConfigError(f"{folder} cannot be a folder: a part of that path is a file")
        document, tensors = self.to_state()
        parts = {QUANTIZERS_FILE: tensors} | ({} if self.weights is None else {WEIGHTS_FILE: self.weights})
        files = {}
        for name, content in parts.items():
            with whole_file(folder / name) as temporary:
                save_file(
                    {key: value.detach().cpu().contiguous().clone() for key, value in content.items()},
                    temporary,
                )
            files[name] = sha256_file(folder / name)
        document |= {"files": files}
        # The document goes last: a folder without one is unfinished.
        with whole_file(folder / DOCUMENT) as temporary:
            text = json.dumps(document | {"digest": json_digest(document)}, indent=1) + "\n"
            temporary.write_text(text, encoding="utf-8")
        return folder

    @classmethod
    def load(cls, folder: Path | str) -> Quantized:
        """Read what :meth:`save` wrote; nothing is used before its digest is checked.

        Raises:
            AssetError: If something is absent, damaged or edited; the message names it.
        """
        folder = Path(folder)
        path = folder / DOCUMENT
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise AssetError(f"cannot read {path}: {error}; save the quantized model again") from error
        found = document if isinstance(document, dict) else {}
        body = {key: value for key, value in found.items() if key != "digest"}
        if found.get("digest") != _digest(body) or not isinstance(body.get("files"), dict):
            raise AssetError(f"{path} is damaged or was edited; save the quantized model again")
        parts = {name: _checked(folder / name, digest) for name, digest in sorted(body["files"].items())}
        return cls.from_state(body, parts.get(QUANTIZERS_FILE, {}), parts.get(WEIGHTS_FILE))


def quantize(
    model: nn.Module,
    batches: Iterable[Any],
    scheme: Scheme | str = "W8A8",
    *,
    profile: str | None = None,
    rule: str | Callable[..., tuple[float, float]] = "minmax",
    logits: Callable[[Any], Tensor] = logits_of,
) -> Quantized:
    """Quantize a model: find its sites, calibrate on a few batches, choose the ranges.

    Args:
        model: Any eager PyTorch model; left as it is.
        batches: Model inputs: tensors, or dictionaries of named ones.
        scheme: Formats, e.g. ``W8A8``, ``W4g128``, ``W8A8-token``.
        profile: Which tensors, ``full`` or ``matmul``; the scheme's by default.
        rule: A range rule or its name: ``minmax``, ``percentile``, ``mse``, ``omse``, ``ema``, ``entropy``,
            ``token_percentile``.
        logits: Picks the logits from the model's output; the site that made them stays in float.

    Raises:
        QuantTuneError: If there is no batch, or something of the model cannot be quantized.
    """
    from quanttune.quantization.discovery import discover_sites
    from quanttune.quantization.ranges import RANGE_RULES
    from quanttune.quantization.simulation import build_quantizers
    from quanttune.quantization.statistics import collect_statistics

    if not isinstance(scheme, str | Scheme):
        raise ConfigError(f"scheme {scheme!r} is neither a text such as W8A8 nor a Scheme")
    wanted = Scheme.parse(scheme) if isinstance(scheme, str) else scheme
    wanted = wanted if profile is None else wanted.with_profile(profile)
    data = calibration_batches(batches)
    sites = wanted.sites(discover_sites(model, data[0], logits))
    if not sites:
        raise QuantTuneError(f"profile {wanted.profile} of {type(model).__name__} has nothing to quantize")
    statistics = collect_statistics(model, data, sites) if wanted.is_static else {}
    chosen = RANGE_RULES.get(rule) if isinstance(rule, str) else rule
    if not callable(chosen):
        raise ConfigError(f"rule = {rule!r}: give a range rule or the name of one")
    quantizers = build_quantizers(model, sites, statistics, wanted, chosen)
    return Quantized(quantizers, scheme=wanted, known=sites.known, reference=_weights_of(model))


def _weights_of(model: nn.Module) -> str:
    """Digest of a model's state dict, in which a module may have more than tensors."""
    state = model.state_dict()
    return tensor_digest({name: each for name, each in state.items() if isinstance(each, Tensor)})


def _state(name: str, described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> State:
    start = f"{name}{_MARK}"
    own = {key.removeprefix(start): tensor for key, tensor in tensors.items() if key.startswith(start)}
    return State(described["kind"], described["settings"], own)


def _own(tensor: Tensor) -> Tensor:
    """A copy of its own on the CPU: safetensors refuses tensors that share memory."""
    return tensor.detach().cpu().contiguous().clone()


def _digest(body: Mapping[str, Any]) -> str | None:
    try:
        return json_digest(body)
    except ValueError:  # a NaN that no document of ours holds
        return None


def _checked(path: Path, digest: str) -> dict[str, Tensor]:
    if path.name not in (QUANTIZERS_FILE, WEIGHTS_FILE):
        raise AssetError(f"{path} does not belong to a quantized model")
    try:
        if sha256_file(path) != digest:
            raise AssetError(f"{path} is not the file that was saved; save the quantized model again")
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise AssetError(f"cannot read {path}: {error}; save the quantized model again") from error
