"""Hugging Face's Trainer: a factory for the optimizer, a callback for logs and ranks, and nothing else changed.

python examples/trainer.py --out runs/trainer
ctr-optim report runs/trainer --png ranks.png
"""

from __future__ import annotations

import argparse

import torch
from common import ASSETS, collate, encode, load_base, load_tokenizer, read_rows, with_lora
from transformers import Trainer, TrainingArguments

from ctr_optim.integrations.transformers import CTRCallback, CTRFactory


def main(argv: list[str] | None = None) -> None:
    """Train the bundled model on a slice of E2E."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="runs/trainer")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    args = parser.parse_args(argv)

    cpu = torch.device("cpu")  # the Trainer moves model and batches
    tokenizer = load_tokenizer(str(ASSETS / "base5m"))
    model = with_lora(load_base(str(ASSETS / "base5m"), cpu, torch.float32), rank=8, seed=0)
    train, test = (encode(read_rows(ASSETS / "e2e" / f"{part}.jsonl"), tokenizer, 128) for part in ("train", "test"))

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=args.out,
            max_steps=args.steps,
            per_device_train_batch_size=8,
            lr_scheduler_type="cosine",
            logging_steps=max(1, args.steps // 10),
            save_steps=max(1, args.steps // 2),
            report_to="none",  # or "tensorboard", "wandb", "trackio": they get ctr/mean_rank, ctr/kl_from_base, ...
        ),
        train_dataset=train,
        eval_dataset=test[:16],
        data_collator=lambda examples: collate(examples, tokenizer.pad_token_id, cpu),
        optimizer_cls_and_kwargs=(CTRFactory, {"rank_scheduler": {"interval": max(1, args.steps // 6)}}),
        callbacks=[CTRCallback()],
    )
    trainer.train(resume_from_checkpoint=args.resume or None)
    print(f"test loss {trainer.evaluate()['eval_loss']:.3f} nats per token")
    trainer.save_model(args.out)  # a plain PEFT adapter, ranks in rank_pattern


if __name__ == "__main__":
    main()
