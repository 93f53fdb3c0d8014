"""Tasks as tensors: rows of prompt and target, with the loss on the target's tokens only."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class Example:
    """Token ids and labels (-100 on the prompt) of one row; ``row`` is the source row."""

    ids: list[int]
    labels: list[int]
    row: dict


def load_rows(data: Path, task: str, split: str) -> list[dict]:
    """Return the rows of ``data/task/split.jsonl``."""
    with open(data / task / f"{split}.jsonl") as lines:
        return [json.loads(line) for line in lines]


def encode(rows: list[dict], tokenizer, max_length: int = 256) -> list[Example]:
    """Encode prompt, target and end-of-text token; a prompt that is too long loses tokens on its left."""
    prompts = tokenizer([row["prompt"] for row in rows])["input_ids"]
    targets = tokenizer([row["target"] for row in rows], add_special_tokens=False)["input_ids"]
    examples = []
    for row, prompt, target in zip(rows, prompts, targets, strict=True):
        target = [*target, tokenizer.eos_token_id][:max_length]
        prompt = prompt[max(0, len(prompt) + len(target) - max_length) :]
        examples.append(Example(prompt + target, [-100] * len(prompt) + target, row))
    return examples


def encode_text(text: str, tokenizer, length: int = 256) -> list[Example]:
    """Encode plain text in pieces of ``length`` tokens, every token with a label, to measure forgetting."""
    ids = tokenizer(text)["input_ids"]
    pieces = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
    return [Example(piece, piece, {}) for piece in pieces]


def validation_split(examples: list[Example], size: int) -> tuple[list[Example], list[Example]]:
    """Return a training part and a validation part of at least ``size`` rows that share no prompt."""
    prompts = sorted({e.row["prompt"] for e in examples})
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(0)).tolist()
    held: set[str] = set()
    count: dict[str, int] = {}
    for e in examples:
        count[e.row["prompt"]] = count.get(e.row["prompt"], 0) + 1
    total = 0
    for index in order:
        if total >= size:
            break
        held.add(prompts[index])
        total += count[prompts[index]]
    return [e for e in examples if e.row["prompt"] not in held], [e for e in examples if e.row["prompt"] in held]


def collate(examples: list[Example], device: torch.device, pad: int = 1) -> dict[str, Tensor]:
    """Return a right-padded batch on ``device``."""
    length = max(len(e.ids) for e in examples)
    ids = torch.full((len(examples), length), pad)
    labels = torch.full((len(examples), length), -100)
    mask = torch.zeros(len(examples), length, dtype=torch.long)
    for i, e in enumerate(examples):
        ids[i, : len(e.ids)] = torch.tensor(e.ids)
        labels[i, : len(e.ids)] = torch.tensor(e.labels)
        mask[i, : len(e.ids)] = 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device), "labels": labels.to(device)}


def batches(
    examples: list[Example], size: int, steps: int, seed: int, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """Yield batches of shuffled epochs. The seed fixes the order, so that all methods see the same batches."""
    generator = torch.Generator().manual_seed(1000 + seed)
    order: list[int] = []
    for _ in range(steps):
        if len(order) < size:
            order = torch.randperm(len(examples), generator=generator).tolist()
        chosen, order = order[:size], order[size:]
        yield collate([examples[i] for i in chosen], device)


@torch.no_grad()
def loss_per_token(model, examples: list[Example], device: torch.device, size: int = 64) -> float:
    """Return the mean loss per target token, in nats."""
    training = model.training
    model.eval()
    ordered = sorted(examples, key=lambda e: len(e.ids))
    total, count = 0.0, 0
    for start in range(0, len(ordered), size):
        batch = collate(ordered[start : start + size], device)
        tokens = int((batch["labels"][:, 1:] != -100).sum())
        total += float(model(**batch).loss) * tokens
        count += tokens
    model.train(training)
    return total / count


@torch.no_grad()
def kl_per_token(base, model, examples: list[Example], device: torch.device, size: int = 64) -> float:
    """Return the mean ``KL(base || model)`` over the target tokens, in nats."""
    modes = base.training, model.training
    base.eval()
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(examples), size):
        batch = collate(examples[start : start + size], device)
        here = batch.pop("labels")[:, 1:] != -100
        p, q = (m(**batch).logits[:, :-1][here].float().log_softmax(-1) for m in (base, model))
        total += float((p.exp() * (p - q)).sum())
        count += int(here.sum())
    base.train(modes[0])
    model.train(modes[1])
    return total / count


@torch.no_grad()
def choice_accuracy(model, rows: list[dict], tokenizer, device: torch.device, size: int = 64) -> float:
    """Return the share of rows whose true choice has the highest likelihood."""
    training = model.training
    model.eval()
    flat = [
        (i, k, e)
        for i, row in enumerate(rows)
        for k, choice in enumerate(row["choices"])
        for e in encode(
            [{"prompt": row["prompt"], "target": choice if choice.startswith(" ") else " " + choice}], tokenizer
        )
    ]
    flat.sort(key=lambda item: len(item[2].ids))
    scores: dict[int, dict[int, float]] = {}
    for start in range(0, len(flat), size):
        part = flat[start : start + size]
        batch = collate([e for _, _, e in part], device)
        labels = batch.pop("labels")[:, 1:]
        log_p = model(**batch).logits[:, :-1].float().log_softmax(-1)
        picked = log_p.gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1)
        for (i, k, _), score in zip(part, (picked * (labels != -100)).sum(-1).tolist(), strict=True):
            scores.setdefault(i, {})[k] = score
    model.train(training)
    right = sum(max(s, key=s.__getitem__) == rows[i]["label"] for i, s in scores.items())
    return right / len(rows)
