"""Published accuracies on ImageNet, with the setting of each method of each source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from benchmark.grid.cells import REFERENCE_METHOD, REFERENCE_PRECISION
from benchmark.report.published.reader import load_published
from benchmark.report.published.value import IMAGENET, Published, Setting

_REFERENCE = Setting("none", "none", True)
_PTQ4VIT = Setting("matmul", "per_tensor", True)
_ASYMMETRIC = Setting("matmul", "per_channel", False)
"""RepQ-ViT's and AdaLog's: inputs of matrix products, weights per channel, asymmetric activations."""
_NO_METHOD = "no method here is this one"
_COLLECTED = "collected by the source from elsewhere, without its setting"


@dataclass(frozen=True)
class _Table:
    """How one file is read.

    Attributes:
        name: The file's.
        settings: Setting by method, for those that are methods here as well.
        reasons: Why a method that is one here stands nowhere in the grid.
    """

    name: str
    settings: Mapping[str, Setting] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)


_TABLES = (
    _Table("imagenet_ptq4vit", {"base_ptq": _PTQ4VIT, "ptq4vit": _PTQ4VIT}),
    _Table("imagenet_repqvit", {"repq_vit": _ASYMMETRIC}),
    _Table("imagenet_adalog", {"adalog": _ASYMMETRIC}),
    _Table("imagenet_qwt", {"repq_vit": _ASYMMETRIC}),
    _Table(
        "imagenet_coqmoe",
        {"repq_vit": _ASYMMETRIC},
        {"minmax": _COLLECTED},
    ),
    _Table(
        "imagenet_isvit",
        {"repq_vit": _ASYMMETRIC, "ptq4vit": _PTQ4VIT},
        {
            "brecq": _COLLECTED,
            "fq_vit": "collected by the source from elsewhere; FQ-ViT quantizes more than its other rows do",
            "noisyquant_linear": "noisy_quant here has another rule for ranges than the source, which does "
            "not state its own",
        },
    ),
    _Table("imagenet_bias_compensation", reasons={"noisyquant": _COLLECTED}),
    _Table("imagenet_gmpqte"),
    _Table("imagenet_igqvit"),
    _Table("imagenet_repquant"),
    _Table(
        "imagenet_other_checkpoints",
        reasons={REFERENCE_METHOD: "other weights than timm's"},
    ),
)


def imagenet_values() -> Iterator[Published]:
    """Every value on ImageNet, file by file."""
    yield from _fq_vit()
    for table in _TABLES:
        yield from _read(table)


def _read(table: _Table) -> Iterator[Published]:
    lines = load_published(table.name).to_dict("records")
    fp32 = {line["timm_model"]: line["top1"] for line in lines if line["method"] == REFERENCE_METHOD}
    settings = {REFERENCE_METHOD: _REFERENCE, **table.settings}
    for line in lines:
        method, model = str(line["method"]), str(line["timm_model"])
        bits = line.get("attention_bits")
        reference = method == REFERENCE_METHOD
        setting = None if method in table.reasons else settings.get(method)
        yield Published(
            source=str(line["source"]),
            model=model,
            data=IMAGENET,
            metric="accuracy",
            method=method,
            precision=REFERENCE_PRECISION if reference else f"W{line['wbits']}A{line['abits']}",
            value=float(line["top1"]),
            fp32=float(fp32[model]) if model in fp32 else None,
            attention_bits=None if bits is None or reference or not bits > 0 else int(bits),
            setting=setting,
            why="" if setting else table.reasons.get(method, _NO_METHOD),
        )


def _fq_vit() -> Iterator[Published]:
    """FQ-ViT's tables: everything quantized, weights per channel, asymmetric activations."""
    for value in _read(_Table("imagenet_fqvit")):
        if value.method == REFERENCE_METHOD:
            yield value
            continue
        parameters: dict[str, Any] = {}
        if value.method == "percentile":
            parameters = {"p": 99.999}
        elif value.method == "fq_vit" and value.attention_bits == 4:
            parameters = {"attention": "integer"}
        symmetric = None if value.method == "fq_vit" else False
        yield replace(value, setting=Setting("full", "per_channel", symmetric, parameters), why="")
