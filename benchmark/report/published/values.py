"""Every published value that stands beside ours, and what is to be said of its source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from benchmark.report.published.imagenet import imagenet_values
from benchmark.report.published.language import language_values
from benchmark.report.published.reader import load_published
from benchmark.report.published.value import Published
from benchmark.report.roles import OURS

HEADLINE = "quanttune_headline"
_32_IMAGES = "calibrated on 32 images"

REMARKS: Mapping[str, str] = {
    "FQ-ViT README": "calibrated on 1,000 training images; position embeddings and logits are quantized as "
    "well; percentile is a running mean of each batch's, OMSE is searched on the last batch alone",
    "PTQ4ViT README": "calibrated on 32 images; the input of the patch convolution is left in float",
    "RepQ-ViT README": f"{_32_IMAGES}; weights are asymmetric there",
    "AdaLog README": f"{_32_IMAGES}; weights are asymmetric there",
    "QwT README": f"its own run of RepQ-ViT, {_32_IMAGES}; one decimal",
    "arXiv 2506.08496 table 1": "its own run of RepQ-ViT; read in a copy of the paper",
    "arXiv 2311.10126 table 1": f"collected there from other papers, {_32_IMAGES}",
}
"""Known differences of a source that leave its values comparable, to be printed beside them."""


def published_values() -> list[Published]:
    """Every number of the published tables, in their order."""
    return [*imagenet_values(), *language_values(), *_headline()]


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
