"""TRL's SFTTrainer with its own defaults: gradient checkpointing, bfloat16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import exact_kl, plain_bound, same
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainerCallback

from ctr_optim.integrations.transformers import CTRCallback, CTRFactory
from ctr_optim.report.log import read_events

trl = pytest.importorskip("trl", reason="TRL is not a dependency; its trainers are Trainers")
datasets = pytest.importorskip("datasets", reason="TRL wants a Dataset")
peft = pytest.importorskip("peft", reason="the adapters are PEFT's")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

TOKENIZER = Path(__file__).parents[2] / "examples" / "assets" / "base5m"
TEXTS = [
    "A tale of two cities.",
    "Call me Ishmael.",
    "It was a dark and stormy night.",
    "All happy families are alike.",
]
RANKS = dict(interval=3, until=1.0, hysteresis=0.0, window=2, sketch_rank=3)


LORA = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")


def base() -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=8192,
        max_position_embeddings=64, pad_token_id=1, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def trainer_of(folder: Path, **args: Any) -> Any:
    torch.manual_seed(0)
    defaults = dict(
        output_dir=str(folder), max_steps=8, per_device_train_batch_size=2, max_length=16, save_steps=4,
        logging_steps=2, report_to="none", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    options = dict(lr=0.02, max_kl=1e-3, kl_schedule="lr", calibration_interval=4, rank_scheduler=RANKS)
    return trl.SFTTrainer(
        model=base(),
        args=trl.SFTConfig(**{**defaults, **args}),
        train_dataset=datasets.Dataset.from_dict({"text": TEXTS * 2}),
        processing_class=AutoTokenizer.from_pretrained(TOKENIZER),
        peft_config=LORA,
        optimizer_cls_and_kwargs=(CTRFactory, options),
        callbacks=[CTRCallback()],
    )


def adapter(trainer: Any) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in trainer.model.state_dict().items() if "lora_" in k}


def test_resuming_after_rank_events_is_exact(tmp_path: Path) -> None:
    whole = trainer_of(tmp_path)
    assert whole.args.gradient_checkpointing and whole.args.bf16
    whole.train()
    events = read_events(tmp_path)
    assert {e["step"] for e in events if e["event"] == "rank"} == {3, 6}
    assert any("ctr/trust/scale" in logs for logs in whole.state.log_history)

    again = trainer_of(tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert same(adapter(whole), adapter(again))


def test_the_bound_is_a_kl_though_the_trainer_makes_no_logits(tmp_path: Path) -> None:
    """SFTTrainer fuses the last layer with the loss, so its outputs have only log-probabilities of single tokens."""
    trainer = trainer_of(tmp_path, max_steps=1, bf16=False, lr_scheduler_type="constant")
    said: dict[str, Any] = {}

    class Listener(TrainerCallback):
        def on_step_end(self, *args: Any, optimizer: Any = None, **kwargs: Any) -> None:
            said.update(getattr(optimizer, "optimizer", optimizer).metrics())

    trainer.add_callback(Listener())
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.train()
    assert said["trust/source"] == "measured" and said["trust/scale"] < 1
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        after = trainer.model(**inputs).logits
        with trainer.model.disable_adapter():
            before = trainer.model(**inputs).logits
    counts = torch.nn.functional.pad(batch["labels"][:, 1:] != -100, (0, 1))
    measured = float(exact_kl(before[counts], after[counts]).mean())
    assert said["trust/predicted_kl"] == pytest.approx(1e-3, rel=1e-3)
    assert 0.5 < measured / said["trust/predicted_kl"] < 2


PAIRS = {"prompt": ["Say "] * 8, "chosen": TEXTS * 2, "rejected": [text[::-1] for text in TEXTS] * 2}
JUDGED = {"prompt": ["Say "] * 8, "completion": TEXTS * 2, "label": [True, False] * 4}
OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "DPO": (PAIRS, dict(max_length=24), {}),
    "KTO": (JUDGED, dict(max_length=24), {}),
    "GRPO": (
        {"prompt": TEXTS * 2},
        dict(max_completion_length=6, num_generations=2),
        dict(reward_funcs=lambda completions, **_: [float(len(text) % 7) for text in completions]),
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_trainers_that_prefer_and_reward(name: str, tmp_path: Path) -> None:
    """DPO, KTO and GRPO trainers accept an optimizer that was built from the model with its adapter."""
    rows, args, extra = OTHERS[name]
    torch.manual_seed(0)
    model = peft.get_peft_model(base(), LORA)
    opt = plain_bound([p for p in model.parameters() if p.requires_grad], lr=0.02, max_kl=1e-3, rank_scheduler=RANKS)
    defaults = dict(output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=2, report_to="none")
    getattr(trl, f"{name}Trainer")(
        model=model,
        args=getattr(trl, f"{name}Config")(**defaults, use_cpu=True, disable_tqdm=True, **args),
        train_dataset=datasets.Dataset.from_dict(rows),
        processing_class=AutoTokenizer.from_pretrained(TOKENIZER),
        optimizers=(opt, None),
        callbacks=[CTRCallback()],
        **extra,
    ).train()
    said = opt.metrics()
    assert opt.steps == 4 and said["trust/source"] == "measured" and said["skipped_steps"] == 0
    assert any(event["event"] == "rank" for event in read_events(tmp_path))
