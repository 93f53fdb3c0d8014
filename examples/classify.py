"""Classification with an encoder: LoRA on its linear layers, a trained head, and a plain loop.

    python examples/classify.py                    # predict the kind of food in a text with a tiny encoder, in seconds
    python examples/classify.py --model NAME       # a pretrained encoder, from a folder or the hub

The bundled encoder has random weights, so that the example only shows that the setup works. The head is not a LoRA
layer; the bound includes it through Adam's second moments. A classifier makes one prediction per example, so that "per
token" means per example here.
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
    """Return texts of the E2E slice with the index of their kind of food, which the row's prompt names."""
    found = []
    for row in read_rows(ASSETS / "e2e" / f"{part}.jsonl"):
        food = re.search(r"food : ([^|]+?) *(?:\||$)", row["prompt"].strip())
        if food is not None:
            if food[1] not in labels:
                labels.append(food[1])
            found.append((row["target"], labels.index(food[1])))
    return found


def tiny_encoder(tokenizer: PreTrainedTokenizerBase, classes: int) -> PreTrainedModel:
    """Return an encoder with two layers of width 128 and random weights."""
    config = ModernBertConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, num_labels=classes, classifier_pooling="mean", pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None, eos_token_id=None, cls_token_id=None, sep_token_id=None,
    )  # fmt: skip
    return ModernBertForSequenceClassification(config)


@torch.no_grad()
def accuracy(model: torch.nn.Module, data: Data, batch: Callable[[Data], dict[str, torch.Tensor]]) -> float:
    """Return the share of correctly labelled texts."""
    model.eval()
    right = 0
    for start in range(0, len(data), 64):
        inputs = batch(data[start : start + 64])
        right += int((model(**inputs).logits.argmax(-1) == inputs["labels"]).sum())
    return right / len(data)


def main(argv: list[str] | None = None) -> None:
    """Train on the slice's training file and test on its test file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="pretrained encoder; default: a tiny random one")
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

    parameters = [p for p in model.parameters() if p.requires_grad]  # LoRA layers and head
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
    print(f"accuracy {right:.3f} on {len(test)} texts of {len(labels)} classes; share of the largest class: {most:.3f}")
    model.save_pretrained(args.out)


if __name__ == "__main__":
    main()
