"""Settings of Trainer, Accelerate and TRL that people use every day, on the matrix' tiny model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.trust.framework_cases import Observer, predicted
from benchmarks.trust.tiny import ROWS, adapted, batch_of, model_of
from benchmarks.trust.wrappers import REWARDED, TEXTS, TOKENIZER, arguments, inputs_of_trl, optimizer_of, rows_of


def with_trainer(steps: int, folder: Path, accumulate: int = 1, **options: Any) -> Observer:
    """Train through ``attach`` with some arguments of the Trainer."""
    from transformers import Trainer, TrainingArguments

    rows = rows_of("attached", steps * accumulate)
    args = TrainingArguments(
        **arguments(steps, folder), per_device_train_batch_size=ROWS, gradient_accumulation_steps=accumulate, **options
    )
    return observed(Trainer(model=adapted(model_of("attached"), "lora"), args=args, train_dataset=rows))


def observed(trainer: Any, inputs_of: Callable[[Any], Any] = lambda inputs: inputs, head: Any = None) -> Observer:
    """Attach and train, every micro-batch noted in ``compute_loss``."""
    from transformers import PrinterCallback

    from ctr_optim.integrations.transformers import attach

    observer, original = Observer(), trainer.compute_loss

    def compute_loss(model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        batch = {name: t.clone() for name, t in inputs_of(inputs).items() if isinstance(t, Tensor)}
        observer.saw(trainer.optimizer, lambda: (head or of_tokens)(trainer.model, batch))
        loss = original(model, inputs, *args, **kwargs)
        observer.losses.append(float(loss[0] if isinstance(loss, tuple) else loss))
        return loss

    trainer.compute_loss = compute_loss
    trainer.remove_callback(PrinterCallback)
    attach(trainer).train()
    return observer


def of_tokens(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Log-probabilities of the tokens that have a label."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
    return predicted(model, inputs, batch["labels"])


def checkpointed_bf16(steps: int, folder: Path) -> Observer:
    """``gradient_checkpointing=True, bf16=True``."""
    return with_trainer(steps, folder, gradient_checkpointing=True, bf16=True)


def compiled(steps: int, folder: Path) -> Observer:
    """``torch_compile=True`` with the backend ``eager``."""
    return with_trainer(steps, folder, torch_compile=True, torch_compile_backend="eager")


def accumulated(steps: int, folder: Path) -> Observer:
    """``gradient_accumulation_steps=4``."""
    return with_trainer(steps, folder, accumulate=4)


def accelerated(steps: int, folder: Path) -> Observer:
    """Accelerate's ``accumulate`` over four micro-batches, with bf16."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=4)
    model = adapted(model_of("attached"), "lora")
    model, optimizer = accelerator.prepare(model, optimizer_of(model))
    observer = Observer()
    for index in range(4 * steps):
        batch = batch_of("attached", index)
        observer.saw(optimizer, lambda batch=batch: of_tokens(model, batch))
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        observer.losses.append(loss.item())
    return observer


def grpo(steps: int, folder: Path, **options: Any) -> Observer:
    """GRPO with several passes over each batch of samples."""
    import datasets
    import trl
    from transformers import AutoTokenizer

    rewards = dict(reward_funcs=lambda completions, **_: [float(len(text) % 7) for text in completions])
    config = trl.GRPOConfig(
        **arguments(steps, folder), per_device_train_batch_size=4, bf16=False, **{**REWARDED, **options}
    )
    trainer = trl.GRPOTrainer(
        model=adapted(model_of("attached", vocabulary=8192), "lora"), args=config,
        train_dataset=datasets.Dataset.from_dict({"prompt": TEXTS}),
        processing_class=AutoTokenizer.from_pretrained(TOKENIZER), **rewards,
    )  # fmt: skip
    return observed(trainer, inputs_of_trl)


def reward(steps: int, folder: Path) -> Observer:
    """A reward model: one score a sequence, so that the KL is that of Gaussians of unit variance around it."""
    import datasets
    import trl
    from peft import LoraConfig
    from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=8192,
        max_position_embeddings=64, pad_token_id=1, bos_token_id=0, eos_token_id=0, num_labels=1,
        initializer_range=0.15,
    )  # fmt: skip
    pairs = {"chosen": TEXTS, "rejected": [text[::-1] for text in TEXTS]}
    args = trl.RewardConfig(**arguments(steps, folder), per_device_train_batch_size=4, bf16=False, max_length=24)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="SEQ_CLS")
    trainer = trl.RewardTrainer(
        model=LlamaForSequenceClassification(config), args=args, train_dataset=datasets.Dataset.from_dict(pairs),
        processing_class=AutoTokenizer.from_pretrained(TOKENIZER), peft_config=lora,
    )  # fmt: skip
    return observed(trainer, head=of_scores)


def of_scores(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The scores ``(n, 1)``, means of Gaussians of unit variance."""
    scores: Any = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return torch.as_tensor(scores.float())
