"""Read a llama model and its tokenizer from a GGUF file, without the package ``gguf``.

The module supports the formats of SmolLM2-135M-Instruct's file: F32, F16, Q8_0 and Q4_1, architecture ``llama``, a
byte-level BPE tokenizer. The file is little-endian and holds, in this order:

1. the magic ``GGUF``, the version, the number of tensors, the number of metadata entries;
2. the metadata entries;
3. one header per tensor: name, shape (fastest dimension first), type, offset;
4. the data, aligned.

====  ==========================================  ============================================================
type  block of 32 weights                         weight
====  ==========================================  ============================================================
Q4_1  fp16 d, fp16 m, 16 bytes                    ``d q + m``; low nibbles: weights 0 to 15, high nibbles: 16 to 31
Q8_0  fp16 d, 32 int8                             ``d q``
====  ==========================================  ============================================================

llama.cpp interleaves the rows of q and k for its rotary embedding. :func:`llama_state` restores the order of
transformers.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 32
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
TENSOR_TYPES = {0: ("F32", 1, 4), 1: ("F16", 1, 2), 3: ("Q4_1", 32, 20), 8: ("Q8_0", 32, 34)}  # name, weights, bytes

LAYER = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip
OUTER = {
    "token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}  # fmt: skip


def _scalar(file: BinaryIO, kind: str) -> Any:
    return struct.unpack("<" + kind, file.read(struct.calcsize("<" + kind)))[0]


def _string(file: BinaryIO) -> str:
    return file.read(_scalar(file, "Q")).decode("utf-8")


def _value(file: BinaryIO, kind: int) -> Any:
    """Read a metadata value of type ``kind``; arrays become lists."""
    if kind == STRING:
        return _string(file)
    if kind == ARRAY:
        inner, count = _scalar(file, "I"), _scalar(file, "Q")
        if inner in SCALARS:
            form = f"<{count}{SCALARS[inner]}"
            return list(struct.unpack(form, file.read(struct.calcsize(form))))
        return [_value(file, inner) for _ in range(count)]
    if kind not in SCALARS:
        raise ValueError(f"GGUF: got metadata of type {kind}, expected one of {sorted([*SCALARS, STRING, ARRAY])}")
    return _scalar(file, SCALARS[kind])


def dequantize(kind: str, data: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return float32 weights of ``shape`` from the bytes (uint8, 1-D) of a tensor of type ``kind``."""
    if kind == "F32":
        return data.view("<f4").astype(np.float32).reshape(shape)
    if kind == "F16":
        return data.view("<f2").astype(np.float32).reshape(shape)
    if kind == "Q8_0":
        blocks = data.reshape(-1, 34)
        scale = blocks[:, :2].copy().view("<f2").astype(np.float32)
        return (scale * blocks[:, 2:].copy().view(np.int8).astype(np.float32)).reshape(shape)
    blocks = data.reshape(-1, 20)
    scale, offset = (blocks[:, i : i + 2].copy().view("<f2").astype(np.float32) for i in (0, 2))
    nibbles = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1).astype(np.float32)
    return (scale * nibbles + offset).reshape(shape)


