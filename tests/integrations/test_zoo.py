"""Architectures and adapter types: each trains with moving ranks, is saved by PEFT, and loads again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

peft = pytest.importorskip("peft", reason="the adapters are PEFT's")
transformers = pytest.importorskip("transformers", reason="the models are transformers'")

from ctr_optim import CTROptimizer  # noqa: E402

SMALL: dict[str, Any] = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
LANGUAGE: dict[str, Any] = dict(**SMALL, vocab_size=64, num_key_value_heads=2, use_cache=False)
SOME = ["q_proj", "v_proj", "down_proj"]


def llama(**options: Any) -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LANGUAGE, **options))


def gpt2() -> nn.Module:
    sizes = dict(n_embd=32, n_layer=2, n_head=4, n_positions=32, vocab_size=64, bos_token_id=0, eos_token_id=0)
    drops = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **drops, use_cache=False))


def mixtral() -> nn.Module:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**LANGUAGE, num_local_experts=4))


def t5() -> nn.Module:
    sizes = dict(d_model=32, d_ff=48, num_layers=2, num_heads=4, d_kv=8, vocab_size=64)
    tokens = dict(decoder_start_token_id=0, pad_token_id=0)
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, **tokens, dropout_rate=0.0))


def bert(task: str = "SequenceClassification") -> nn.Module:
    config = transformers.BertConfig(**SMALL, vocab_size=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return getattr(transformers, f"BertFor{task}")(config)


def answers() -> nn.Module:
    return bert("QuestionAnswering")


def vit() -> nn.Module:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL, image_size=8, patch_size=4))


def text() -> dict[str, Tensor]:
    ids = torch.randint(2, 64, (8, 12))
    return {"input_ids": ids, "labels": ids}


def sentences() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(2, 64, (8, 12)), "labels": torch.randint(0, 2, (8,))}


def questions() -> dict[str, Tensor]:
    where = {"start_positions": torch.randint(0, 6, (8,)), "end_positions": torch.randint(6, 12, (8,))}
    return {"input_ids": torch.randint(2, 64, (8, 12)), **where}


def pictures() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(8, 3, 8, 8), "labels": torch.randint(0, 2, (8,))}


class Case(NamedTuple):
    """A model, its inputs, its adapter options, and the number of LoRA layers that the optimizer finds."""

    model: Callable[[], nn.Module]
    batch: Callable[[], dict[str, Tensor]]
    adapters: dict[str, Any]
    pairs: int


ZOO = {
    "Conv1D": Case(gpt2, text, dict(target_modules=["c_attn", "c_fc", "c_proj"], fan_in_fan_out=True), 8),
    "encoder and decoder": Case(t5, text, dict(target_modules=["q", "v", "wi", "wo"]), 20),
    "pictures": Case(vit, pictures, dict(target_modules="all-linear", modules_to_save=["classifier"]), 12),
    "attention of a mixture": Case(mixtral, text, dict(target_modules=["q_proj", "v_proj"]), 4),
    "experts of a mixture": Case(
        mixtral, text, dict(target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"]), 2
    ),
    "bias of B": Case(llama, text, dict(target_modules="all-linear", lora_bias=True), 14),
    "biases of the base": Case(bert, sentences, dict(target_modules=["query", "value"], bias="lora_only"), 4),
    "a head": Case(bert, sentences, dict(target_modules=["query", "value"], modules_to_save=["classifier"]), 4),
    "answers": Case(answers, questions, dict(target_modules=["query", "value"], modules_to_save=["qa_outputs"]), 4),
    "an embedding": Case(llama, text, dict(target_modules=["embed_tokens", *SOME]), 6),
    "single tokens": Case(llama, text, dict(target_modules=SOME, trainable_token_indices=[5, 6]), 6),
    "a tied head": Case(lambda: llama(tie_word_embeddings=True), text, dict(target_modules=["q_proj", "lm_head"]), 3),
    "layers in use twice": Case(
        llama, text, dict(target_modules=["q_proj", "v_proj"], layer_replication=[(0, 2), (0, 2)]), 8
    ),
    "DoRA": Case(llama, text, dict(target_modules=["q_proj", "down_proj"], use_dora=True), 4),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ZOO)
def test_it_trains_within_its_bound_and_loads_again(name: str, tmp_path: Path) -> None:
    case = ZOO[name]
    torch.manual_seed(0)
    model = peft.get_peft_model(case.model(), peft.LoraConfig(r=4, lora_alpha=8, **case.adapters)).train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    start = {name: p.detach().clone() for name, p in trained.items()}
    ranks = dict(interval=3, window=2, hysteresis=0.0, until=1.0)
    opt = CTROptimizer(trained.values(), rank_scheduler=ranks, max_kl=1e-2, kl_schedule="lr")
    events: list[Any] = []
    opt.on_rank_event(events.append)
    assert len(opt.pairs) == case.pairs
    batch, losses = case.batch(), []
    for _ in range(7):
        opt.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        opt.step()
        losses.append(float(loss.detach()))
        said = opt.metrics()
        assert said["trust/source"] == "measured" and said["skipped_steps"] == 0
        assert said["trust/predicted_kl"] <= said["trust/max_kl"] * (1 + 1e-4)
    assert losses[-1] < losses[0] and events
    assert not [name for name, p in trained.items() if p.shape == start[name].shape and torch.equal(p, start[name])]
    model.eval().save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = peft.PeftModel.from_pretrained(case.model(), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).loss, model(**batch).loss, rtol=0, atol=1e-6)
        torch.testing.assert_close(again(**batch)[1], model(**batch)[1], rtol=0, atol=1e-6)  # compares the logits
