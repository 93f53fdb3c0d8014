"""TRL's SFTTrainer with one new line: ``attach(trainer)``.

python examples/trl_sft.py --out runs/sft        (needs: pip install trl)
"""

from __future__ import annotations

import argparse

import torch
from common import ASSETS, read_rows
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from ctr_optim.integrations.transformers import attach


def main(argv: list[str] | None = None) -> None:
    """Train the bundled model on prompts and completions."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="runs/sft")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--ranks", action="store_true", help="let ranks move between layers")
    args = parser.parse_args(argv)

    rows = read_rows(ASSETS / "e2e" / "train.jsonl")
    trainer = SFTTrainer(
        model=str(ASSETS / "base5m"),
        args=SFTConfig(
            output_dir=args.out,
            max_steps=args.steps,
            per_device_train_batch_size=8,
            lr_scheduler_type="cosine",
            max_length=128,
            logging_steps=max(1, args.steps // 10),
            use_cpu=not torch.cuda.is_available(),
            report_to="none",
        ),
        train_dataset=Dataset.from_list([{"prompt": row["prompt"], "completion": row["target"]} for row in rows]),
        processing_class=AutoTokenizer.from_pretrained(ASSETS / "base5m"),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
    )
    attach(trainer, rank_scheduler={"interval": max(1, args.steps // 3)} if args.ranks else None)
    trainer.train()
    trainer.save_model(args.out)


if __name__ == "__main__":
    main()
