"""Hugging Face's Trainer with one new line: ``attach(trainer)``.

python examples/trainer.py --out runs/trainer
ctr-optim report runs/trainer --html run.html
"""

from __future__ import annotations

import argparse

import torch
from common import ASSETS, collate, encode, load_base, load_tokenizer, read_rows, with_lora
from transformers import Trainer, TrainingArguments

from ctr_optim.integrations.transformers import attach


def main(argv: list[str] | None = None) -> None:
    """Train the bundled model on a slice of E2E."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="runs/trainer")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--resume", action="store_true", help="resume from the last checkpoint in --out")
    parser.add_argument("--ranks", action="store_true", help="let ranks move between layers")
    args = parser.parse_args(argv)

    cpu = torch.device("cpu")  # The Trainer moves model and batches to its device.
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
            eval_strategy="steps",
            eval_steps=max(1, args.steps // 3),
            report_to="none",  # "tensorboard", "wandb" and "trackio" receive ctr/trust/scale, ctr/kl_from_base, ...
        ),
        train_dataset=train,
        eval_dataset=test[:16],
        data_collator=lambda examples: collate(examples, tokenizer.pad_token_id, cpu),
    )
    attach(trainer, rank_scheduler={"interval": max(1, args.steps // 6)} if args.ranks else None)
    trainer.train(resume_from_checkpoint=args.resume or None)
    print(f"test loss {trainer.evaluate()['eval_loss']:.3f} nats per token")
    trainer.save_model(args.out)  # a plain PEFT adapter


if __name__ == "__main__":
    main()
