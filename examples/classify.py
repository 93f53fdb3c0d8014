"""Not a language model: an encoder with a classification head, LoRA on its linear maps, and a loop of one's own.

    python examples/classify.py                    # what kind of food does the text speak of? a tiny encoder, seconds
    python examples/classify.py --model NAME       # a pretrained encoder, from a folder or the hub

The bundled encoder has random weights, so that LoRA and the head have to find everything by themselves: it shows that
the set-up works, nothing more. The head is no LoRA layer: it counts in the bound by Adam's second moments.
In a classifier one example has one prediction: "per token" means per example here.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Callable

import torch
from common import ASSETS, read_rows
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ctr_optim import CTROptimizer, RankScheduler
from ctr_optim.report.log import EventLog

Data = list[tuple[str, int]]


def read(part: str, labels: list[str]) -> Data:
    """Texts of the E2E slice, and the food that they were written for: part of the meaning, not of the text."""
    found = []
    for row in read_rows(ASSETS / "e2e" / f"{part}.jsonl"):
        food = re.search(r"food : ([^|]+?) *(?:\||$)", row["prompt"].strip())
        if food is not None:
            if food[1] not in labels:
                labels.append(food[1])
            found.append((row["target"], labels.index(food[1])))
    return found


def tiny_encoder(tokenizer: PreTrainedTokenizerBase, classes: int) -> PreTrainedModel:
    """Two layers of width 128, random."""
    config = ModernBertConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, num_labels=classes, classifier_pooling="mean", pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None, eos_token_id=None, cls_token_id=None, sep_token_id=None,
    )  # fmt: skip
    return ModernBertForSequenceClassification(config)


@torch.no_grad()
def accuracy(model: torch.nn.Module, data: Data, batch: Callable[[Data], dict[str, torch.Tensor]]) -> float:
    """Share of the texts that get their own label."""
    model.eval()
    right = 0
    for start in range(0, len(data), 64):
        inputs = batch(data[start : start + 64])
        right += int((model(**inputs).logits.argmax(-1) == inputs["labels"]).sum())
    return right / len(data)


def main(argv: list[str] | None = None) -> None:
    """Train on one file of the slice, test on the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a pretrained encoder; default: a tiny random one")
    parser.add_argument("--out", default="runs/classify")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--ranks", action="store_true", help="let ranks move between layers")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    labels: list[str] = []
    train, test = read("train", labels), read("test", labels)
    tokenizer = AutoTokenizer.from_pretrained(args.model or ASSETS / "base5m")
    base = (
        AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=len(labels))
        if args.model
        else tiny_encoder(tokenizer, len(labels))
    )
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="SEQ_CLS"))

    def batch(rows: Data) -> dict[str, torch.Tensor]:
        texts = tokenizer([text for text, _ in rows], return_tensors="pt", padding=True, truncation=True, max_length=64)
        ids, mask = texts["input_ids"], texts["attention_mask"]
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([label for _, label in rows])}

    parameters = [p for p in model.parameters() if p.requires_grad]  # LoRA's and the head's
    ranks = RankScheduler(interval=max(1, args.steps // 6), total_steps=args.steps) if args.ranks else None
    opt = CTROptimizer(parameters, rank_scheduler=ranks)
    log = EventLog(opt, args.out)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, args.steps)
    every = max(1, args.steps // 10)
    for step in range(1, args.steps + 1):
        rows = [train[i] for i in torch.randint(len(train), (32,)).tolist()]
        loss = model(**batch(rows)).loss
        loss.backward()
        opt.step()
        opt.zero_grad()
        schedule.step()
        if step % every == 0:
            metrics = log.log(loss=float(loss))
            print(f"step {step:4}  loss {float(loss):.3f}  KL from base {metrics['kl_from_base']:.3f}")

    right, most = accuracy(model, test, batch), max(Counter(label for _, label in test).values()) / len(test)
    print(f"accuracy {right:.3f} on {len(test)} texts of {len(labels)} classes; always the commonest class: {most:.3f}")
    model.save_pretrained(args.out)


if __name__ == "__main__":
    main()
