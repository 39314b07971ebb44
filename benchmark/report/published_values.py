"""The published tables read into one form: what was measured, and in which setting of ours it would stand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmark.grid.cells import REFERENCE_METHOD, REFERENCE_PRECISION
from benchmark.report.published.reader import load_published
from benchmark.report.roles import OURS

IMAGENET = "ImageNet-1k"
LAMBADA = "LAMBADA"
HEADLINE = "quanttune_headline"

REMARKS: Mapping[str, str] = {
    "FQ-ViT README": "calibrated on 1,000 training images; position embeddings and logits are quantized as "
    "well; percentile is a running mean of each batch's, OMSE is searched on the last batch alone",
    "PTQ4ViT README": "calibrated on 32 images; the input of the patch convolution is left in float",
}
"""Known differences of a source that leave its values comparable, to be printed beside them."""


@dataclass(frozen=True)
class Setting:
    """The axes of a cell that a published value fixes beside model, method and precision.

    Attributes:
        profile: The cell's.
        weight_granularity: The cell's.
        symmetric: Whether activation ranges are symmetric; ``None`` where the method itself decides.
        parameters: Parameters of the method that are not its defaults.
    """

    profile: str
    weight_granularity: str
    symmetric: bool | None
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Published:
    """One published number.

    Attributes:
        source: Who published it.
        model: Canonical name of the checkpoint (timm tag or name on the Hub), or what the source calls it.
        data: The data set it was measured on.
        metric: The source's metric.
        method: Name of our method, or the source's own name where we have none.
        precision: Bit widths in our notation.
        value: The metric; accuracies in percent.
        fp32: The source's own value without quantization, in the same unit.
        attention_bits: Width of the attention probabilities where the source varies it.
        setting: Where it would stand in our grid; ``None`` if nowhere.
        why: Why nowhere.
        family: Checkpoint whose architecture this is, where the weights themselves are others.
    """

    source: str
    model: str
    data: str
    metric: str
    method: str
    precision: str
    value: float
    fp32: float | None
    attention_bits: int | None = None
    setting: Setting | None = None
    why: str = ""
    family: str | None = None

    @property
    def drop(self) -> float | None:
        """``fp32 - value``, as in our tables; ``None`` for a value that is not quantized."""
        unquantized = self.method == REFERENCE_METHOD or self.fp32 is None
        return None if unquantized else (self.fp32 or 0.0) - self.value


def published_values() -> list[Published]:
    """Every number of the five published tables, in their order."""
    return [*_fq_vit(), *_ptq4vit(), *_quanto(), *_bondarenko(), *_headline()]


_REFERENCE = Setting("none", "none", True)


def _fq_vit() -> Iterator[Published]:
    """FQ-ViT's tables: everything quantized, weights per channel, asymmetric activations."""
    lines = load_published("imagenet_fqvit").to_dict("records")
    fp32 = {line["timm_model"]: line["top1"] for line in lines if line["method"] == REFERENCE_METHOD}
    for line in lines:
        method, bits = str(line["method"]), int(line["attention_bits"])
        parameters: dict[str, Any] = {}
        if method == "percentile":
            parameters = {"p": 99.999}
        elif method == "fq_vit" and bits == 4:
            parameters = {"attention": "integer"}
        quantized = Setting("full", "per_channel", None if method == "fq_vit" else False, parameters)
        reference = method == REFERENCE_METHOD
        yield Published(
            source=str(line["source"]),
            model=str(line["timm_model"]),
            data=IMAGENET,
            metric="accuracy",
            method=method,
            precision=REFERENCE_PRECISION if reference else f"W{line['wbits']}A{line['abits']}",
            value=float(line["top1"]),
            fp32=float(fp32[line["timm_model"]]),
            attention_bits=None if reference else bits,
            setting=_REFERENCE if reference else quantized,
        )


def _ptq4vit() -> Iterator[Published]:
    """PTQ4ViT's tables: inputs of matrix products, weights per tensor, symmetric."""
    lines = load_published("imagenet_ptq4vit").to_dict("records")
    fp32 = {line["timm_model"]: line["top1"] for line in lines if line["method"] == REFERENCE_METHOD}
    for line in lines:
        reference = line["method"] == REFERENCE_METHOD
        yield Published(
            source=str(line["source"]),
            model=str(line["timm_model"]),
            data=IMAGENET,
            metric="accuracy",
            method=str(line["method"]),
            precision=REFERENCE_PRECISION if reference else f"W{line['wbits']}A{line['abits']}",
            value=float(line["top1"]),
            fp32=float(fp32[line["timm_model"]]),
            setting=_REFERENCE if reference else Setting("matmul", "per_tensor", True),
        )


def _quanto() -> Iterator[Published]:
    """OPT under optimum-quanto; accuracies are fractions there."""
    for line in load_published("opt_lambada_quanto").to_dict("records"):
        fp16 = 100 * float(line["fp16"])
        for column, precision, method, why in (
            ("fp16", "FP16", REFERENCE_METHOD, "in float16; the reference here is FP32"),
            ("w8", "W8", "quanto", "weights only, which no precision here is"),
            ("w8a8", "W8A8", "quanto", "another method: quanto's own calibration"),
        ):
            yield Published(
                source=str(line["source"]),
                model=str(line["model"]),
                data=LAMBADA,
                metric="last-token accuracy",
                method=method,
                precision=precision,
                value=100 * float(line[column]),
                fp32=fp16,
                why=why,
            )


_ARCHITECTURES = {
    "bert-base": "bert-base-uncased",
    "opt-125m": "facebook/opt-125m",
    "opt-350m": "facebook/opt-350m",
    "vit-s/16": "vit_small_patch16_224.augreg_in21k_ft_in1k",
}


def _bondarenko() -> Iterator[Published]:
    """Bondarenko et al. 2023, who trained every model from scratch."""
    for line in load_published("outliers_bondarenko2023").to_dict("records"):
        for method, precision, value in (
            (REFERENCE_METHOD, REFERENCE_PRECISION, line["fp"]),
            ("minmax", "W8A8", line["w8a8"]),
        ):
            yield Published(
                source=str(line["source"]),
                model=f"{line['model']} ({line['method']})",
                data=IMAGENET if line["metric"] == "accuracy" else "the authors' text",
                metric=str(line["metric"]),
                method=method,
                precision=precision,
                value=float(value),
                fp32=float(line["fp"]),
                why="other weights: trained from scratch by the authors",
                family=_ARCHITECTURES[str(line["model"])],
            )


def _headline() -> Iterator[Published]:
    """What QuantTune's abstract states: shares and differences averaged over models."""
    for line in load_published(HEADLINE).to_dict("records"):
        precision = line["precision"]
        yield Published(
            source=str(line["source"]),
            model="average over models",
            data="several",
            metric=str(line["claim"]),
            method=OURS,
            precision=precision if isinstance(precision, str) else "",
            value=float(line["value"]),
            fp32=None,
            why="a claim over models and methods; `report` sets it beside ours",
        )