def read(path: str | Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the metadata and the float32 tensors by GGUF name, shape ``(d_out, d_in)`` each.

    Raises:
        ValueError: the file is no GGUF file of version 2 or 3, is truncated, or holds an unsupported tensor type.
    """
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{path}: got a file that does not start with 'GGUF', expected a GGUF file")
        version, tensors, entries = (_scalar(file, kind) for kind in "IQQ")
        if version not in (2, 3):
            raise ValueError(f"{path}: got GGUF version {version}, expected 2 or 3")
        metadata: dict[str, Any] = {}
        for _ in range(entries):
            key = _string(file)
            metadata[key] = _value(file, _scalar(file, "I"))
        headers = []
        for _ in range(tensors):
            name = _string(file)
            shape = tuple(_scalar(file, "Q") for _ in range(_scalar(file, "I")))[::-1]
            headers.append((name, shape, _scalar(file, "I"), _scalar(file, "Q")))
        alignment = metadata.get("general.alignment", ALIGNMENT)
        start = -(-file.tell() // alignment) * alignment
    content = np.memmap(path, np.uint8, "r")
    arrays = {}
    for name, shape, kind, offset in headers:
        if kind not in TENSOR_TYPES:
            raise ValueError(f"{path}: got tensor {name} of type {kind}, expected one of {TENSOR_TYPES}")
        label, weights, size = TENSOR_TYPES[kind]
        begin = start + offset
        end = begin + int(np.prod(shape)) // weights * size
        if end > len(content):
            raise ValueError(f"{path}: got {len(content)} bytes, expected at least {end}: the file is truncated")
        arrays[name] = dequantize(label, np.asarray(content[begin:end]), shape)
    return metadata, arrays


def llama_config(metadata: dict[str, Any], arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Return the arguments of transformers' ``LlamaConfig``."""
    if metadata.get("general.architecture") != "llama":
        raise ValueError(f"GGUF: got architecture {metadata.get('general.architecture')!r}, expected 'llama'")
    of = {key.removeprefix("llama."): value for key, value in metadata.items() if key.startswith("llama.")}
    heads = of["attention.head_count"]
    return {
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "hidden_size": of["embedding_length"],
        "intermediate_size": of["feed_forward_length"],
        "num_hidden_layers": of["block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": of.get("attention.head_count_kv", heads),
        "head_dim": of["embedding_length"] // heads,
        "max_position_embeddings": of["context_length"],
        "rms_norm_eps": of["attention.layer_norm_rms_epsilon"],
        "rope_theta": of.get("rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in arrays,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder q or k, ``(heads * head_dim, d_in)``: pairs (2 i, 2 i + 1) become halves (i, i + head_dim / 2)."""
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, half, 2, -1).swapaxes(1, 2).reshape(weight.shape)


def llama_state(
    metadata: dict[str, Any], arrays: dict[str, np.ndarray], dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensor]:
    """Return the state dict of ``LlamaForCausalLM``."""
    config = llama_config(metadata, arrays)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    state = {}
    for name, array in arrays.items():
        if name in OUTER:
            new = OUTER[name]
        else:
            _, layer, part, leaf = name.split(".")  # blk.3.attn_q.weight
            new = f"model.layers.{layer}.{LAYER[part]}.{leaf}"
            array = unpermute(array, heads[part]) if part in heads else array
        state[new] = torch.from_numpy(np.ascontiguousarray(array)).to(dtype)
    return state


def tokenizer(metadata: dict[str, Any]) -> Any:
    """Return the byte-level BPE tokenizer as ``PreTrainedTokenizerFast``. The kind ``smollm`` splits all digits.

    Raises:
        ValueError: the metadata names another kind of tokenizer.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    kind, before = metadata["tokenizer.ggml.model"], metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2" or before not in ("smollm", "gpt-2", "default"):
        raise ValueError(f"GGUF: got a tokenizer of kind {kind!r}, {before!r}; expected 'gpt2', 'smollm'")
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    inner = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    single = [pre_tokenizers.Digits(individual_digits=True), split]
    inner.pre_tokenizer = pre_tokenizers.Sequence(single) if before == "smollm" else split
    inner.decoder = decoders.ByteLevel()
    types = metadata.get("tokenizer.ggml.token_type", [])
    control = [t for t, kind in zip(tokens, types, strict=False) if kind == 3]
    inner.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    special = {
        f"{name}_token": tokens[metadata[f"tokenizer.ggml.{key}_token_id"]]
        for name, key in names.items()
        if f"tokenizer.ggml.{key}_token_id" in metadata
    }
    wrapped = PreTrainedTokenizerFast(tokenizer_object=inner, **special)
    wrapped.chat_template = metadata.get("tokenizer.chat_template")
    return wrapped
