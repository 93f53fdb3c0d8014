"""Tiny image and speech models train with moving ranks, and the KL of their steps is measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import plain_bound, trainable
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", reason="the models are Hugging Face's")
peft = pytest.importorskip("peft", reason="the adapters are PEFT's")

VOCAB, IMAGE = 40, 39
TEXT = dict(
    vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip

Batches = Callable[[int], dict[str, Tensor]]


def text(step: int, rows: int = 4, length: int = 14) -> dict[str, Tensor]:
    """Return token ids without special tokens, and labels after a prompt."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(3, IMAGE - 3, (rows, length), generator=generator)
    labels = ids.clone()
    labels[:, :8] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def llava(images: tuple[int, ...]) -> tuple[nn.Module, Batches]:
    """Return a Llava model, and rows with the given numbers of images of four patches each."""
    config = transformers.LlavaConfig(
        vision_config=dict(
            model_type="clip_vision_model", hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=2, image_size=8, patch_size=4, projection_dim=16,
        ),
        text_config=dict(model_type="llama", **TEXT), image_token_id=IMAGE, vision_feature_layer=-1,
    )  # fmt: skip

    def batches(step: int) -> dict[str, Tensor]:
        data = text(step)
        for row, count in enumerate(images):
            data["input_ids"][row, : 4 * count] = IMAGE
        data["labels"][data["input_ids"] == IMAGE] = -100
        return {**data, "pixel_values": torch.randn(sum(images), 3, 8, 8)}

    return transformers.LlavaForConditionalGeneration(config), batches


def qwen2_vl() -> tuple[nn.Module, Batches]:
    """Return a Qwen2-VL model, and rows with one image each; four patches become one token."""
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2]}
    config = transformers.Qwen2VLConfig(
        text_config=dict(TEXT, rope_scaling=rope, rope_parameters={**rope, "rope_theta": 1e4}),
        vision_config=dict(depth=2, embed_dim=16, hidden_size=16, num_heads=2, mlp_ratio=2, patch_size=4),
        image_token_id=IMAGE, video_token_id=IMAGE - 1, vision_start_token_id=IMAGE - 2, vision_end_token_id=IMAGE - 3,
        vision_token_id=IMAGE,
    )  # fmt: skip

    def batches(step: int) -> dict[str, Tensor]:
        data = text(step)
        data["input_ids"][:, 0], data["input_ids"][:, 1:5] = IMAGE - 2, IMAGE
        data["mm_token_type_ids"] = (data["input_ids"] == IMAGE).long()
        grid = torch.tensor([[1, 4, 4]]).repeat(4, 1)
        return {**data, "pixel_values": torch.randn(4 * 16, 3 * 2 * 4 * 4), "image_grid_thw": grid}

    return transformers.Qwen2VLForConditionalGeneration(config), batches


def whisper() -> tuple[nn.Module, Batches]:
    config = transformers.WhisperConfig(
        vocab_size=VOCAB, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, num_mel_bins=8, max_source_positions=20,
        max_target_positions=20, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        begin_suppress_tokens=None, apply_spec_augment=True, mask_time_prob=0.3, mask_time_length=2,
        mask_time_min_masks=1,
    )  # fmt: skip

    def batches(step: int) -> dict[str, Tensor]:
        return {"input_features": torch.randn(8, 8, 40), "labels": text(step, rows=8)["labels"]}

    return transformers.WhisperForConditionalGeneration(config), batches


def wav2vec2() -> tuple[nn.Module, Batches]:
    config = transformers.Wav2Vec2Config(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        conv_dim=(8, 8), conv_stride=(5, 4), conv_kernel=(10, 8), num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, mask_time_prob=0.3, mask_time_length=2, ctc_loss_reduction="mean",
        pad_token_id=0, ctc_zero_infinity=True,
    )  # fmt: skip

    def batches(step: int) -> dict[str, Tensor]:
        return {"input_values": torch.randn(8, 400), "labels": text(step, rows=8, length=6)["input_ids"]}

    return transformers.Wav2Vec2ForCTC(config), batches


MODELS: dict[str, Callable[[], tuple[nn.Module, Batches]]] = {
    "llava": lambda: llava((1, 1, 1, 1)),
    "llava, two images in a row": lambda: llava((2, 1, 0, 1)),
    "qwen2-vl": qwen2_vl,
    "whisper": whisper,
    "wav2vec2": wav2vec2,
}


@pytest.mark.parametrize("name", MODELS)
def test_it_trains_with_moving_ranks_and_is_measured(name: str) -> None:
    model, batches = MODELS[name]()
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(model, lora).train()
    ranks = dict(interval=6, window=2, sketch_rank=2, hysteresis=0.0, absent="sketch")
    opt = plain_bound(trainable(model), max_kl=1e-3, calibration_interval=4, factor_interval=2, rank_scheduler=ranks)
    first = batches(0)
    losses = []
    for _ in range(20):
        loss = model(**first).loss
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(float(loss.detach()))
        found: dict[str, Any] = opt.metrics()
        assert found["trust/predicted_kl"] <= 1e-3 * (1 + 1e-4)
    assert found["trust/source"] == "measured"
    assert 1e-2 < found["trust/coupling"] < 1e4
    assert sum(losses[-3:]) < sum(losses[:3])
