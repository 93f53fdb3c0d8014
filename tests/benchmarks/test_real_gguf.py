"""Tests of the GGUF reader: every block format by hand, a whole synthetic file, and the real file."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="the reader makes a model and a tokenizer of transformers")

from benchmarks.real import gguf_file, prepare

HEADS, KV_HEADS, WIDTH, INNER, LAYERS = 4, 2, 64, 96, 2
REAL = Path(os.environ.get("CTR_REAL_GGUF", prepare.DEFAULT.parent / Path(prepare.GGUF).name))


def q4_1(scale: float, offset: float, values: list[int]) -> bytes:
    """Return one Q4_1 block; ``values`` are 32 numbers from 0 to 15."""
    low, high = values[:16], values[16:]
    return struct.pack("<ee16B", scale, offset, *(a | b << 4 for a, b in zip(low, high, strict=True)))


def q8_0(scale: float, values: list[int]) -> bytes:
    return struct.pack("<e32b", scale, *values)


def entry(key: str, kind: int, value: Any) -> bytes:
    """Return a metadata entry. Kinds: 4 uint32, 6 float32, 8 string, 9 list of strings or of int32."""

    def text(s: str) -> bytes:
        return struct.pack("<Q", len(s.encode())) + s.encode()

    head = text(key) + struct.pack("<I", kind)
    if kind == 8:
        return head + text(value)
    if kind == 9:
        inner = 8 if isinstance(value[0], str) else 5
        parts = b"".join(text(v) if inner == 8 else struct.pack("<i", v) for v in value)
        return head + struct.pack("<IQ", inner, len(value)) + parts
    return head + struct.pack({4: "<I", 6: "<f"}[kind], value)


def blocks(shape: tuple[int, int], kind: int, seed: int) -> tuple[bytes, np.ndarray]:
    """Return random quantised data of a tensor ``(d_out, d_in)`` and its weights, computed block by block."""
    draw = np.random.default_rng(seed)
    data, weights = b"", []
    for _ in range(shape[0] * shape[1] // 32):
        scale, offset = (float(np.float16(x)) for x in draw.normal(0, 0.1, 2))
        if kind == 3:
            q = draw.integers(0, 16, 32).tolist()
            data += q4_1(scale, offset, q)
            weights += [np.float32(scale) * np.float32(v) + np.float32(offset) for v in q]
        else:
            q = draw.integers(-128, 128, 32).tolist()
            data += q8_0(scale, q)
            weights += [np.float32(scale) * np.float32(v) for v in q]
    return data, np.array(weights, np.float32).reshape(shape)


TOKENS = ["<|endoftext|>", "<|end|>", "a", "b", "Ġ", "1", "2", "ab", "Ġab"]


def write(path: Path) -> dict[str, np.ndarray]:
    """Write a GGUF file of a small llama and return its weights by GGUF name."""
    shapes: dict[str, tuple[tuple[int, ...], int]] = {"token_embd.weight": ((len(TOKENS), WIDTH), 8)}
    size = WIDTH // HEADS
    for i in range(LAYERS):
        shapes |= {f"blk.{i}.attn_norm.weight": ((WIDTH,), 0), f"blk.{i}.ffn_norm.weight": ((WIDTH,), 0)}
        for name, shape in {
            "attn_q": (WIDTH, WIDTH), "attn_k": (KV_HEADS * size, WIDTH), "attn_v": (KV_HEADS * size, WIDTH),
            "attn_output": (WIDTH, WIDTH), "ffn_gate": (INNER, WIDTH), "ffn_up": (INNER, WIDTH),
            "ffn_down": (WIDTH, INNER),
        }.items():  # fmt: skip
            shapes[f"blk.{i}.{name}.weight"] = (shape, 3)
    shapes["output_norm.weight"] = ((WIDTH,), 0)
    entries = [
        entry("general.architecture", 8, "llama"), entry("llama.block_count", 4, LAYERS),
        entry("llama.context_length", 4, 128), entry("llama.embedding_length", 4, WIDTH),
        entry("llama.feed_forward_length", 4, INNER), entry("llama.attention.head_count", 4, HEADS),
        entry("llama.attention.head_count_kv", 4, KV_HEADS), entry("llama.rope.freq_base", 6, 10000.0),
        entry("llama.attention.layer_norm_rms_epsilon", 6, 1e-5), entry("llama.vocab_size", 4, len(TOKENS)),
        entry("tokenizer.ggml.model", 8, "gpt2"), entry("tokenizer.ggml.pre", 8, "smollm"),
        entry("tokenizer.ggml.tokens", 9, TOKENS), entry("tokenizer.ggml.token_type", 9, [3, 3] + [1] * 7),
        entry("tokenizer.ggml.merges", 9, ["a b", "Ġ ab"]), entry("tokenizer.ggml.bos_token_id", 4, 0),
        entry("tokenizer.ggml.eos_token_id", 4, 1), entry("tokenizer.ggml.padding_token_id", 4, 1),
    ]  # fmt: skip
    headers, data, weights = b"", b"", {}
    for seed, (name, (shape, kind)) in enumerate(shapes.items()):
        if kind == 0:
            array = np.random.default_rng(seed).normal(1, 0.1, shape).astype(np.float32)
            content = array.tobytes()
        else:
            content, array = blocks(shape, kind, seed)  # type: ignore[arg-type]
        weights[name] = array
        headers += struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", len(shape))
        headers += b"".join(struct.pack("<Q", d) for d in reversed(shape)) + struct.pack("<IQ", kind, len(data))
        data += content + b"\0" * (-len(content) % 32)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(shapes), len(entries)) + b"".join(entries) + headers
    path.write_bytes(head + b"\0" * (-len(head) % 32) + data)
    return weights


def test_blocks_by_hand() -> None:
    values = [*range(16), *range(15, -1, -1)]
    data = np.frombuffer(q4_1(0.5, -1.0, values), np.uint8)
    assert gguf_file.dequantize("Q4_1", data, (1, 32)).tolist() == [[0.5 * v - 1.0 for v in values]]
    values = [*range(-16, 16)]
    data = np.frombuffer(q8_0(0.25, values), np.uint8)
    assert gguf_file.dequantize("Q8_0", data, (2, 16)).flatten().tolist() == [0.25 * v for v in values]


def test_rows_of_q_and_k_go_back_to_halves() -> None:
    weight = np.arange(16 * 3, dtype=np.float32).reshape(16, 3)  # two heads of eight
    interleaved = weight.reshape(2, 2, 4, 3).swapaxes(1, 2).reshape(16, 3)  # as llama.cpp stores it
    assert interleaved[:4].tolist() == weight[[0, 4, 1, 5]].tolist()
    assert np.array_equal(gguf_file.unpermute(interleaved, 2), weight)


def test_a_whole_file_becomes_a_model_folder(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    weights = write(tmp_path / "small.gguf")
    found = prepare.write(tmp_path / "small.gguf", tmp_path / "model", "the licence")
    assert prepare.prepared(tmp_path / "model")
    assert found == prepare.sha256(tmp_path / "model" / "model.safetensors")
    assert found in (tmp_path / "model" / "README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    state = model.state_dict()
    size = WIDTH // HEADS
    for name, new, heads in (
        ("token_embd.weight", "model.embed_tokens.weight", 0), ("output_norm.weight", "model.norm.weight", 0),
        ("blk.1.attn_q.weight", "model.layers.1.self_attn.q_proj.weight", HEADS),
        ("blk.0.attn_k.weight", "model.layers.0.self_attn.k_proj.weight", KV_HEADS),
        ("blk.0.attn_v.weight", "model.layers.0.self_attn.v_proj.weight", 0),
        ("blk.1.ffn_down.weight", "model.layers.1.mlp.down_proj.weight", 0),
    ):  # fmt: skip
        expected = torch.from_numpy(weights[name])
        if heads:  # row 2 i + j of a head is row i + j * size / 2
            order = [h * size + 2 * (i % (size // 2)) + i // (size // 2) for h in range(heads) for i in range(size)]
            expected = expected[order]
        assert torch.equal(state[new], expected.to(torch.bfloat16)), name
    assert state["lm_head.weight"] is state["model.embed_tokens.weight"] or torch.equal(
        state["lm_head.weight"], state["model.embed_tokens.weight"]
    )
    assert (model.config.num_key_value_heads, model.config.eos_token_id) == (KV_HEADS, 1)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer("ab ab12<|end|>")["input_ids"] == [7, 8, 5, 6, 1]
    assert tokenizer.decode([7, 8, 5]) == "ab ab1"
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 1)


def test_parts_of_a_file_are_joined_and_checked(tmp_path: Path) -> None:
    write(tmp_path / "small.gguf")
    content = (tmp_path / "small.gguf").read_bytes()
    parts = [tmp_path / "a", tmp_path / "b"]
    for part, piece in zip(parts, (content[:1000], content[1000:]), strict=True):
        part.write_bytes(piece)
    assert prepare.join(parts, tmp_path).read_bytes() == content
    with pytest.raises(SystemExit, match=r"SHA-256 .* expected"):
        prepare.prepare(tmp_path / "model", gguf=parts)


def test_what_is_no_such_file_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "small.gguf")
    content = (tmp_path / "small.gguf").read_bytes()
    file = tmp_path / "bad.gguf"
    for bad, message in (
        (b"PK" + content, "expected a GGUF file"),
        (content[:4] + struct.pack("<I", 9) + content[8:], "version 9, expected 2 or 3"),
        (content[:-4000], "truncated"),
    ):
        file.write_bytes(bad)
        with pytest.raises(ValueError, match=message):
            gguf_file.read(file)
    with pytest.raises(ValueError, match="architecture 'mamba'"):
        gguf_file.llama_config({"general.architecture": "mamba"}, {})


def test_the_package_gguf_reads_the_same(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="the second opinion comes from the package gguf")
    write(tmp_path / "small.gguf")
    _, arrays = gguf_file.read(tmp_path / "small.gguf")
    for tensor in gguf.GGUFReader(tmp_path / "small.gguf").tensors:
        assert np.array_equal(gguf.quants.dequantize(tensor.data, tensor.tensor_type), arrays[tensor.name])


@pytest.mark.skipif(not REAL.exists(), reason=f"{REAL.name} does not exist; set CTR_REAL_GGUF to its path")
def test_the_real_file_as_transformers_reads_it() -> None:
    pytest.importorskip("gguf", reason="transformers reads GGUF files with the package gguf")
    assert prepare.sha256(REAL) == prepare.GGUF_SHA256
    state = gguf_file.llama_state(*gguf_file.read(REAL))
    theirs = prepare.transformers_model(REAL).state_dict()
    assert set(theirs) - set(state) <= {"lm_head.weight"}
    assert all(torch.equal(state[name], theirs[name]) for name in state)
