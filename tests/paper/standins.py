"""Folders that stand in for the Hub and for data: real classes and formats, tiny sizes, random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmark.subject.models.entry import own_random_state
from quanttune.seeds import derive_seed

WORDS = [
    "the",
    "film",
    "is",
    "good",
    "bad",
    "a",
    "cat",
    "dog",
    "sat",
    "on",
    "and",
    "of",
    "not",
    "very",
    "old",
]

TINY_TIMM: dict[str, dict[str, Any]] = {
    "vit_base_patch16_224.augreg_in21k_ft_in1k": {"embed_dim": 16, "depth": 2, "num_heads": 2},
    "deit_small_patch16_224.fb_in1k": {"embed_dim": 16, "depth": 1, "num_heads": 2},
    "deit_base_patch16_224.fb_in1k": {"embed_dim": 32, "depth": 1, "num_heads": 2},
    "swin_small_patch4_window7_224.ms_in1k": {
        "embed_dim": 8, "depths": [1, 1, 2, 1], "num_heads": [1, 1, 2, 2],
    },
    "swin_base_patch4_window7_224.ms_in1k": {
        "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 2],
    },
}  # fmt: skip


def save_timm(folder: Path, architecture: str, **data_config: Any) -> torch.nn.Module:
    """What timm's own export leaves: ``config.json`` and ``model.safetensors``."""
    import timm
    from timm.models import save_for_hf

    settings = TINY_TIMM[architecture]
    with own_random_state(7):
        model = timm.create_model(architecture, pretrained=False, **settings)
    save_for_hf(model, str(folder), model_args=settings, data_config=data_config, safe_serialization=True)
    return model.eval()


def save_bert(folder: Path) -> torch.nn.Module:
    """``bert-base-uncased`` as it is published: with the heads of its pretraining, which no task uses."""
    from transformers import BertConfig, BertForPreTraining, BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=128,
    )
    with own_random_state(8):
        model = BertForPreTraining(config)
    model.save_pretrained(folder)
    BertTokenizer(vocab={word: number for number, word in enumerate(words)}).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    return model.eval()


def save_opt(folder: Path, *, post_norm: bool = False, positions: int = 2048) -> torch.nn.Module:
    """OPT with its own special tokens and byte-level BPE; like OPT-350m with ``post_norm``."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import GPT2Tokenizer, OPTConfig, OPTForCausalLM

    words = ["<s>", "<pad>", "</s>", "<unk>", *sorted(ByteLevel.alphabet()), "th", "the"]
    config = OPTConfig(
        vocab_size=len(words),
        hidden_size=16,
        word_embed_proj_dim=8 if post_norm else 16,
        do_layer_norm_before=not post_norm,
        num_hidden_layers=2,
        num_attention_heads=2,
        ffn_dim=32,
        max_position_embeddings=positions,
    )
    with own_random_state(9):
        model = OPTForCausalLM(config)
    model.half().save_pretrained(folder)  # as published: half precision
    special = {**dict.fromkeys(("bos_token", "eos_token", "unk_token"), "</s>"), "pad_token": "<pad>"}
    tokenizer = GPT2Tokenizer(
        vocab={word: number for number, word in enumerate(words)},
        merges=[("t", "h"), ("th", "e")],
        add_bos_token=True,
        **special,
    )
    tokenizer.save_pretrained(folder)
    return model.float().eval()


def save_models(root: Path) -> Path:
    """Every checkpoint of the paper suite, as ``owner/name``."""
    for architecture in TINY_TIMM:
        save_timm(root / "timm" / architecture, architecture)
    save_bert(root / "google-bert" / "bert-base-uncased")
    save_opt(root / "facebook" / "opt-125m")
    save_opt(root / "facebook" / "opt-350m", post_norm=True)
    return root


def as_hub_cache(folder: Path, cache: Path, repo: str, commit: str, reference: str = "main") -> Path:
    """Lay a checkpoint out as the Hub's client keeps it, and return the snapshot."""
    import shutil

    base = cache / f"models--{repo.replace('/', '--')}"
    snapshot = base / "snapshots" / commit
    shutil.copytree(folder, snapshot)
    pointer = base / "refs" / reference
    pointer.parent.mkdir(parents=True, exist_ok=True)
    pointer.write_text(commit)
    return snapshot


def save_data(root: Path) -> Path:
    """Every data set of the paper suite, small, in the forms that a user may have."""
    save_photos(root / "imagenet", {"train": 96, "validation": 12}, classes=4)
    for name, columns in (
        ("glue_sst2", ("sentence",)),
        ("glue_mrpc", ("sentence1", "sentence2")),
        ("glue_qnli", ("question", "sentence")),
        ("glue_stsb", ("sentence1", "sentence2")),
    ):
        save_glue(root / name, columns, {"train": 96, "validation": 16}, scores=name == "glue_stsb")
    lines = {"train": 160, "validation": 60, "test": 60}
    for split, number in lines.items():
        save_text(root / "wikitext2" / f"{split}.txt", number)
    declare(root / "wikitext2", lines, windows={"train": 20, "validation": 4, "test": 8})
    passages = {"validation": 96, "test": 12}
    for split, number in passages.items():
        rows = [{"text": sentence(f"lambada {split} {row}", 12)} for row in range(number)]
        save_parquet(root / "lambada" / f"{split}.parquet", rows)
    declare(root / "lambada", passages)
    return root


def sentence(seed: str, length: int = 6) -> str:
    """Words drawn by a hash of ``seed``."""
    return " ".join(WORDS[derive_seed(0, seed, place) % len(WORDS)] for place in range(length))


def declare(folder: Path, rows: dict[str, int], **facts: int | dict[str, int]) -> None:
    """Say that a copy of a data set is smaller than the whole."""
    (folder / "dataset.json").write_text(json.dumps({"rows": rows, **facts}))


def save_photos(folder: Path, rows: dict[str, int], classes: int) -> None:
    """JPEG files of several sizes, one folder a class."""
    generator = np.random.default_rng(0)
    for split, number in rows.items():
        for item in range(number):
            path = folder / split / f"n{item % classes:08d}" / f"{split}_{item:08d}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            shape = (40 + item % 7, 40 + item % 5, 3)
            Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8)).save(path, quality=90)
    declare(folder, rows, classes=classes)


def save_glue(folder: Path, columns: tuple[str, ...], rows: dict[str, int], scores: bool) -> None:
    """Parquet with the columns of GLUE on the Hub, ``idx`` included."""
    for split, number in rows.items():
        content = [
            {column: sentence(f"{folder.name} {split} {row} {column}") for column in columns}
            | {"label": (row % 11) / 2 if scores else row % 2, "idx": row}
            for row in range(number)
        ]
        save_parquet(folder / f"{split}-00000-of-00001.parquet", content)
    declare(folder, rows)


def save_text(path: Path, lines: int) -> None:
    """A text with headings and blank lines, as WikiText has them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kinds = (
        lambda row: "",
        lambda row: f" = {sentence(str(row), 2)} =",
        lambda row: f" {sentence(str(row), 9)} .",
    )
    path.write_text("".join(f"{kinds[row % 3](row)}\n" for row in range(lines)))


def save_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    """Rows as one Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
