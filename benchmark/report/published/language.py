"""Published values of language models: none is of weights, data and method that a suite has as well."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from benchmark.grid.cells import REFERENCE_METHOD, REFERENCE_PRECISION
from benchmark.report.published.reader import load_published
from benchmark.report.published.value import IMAGENET, Published

LAMBADA = "LAMBADA"
_LAST_TOKEN = "last-token accuracy"  # noqa: S105 - a token of text
_ARCHITECTURES = {
    "bert-base": "bert-base-uncased",
    "opt-125m": "facebook/opt-125m",
    "opt-350m": "facebook/opt-350m",
    "vit-s/16": "vit_small_patch16_224.augreg_in21k_ft_in1k",
    "swin-t": "swin_tiny_patch4_window7_224.ms_in1k",
    "vit-b": "vit_base_patch16_224.augreg_in21k_ft_in1k",
}
_GLUE_ENCODER = "google-bert/bert-base-uncased"
_SOURCES: Mapping[str, str] = {
    "MQBench": "other weights, fine-tuned by the authors; only inputs of linear layers are quantized",
    "arXiv 2209.13325": "other weights, fine-tuned by the authors; read in notes on the paper",
    "arXiv 2304.09145": "an average over tasks and other weights; read in a summary of the paper",
}
"""Why nothing of a source of GLUE values can be compared, by how its name begins."""


def language_values() -> Iterator[Published]:
    """Every value of a language model, and those of one paper that has both kinds; file by file."""
    yield from _quanto()
    yield from _smoothquant()
    for name in ("outliers_bondarenko2023", "outliers_tweo2025"):
        yield from _from_scratch(name)
    yield from _glue()


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
                metric=_LAST_TOKEN,
                method=method,
                precision=precision,
                value=100 * float(line[column]),
                fp32=fp16,
                why=why,
            )


def _smoothquant() -> Iterator[Published]:
    """OPT under Intel's Neural Compressor, whose two pages disagree on the model without quantization."""
    for line in load_published("opt_lambada_smoothquant").to_dict("records"):
        fp = float(line["fp"])
        for method, precision, value in (
            (REFERENCE_METHOD, REFERENCE_PRECISION, fp),
            (str(line["method"]), "W8A8", float(line["w8a8"])),
        ):
            yield Published(
                source=str(line["source"]),
                model=str(line["model"]),
                data=LAMBADA,
                metric=_LAST_TOKEN,
                method=method,
                precision=precision,
                value=value,
                fp32=fp,
                why="the source does not state which tensors it quantizes, and gives two values without "
                "quantization for opt-125m: 37.9 and 63.89",
            )


def _from_scratch(name: str) -> Iterator[Published]:
    """Papers on outliers, whose authors trained every model from scratch."""
    for line in load_published(name).to_dict("records"):
        fp = None if _absent(line["fp"]) else float(line["fp"])
        for method, precision, value in (
            (REFERENCE_METHOD, REFERENCE_PRECISION, line["fp"]),
            ("minmax", "W8A8", line["w8a8"]),
        ):
            if _absent(value):
                continue
            yield Published(
                source=str(line["source"]),
                model=f"{line['model']} ({line['method']})",
                data=IMAGENET if line["metric"] == "accuracy" else "the authors' text",
                metric=str(line["metric"]),
                method=method,
                precision=precision,
                value=float(value),
                fp32=fp,
                why="other weights: trained from scratch by the authors",
                family=_ARCHITECTURES.get(str(line["model"])),
            )


def _glue() -> Iterator[Published]:
    """BERT and its kin on GLUE; every source fine-tuned its own."""
    for line in load_published("glue_bert").to_dict("records"):
        source, model, task = str(line["source"]), str(line["model"]), str(line["task"])
        yield Published(
            source=source,
            model=model,
            data=f"GLUE {task}",
            metric=f"{task} {line['metric']}",
            method=str(line["method"]),
            precision=f"W{line['wbits']}A{line['abits']}",
            value=float(line["quantized"]),
            fp32=None if _absent(line["fp32"]) else float(line["fp32"]),
            why=next(why for start, why in _SOURCES.items() if source.startswith(start)),
            family=_GLUE_ENCODER if model == "bert-base-uncased" else None,
        )


def _absent(value: object) -> bool:
    """Whether a cell of the file is empty."""
    return value != value
