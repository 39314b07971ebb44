"""Llama-architecture decoders from GGUF, the format of llama.cpp: dequantized tensors, and the tokenizer.

Weights of a GGUF file are usually stored in few bits. What comes out are the float32 values they stand for,
and not those of the released checkpoint.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quanttune.errors import AssetError

if TYPE_CHECKING:
    from gguf import GGUFReader
    from torch import Tensor

TOKENIZER = "tokenizer.json"
_NAMES = {
    "token_embd": "model.embed_tokens",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_CONTROL = 3  # the token type of llama.cpp for special tokens


def from_llama(files: dict[str, Path]) -> dict[str, Tensor]:
    """Read the one GGUF file among ``files``; its tokenizer is written beside it and added to ``files``.

    Raises:
        AssetError: If the file is not a Llama model with a byte-level BPE tokenizer that we know.
    """
    from gguf import GGUFReader

    (path,) = (path for name, path in files.items() if name.endswith(".gguf"))
    try:
        reader = GGUFReader(path)
        tensors = _tensors(reader)
        tokenizer = _tokenizer(reader)
    except (KeyError, ValueError) as error:
        raise AssetError(f"{path} is no Llama model of the known form: {error}") from error
    files[TOKENIZER] = path.with_name(TOKENIZER)
    files[TOKENIZER].write_text(tokenizer, encoding="utf-8")
    return tensors


def _tensors(reader: GGUFReader) -> dict[str, Tensor]:
    """Tensors under the names of transformers, weights as in ``nn.Linear``: ``(out, in)``."""
    import numpy as np
    import torch
    from gguf import dequantize

    heads = {
        "attn_q": int(reader.fields["llama.attention.head_count"].contents()),
        "attn_k": int(reader.fields["llama.attention.head_count_kv"].contents()),
    }
    tensors = {}
    for stored in reader.tensors:
        values = dequantize(stored.data, stored.tensor_type).astype(np.float32)
        layer, _, part = stored.name.removesuffix(".weight").rpartition(".")
        if part in heads:  # llama.cpp rotates neighbours, transformers the two halves of a head
            paired = values.reshape(heads[part], -1, 2, values.shape[-1])
            values = paired.swapaxes(1, 2).reshape(values.shape)
        prefix = f"model.layers.{int(layer.removeprefix('blk.'))}." if layer else ""
        tensors[f"{prefix}{_NAMES[part]}.weight"] = torch.from_numpy(np.ascontiguousarray(values))
    return tensors


def _tokenizer(reader: GGUFReader) -> str:
    """The tokenizer in the JSON of the library ``tokenizers``; the same text whatever its version.

    transformers can make one from the file as well, but it would not take numbers digit by digit, as the
    model's own does.
    """

    def value(name: str) -> Any:
        return reader.fields[f"tokenizer.ggml.{name}"].contents()

    kind = (value("model"), value("pre"))
    if kind != ("gpt2", "smollm"):
        raise ValueError(f"its tokenizer is of kind {kind}, only ('gpt2', 'smollm') is known")
    tokens, types = value("tokens"), value("token_type")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": number, "content": token, **special}
            for number, (token, of) in enumerate(zip(tokens, types, strict=True))
            if of == _CONTROL
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {token: number for number, token in enumerate(tokens)},
            "merges": value("merges"),
        },
    }
    return json.dumps(tokenizer, ensure_ascii=False, separators=(",", ":"))
